/* The products of fma.h by the tile registers of AMX. C is made of blocks of LANES x LANES sums, two by two of them at
 * a time in registers 0 to 3, and each step takes LANES packs of k. So A is read, and C written, in whole blocks:
 * memory has room for them, and the packs beyond k are 0 in one operand and finite in the other. */

#define BLOCK_OF(C, row, column) ((C).data + ((row) * (C).stride + (column)) * LANES)

/* Compilers may not know that loads of tile registers read memory. */
#define MEMORY_IS_WRITTEN() atomic_signal_fence(memory_order_seq_cst)

/* C = A B; C += A B. */
enum gemm_mode { GEMM_STORE, GEMM_ADD };

/* `rows` by `columns` blocks of C, each 1 or 2: the sums from C, or 0. */
static inline __attribute__((always_inline)) void amx_load_c(int rows, int columns, struct matrix C,
                                                             enum gemm_mode mode)
{
    const size_t bytes = (size_t)C.stride * sizeof(real);
    MEMORY_IS_WRITTEN();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (mode == GEMM_STORE)
        return;
    _tile_loadd(0, C.data, bytes);
    if (columns == 2)
        _tile_loadd(1, BLOCK_OF(C, 0, 1), bytes);
    if (rows == 2)
        _tile_loadd(2, BLOCK_OF(C, 1, 0), bytes);
    if (rows == 2 && columns == 2)
        _tile_loadd(3, BLOCK_OF(C, 1, 1), bytes);
}

static inline __attribute__((always_inline)) void amx_store_c(int rows, int columns, struct matrix C)
{
    const size_t bytes = (size_t)C.stride * sizeof(real);
    _tile_stored(0, C.data, bytes);
    if (columns == 2)
        _tile_stored(1, BLOCK_OF(C, 0, 1), bytes);
    if (rows == 2)
        _tile_stored(2, BLOCK_OF(C, 1, 0), bytes);
    if (rows == 2 && columns == 2)
        _tile_stored(3, BLOCK_OF(C, 1, 1), bytes);
}

/* A left operand: row-major packs, as they lie or in micropanels (layout.h). */
struct amx_a {
    const packed *data;
    int64_t row, step, rows; /* from one row, LANES packs, PACKED_A_ROWS rows to the next */
};

static inline struct amx_a amx_a_of_rows(struct kv_block A)
{
    return (struct amx_a){A.rows, A.stride, LANES, PACKED_A_ROWS * A.stride};
}

static inline struct amx_a amx_a_of_packed(const packed *A, int64_t stride)
{
    return (struct amx_a){A, LANES, PACKED_A_ROWS * LANES, stride};
}

/* Loads come first: where another thread has half of the processor's buffers, it sees past fewer products. */
static inline __attribute__((always_inline)) void amx_dot(int rows, int columns, struct amx_a A, struct packed_b B,
                                                          int64_t k)
{
    const size_t a_bytes = (size_t)A.row * sizeof(packed), b_bytes = LANES * sizeof(packed);
    for (int64_t t = 0; t < k; t += LANES, A.data += A.step, B.data += LANES * LANES) {
        _tile_loadd(4, A.data, a_bytes);
        _tile_loadd(6, B.data, b_bytes);
        if (columns == 2)
            _tile_loadd(7, B.data + B.stride, b_bytes);
        if (rows == 2)
            _tile_loadd(5, A.data + LANES * A.row, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (columns == 2)
            _tile_dpbf16ps(1, 4, 7);
        if (rows == 2)
            _tile_dpbf16ps(2, 5, 6);
        if (rows == 2 && columns == 2)
            _tile_dpbf16ps(3, 5, 7);
    }
}

static inline __attribute__((always_inline)) void amx_blocks(int rows, int columns, struct amx_a A, struct packed_b B,
                                                             struct matrix C, int64_t k, enum gemm_mode mode)
{
    amx_load_c(rows, columns, C, mode);
    amx_dot(rows, columns, A, B, k);
    amx_store_c(rows, columns, C);
}

/* Down a column of blocks, so that those of B stay in the first cache, which A passes through. */
static inline __attribute__((always_inline)) void gemm(int64_t rows, int vectors, struct amx_a A, struct packed_b B,
                                                       struct matrix C, int64_t k, enum gemm_mode mode)
{
    for (int v = 0; v < vectors; v += 2, B.data += 2 * B.stride, C.data += 2 * LANES) {
        struct amx_a a = A;
        for (int64_t r = 0; r < rows; r += PACKED_A_ROWS, a.data += a.rows) {
            const struct matrix c = matrix_from(C, r, 0);
            if (rows - r > LANES && v + 1 < vectors)
                amx_blocks(2, 2, a, B, c, k, mode);
            else if (rows - r > LANES)
                amx_blocks(2, 1, a, B, c, k, mode);
            else if (v + 1 < vectors)
                amx_blocks(1, 2, a, B, c, k, mode);
            else
                amx_blocks(1, 1, a, B, c, k, mode);
        }
    }
}

static void gemm_nn(int64_t rows, int vectors, struct kv_block A, struct packed_b B, struct matrix C, int64_t k,
                    real factor)
{
    gemm(rows, vectors, amx_a_of_rows(A), B, C, k, GEMM_STORE);
    if (factor == 1)
        return;
    for (int64_t r = 0; r < rows; r++)
        scale_vectors(C.data + r * C.stride, vectors * LANES, (double)factor);
}

static void gemm_nn_acc(int64_t rows, int vectors, struct packed_a A, struct packed_b B, struct matrix C, int64_t k)
{
    gemm(rows, vectors, amx_a_of_packed(A.data, A.stride), B, C, k, GEMM_ADD);
}

/* A comes transposed (pack_at): so this is the same. */
static void gemm_tn_acc(int64_t rows, int vectors, struct packed_at A, struct packed_b B, struct matrix C, int64_t k)
{
    gemm(rows, vectors, amx_a_of_packed(A.data, A.stride), B, C, k, GEMM_ADD);
}
