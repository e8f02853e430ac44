/* The products of product.h by tile registers: C is made of squares of LANES x LANES sums, two by two of them at a time
 * in registers 0 to 3, and each step takes LANES terms. So A is read in whole squares, and C written in whole ones:
 * memory has room for them, and the terms beyond n are 0 in one operand and finite in the other. B lies in strips
 * (terms.h), b_step apart, of which a step takes LANES rows. */

#define AMX_TILE(C, row, column, c_step) ((C) + ((row) * (c_step) + (column)) * LANES)

/* Compilers may not know that loads of tile registers read memory. */
#define MEMORY_IS_WRITTEN() atomic_signal_fence(memory_order_seq_cst)

/* `rows` by `columns` squares of C, each 1 or 2: the sums from C, or 0; some terms of A B; and the sums to C. */
static inline __attribute__((always_inline)) void amx_load_c(int rows, int columns, const real *C, int64_t c_step,
                                                             int add)
{
    const size_t bytes = (size_t)c_step * sizeof(real);
    MEMORY_IS_WRITTEN();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!add)
        return;
    _tile_loadd(0, C, bytes);
    if (columns == 2)
        _tile_loadd(1, AMX_TILE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_loadd(2, AMX_TILE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_loadd(3, AMX_TILE(C, 1, 1, c_step), bytes);
}

/* A left operand: rows of terms, as they lie or in strips (terms.h). */
struct left {
    const packed *terms;
    int64_t row, step, rows; /* from one row, LANES terms, LEFT_ROWS rows to the next */
};

static inline struct left a_of_rows(const packed *A, int64_t stride)
{
    return (struct left){A, stride, LANES, PACKED_A_ROWS * stride};
}

static inline struct left a_of_packed(const packed *A, int64_t stride)
{
    return (struct left){A, LANES, PACKED_A_ROWS * LANES, stride};
}

/* Loads come first: where another thread has half of the processor's buffers, it sees past fewer products. */
static inline __attribute__((always_inline)) void amx_dot(int rows, int columns, struct left A, const packed *B,
                                                          int64_t b_step, int64_t n)
{
    const size_t a_bytes = (size_t)A.row * sizeof(packed), b_bytes = LANES * sizeof(packed);
    for (int64_t t = 0; t < n; t += LANES, A.terms += A.step, B += LANES * LANES) {
        _tile_loadd(4, A.terms, a_bytes);
        _tile_loadd(6, B, b_bytes);
        if (columns == 2)
            _tile_loadd(7, B + b_step, b_bytes);
        if (rows == 2)
            _tile_loadd(5, A.terms + LANES * A.row, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (columns == 2)
            _tile_dpbf16ps(1, 4, 7);
        if (rows == 2)
            _tile_dpbf16ps(2, 5, 6);
        if (rows == 2 && columns == 2)
            _tile_dpbf16ps(3, 5, 7);
    }
}

static inline __attribute__((always_inline)) void amx_store_c(int rows, int columns, real *C, int64_t c_step)
{
    const size_t bytes = (size_t)c_step * sizeof(real);
    _tile_stored(0, C, bytes);
    if (columns == 2)
        _tile_stored(1, AMX_TILE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_stored(2, AMX_TILE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, AMX_TILE(C, 1, 1, c_step), bytes);
}

static inline __attribute__((always_inline)) void amx_block(int rows, int columns, struct left A, const packed *B,
                                                            int64_t b_step, real *C, int64_t c_step, int64_t n, int add)
{
    amx_load_c(rows, columns, C, c_step, add);
    amx_dot(rows, columns, A, B, b_step, n);
    amx_store_c(rows, columns, C, c_step);
}

/* Down a column of squares, so that those of B stay in the first cache, which the terms of A pass through. */
static inline __attribute__((always_inline)) void amx_gemm(int64_t rows, int vectors, struct left A, const packed *B,
                                                           int64_t b_step, real *C, int64_t c_step, int64_t n, int add)
{
    for (int v = 0; v < vectors; v += 2, B += 2 * b_step, C += 2 * LANES) {
        struct left a = A;
        for (int64_t r = 0; r < rows; r += PACKED_A_ROWS, a.terms += a.rows) {
            real *c = C + r * c_step;
            if (rows - r > LANES && v + 1 < vectors)
                amx_block(2, 2, a, B, b_step, c, c_step, n, add);
            else if (rows - r > LANES)
                amx_block(2, 1, a, B, b_step, c, c_step, n, add);
            else if (v + 1 < vectors)
                amx_block(1, 2, a, B, b_step, c, c_step, n, add);
            else
                amx_block(1, 1, a, B, b_step, c, c_step, n, add);
        }
    }
}

/* A product of two by two squares, an instruction at a time, so that other work can stand between. */
struct gemm_steps {
    struct left A; /* of the next step, as B */
    const packed *B;
    int64_t b_step;
    int64_t each, done, due; /* products of registers: of a part, times `parts`; done; to be done, likewise */
};

static inline void gemm_steps_begin(struct gemm_steps *s, struct left A, const packed *B, int64_t b_step, int64_t n)
{
    *s = (struct gemm_steps){A, B, b_step, 4 * padded(n) / LANES, 0, 0};
    amx_load_c(2, 2, NULL, 0, 0);
}

/* The next of `parts` parts. */
static inline void gemm_step(struct gemm_steps *s, int parts)
{
    const size_t a_bytes = (size_t)s->A.row * sizeof(packed), b_bytes = LANES * sizeof(packed);
    for (s->due += s->each; s->done * parts < s->due; s->done++)
        switch (s->done % 4) {
        case 0:
            _tile_loadd(4, s->A.terms, a_bytes);
            _tile_loadd(6, s->B, b_bytes);
            _tile_dpbf16ps(0, 4, 6);
            break;
        case 1:
            _tile_loadd(7, s->B + s->b_step, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
            break;
        case 2:
            _tile_loadd(5, s->A.terms + LANES * s->A.row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            break;
        default: _tile_dpbf16ps(3, 5, 7); s->A.terms += s->A.step, s->B += LANES * LANES;
        }
}

static void gemm_nn(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                    real *C, int64_t c_step, int64_t n, real factor, struct prefetch_cursor *cursor)
{
    (void)cursor; /* in whole squares there is nothing to be asked for evenly */
    amx_gemm(rows, vectors, a_of_rows(A, a_step), B, b_step, C, c_step, n, 0);
    if (factor == 1)
        return;
    for (int64_t r = 0; r < rows; r++)
        scale_vectors(C + r * c_step, vectors * LANES, factor);
}

static void gemm_packed_acc(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                            real *C, int64_t c_step, int64_t n)
{
    amx_gemm(rows, vectors, a_of_packed(A, a_step), B, b_step, C, c_step, n, 1);
}

static void gemm_nn_acc(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n)
{
    gemm_packed_acc(rows, vectors, A, a_step, B, b_step, C, c_step, n);
}

/* A comes turned (terms.h): so this is the same. */
static void gemm_tn_acc(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n, struct prefetch_cursor *cursor)
{
    (void)cursor;
    gemm_packed_acc(rows, vectors, A, a_step, B, b_step, C, c_step, n);
}
