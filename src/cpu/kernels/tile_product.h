/* The products of product.h by tile registers: C is made of squares of LANES x LANES sums, two by two of them at a time
 * in registers 0 to 3, and each step takes LANES terms. So A is read in whole squares, and C written in whole ones:
 * memory has room for them, and the terms beyond n are 0 in one operand and finite in the other. B lies in strips
 * (terms.h), b_step apart, of which a step takes LANES rows. */

#define SQUARE(C, row, column, c_step) ((C) + ((row) * (c_step) + (column)) * LANES)

/* Compilers may not know that loads of tile registers read memory. */
#define MEMORY_IS_WRITTEN() atomic_signal_fence(memory_order_seq_cst)

/* `rows` by `columns` squares of C, each 1 or 2: the sums from C, or 0; some terms of A B; and the sums to C. */
static inline __attribute__((always_inline)) void squares_load(int rows, int columns, const real *C, int64_t c_step,
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
        _tile_loadd(1, SQUARE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_loadd(2, SQUARE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_loadd(3, SQUARE(C, 1, 1, c_step), bytes);
}

/* A left operand: rows of terms, as they lie or in strips (terms.h). */
struct left {
    const term *terms;
    int64_t row, step, rows; /* from one row, LANES terms, LEFT_ROWS rows to the next */
};

static inline struct left left_of_rows(const term *A, int64_t stride)
{
    return (struct left){A, stride, LANES, LEFT_ROWS * stride};
}

static inline struct left left_of_strips(const term *A, int64_t stride)
{
    return (struct left){A, LANES, LEFT_ROWS * LANES, stride};
}

/* Loads come first: where another thread has half of the processor's buffers, it sees past fewer products. */
static inline __attribute__((always_inline)) void squares_add(int rows, int columns, struct left A, const term *B,
                                                              int64_t b_step, int64_t n)
{
    const size_t a_bytes = (size_t)A.row * sizeof(term), b_bytes = LANES * sizeof(term);
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

static inline __attribute__((always_inline)) void squares_store(int rows, int columns, real *C, int64_t c_step)
{
    const size_t bytes = (size_t)c_step * sizeof(real);
    _tile_stored(0, C, bytes);
    if (columns == 2)
        _tile_stored(1, SQUARE(C, 0, 1, c_step), bytes);
    if (rows == 2)
        _tile_stored(2, SQUARE(C, 1, 0, c_step), bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, SQUARE(C, 1, 1, c_step), bytes);
}

static inline __attribute__((always_inline)) void squares(int rows, int columns, struct left A, const term *B,
                                                          int64_t b_step, real *C, int64_t c_step, int64_t n, int add)
{
    squares_load(rows, columns, C, c_step, add);
    squares_add(rows, columns, A, B, b_step, n);
    squares_store(rows, columns, C, c_step);
}

/* Down a column of squares, so that those of B stay in the first cache, which the terms of A pass through. */
static inline __attribute__((always_inline)) void tile_product(int64_t rows, int vectors, struct left A, const term *B,
                                                               int64_t b_step, real *C, int64_t c_step, int64_t n,
                                                               int add)
{
    for (int v = 0; v < vectors; v += 2, B += 2 * b_step, C += 2 * LANES) {
        struct left a = A;
        for (int64_t r = 0; r < rows; r += LEFT_ROWS, a.terms += a.rows) {
            real *c = C + r * c_step;
            if (rows - r > LANES && v + 1 < vectors)
                squares(2, 2, a, B, b_step, c, c_step, n, add);
            else if (rows - r > LANES)
                squares(2, 1, a, B, b_step, c, c_step, n, add);
            else if (v + 1 < vectors)
                squares(1, 2, a, B, b_step, c, c_step, n, add);
            else
                squares(1, 1, a, B, b_step, c, c_step, n, add);
        }
    }
}

/* A product of two by two squares, an instruction at a time, so that other work can stand between. */
struct pieces {
    struct left A; /* of the next step, as B */
    const term *B;
    int64_t b_step;
    int64_t each, done, due; /* products of registers: of a part, times `parts`; done; to be done, likewise */
};

static inline void pieces_begin(struct pieces *s, struct left A, const term *B, int64_t b_step, int64_t n)
{
    *s = (struct pieces){A, B, b_step, 4 * padded(n) / LANES, 0, 0};
    squares_load(2, 2, NULL, 0, 0);
}

/* The next of `parts` parts. */
static inline void pieces_go_on(struct pieces *s, int parts)
{
    const size_t a_bytes = (size_t)s->A.row * sizeof(term), b_bytes = LANES * sizeof(term);
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

static void multiply_rows(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                          real *C, int64_t c_step, int64_t n, real factor, struct upcoming *upcoming)
{
    (void)upcoming; /* in whole squares there is nothing to be asked for evenly */
    tile_product(rows, vectors, left_of_rows(A, a_step), B, b_step, C, c_step, n, 0);
    if (factor == 1)
        return;
    for (int64_t r = 0; r < rows; r++)
        scale_vectors(C + r * c_step, vectors * LANES, factor);
}

static void add_strips(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step, real *C,
                       int64_t c_step, int64_t n)
{
    tile_product(rows, vectors, left_of_strips(A, a_step), B, b_step, C, c_step, n, 1);
}

static void add_rows(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step, real *C,
                     int64_t c_step, int64_t n)
{
    add_strips(rows, vectors, A, a_step, B, b_step, C, c_step, n);
}

/* A comes turned (terms.h): so this is the same. */
static void add_columns(int64_t rows, int vectors, const term *A, int64_t a_step, const term *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n, struct upcoming *upcoming)
{
    (void)upcoming;
    add_strips(rows, vectors, A, a_step, B, b_step, C, c_step, n);
}
