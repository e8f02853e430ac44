/* The matrix product that all the work is made of:
 *
 *     C[r][v] (+)= sum over t < n of A[r * row_step + t * step] * B[t * b_step + v]
 *
 * with lanes along v, A and B of terms (terms.h). A is read one term at a time and broadcast: along its rows
 * (step = 1) in S^T = K Q^T, dP^T = V dO^T, dV = P^T dO, dK = dS^T Q; down its columns (row_step = 1) in
 * O^T = V^T P^T and dQ = dS K. A register tile is R rows by V vectors. The sums are named variables, made by
 * macros: compilers keep arrays of vectors in memory. What is added to C is summed up on its own first: the error of
 * a sum grows with its length, and long sequences make long ones. Meanwhile C, which may be far away, is fetched. */

#define FETCH(r, v) __builtin_prefetch(C + (r) * c_step + (v) * LANES, 1);
#define ADD(r, v) sum_##r##_##v = vec_dot(a_##r, b_##v, sum_##r##_##v);
#define STORE(r, v)                                                                       \
    if (add)                                                                              \
        sum_##r##_##v = vec_add(vec_load(C + (r) * c_step + (v) * LANES), sum_##r##_##v); \
    else if (K_PACK > 1)                                                                  \
        sum_##r##_##v = vec_mul(sum_##r##_##v, vec_set1(factor));                         \
    vec_store(C + (r) * c_step + (v) * LANES, sum_##r##_##v);
#define LOAD_B(r, v) vec b_##v = vec_load(B + (v) * LANES);
#define START_ROW(r, V) UNROLL_VECTORS_##V(START, r)
#define FETCH_ROW(r, V) UNROLL_VECTORS_##V(FETCH, r)
#define ADD_ROW(r, V)                 \
    packed a_##r = A[(r) * row_step]; \
    UNROLL_VECTORS_##V(ADD, r)
#define STORE_ROW(r, V) UNROLL_VECTORS_##V(STORE, r)

#ifndef TILE_UNROLL
#define TILE_UNROLL
#define PART_UNROLL
#endif

#ifndef SHORT_K_PACKS
#define SHORT_K_PACKS 0
#endif

/* clang-format off */
/* Steps t to `end`, and after each of them `then`. Before it, clang would load all operands first. */
#define ACCUMULATE(unroll, R, V, t, end, then)                                                                             \
    unroll                                                                                                             \
    for (; t < end; t++, A += step, B += b_step) {                                                                     \
        UNROLL_VECTORS_##V(LOAD_B, 0)                                                                                     \
        UNROLL_ROWS(R, ADD_ROW, V)                                                                                        \
        then(R)                                                                                                        \
    }
#define PREFETCH(R)                                                                                                         \
    if (cursor)                                                                                                      \
        prefetch_next(&rows, R);
#define NO_PREFETCH(R)

#define TILE(R, V) TILE_(R, V)
#define TILE_(R, V)                                                                                                    \
    static inline __attribute__((always_inline)) void tile_##R##x##V(                                                  \
        const packed *restrict A, int64_t row_step, int64_t step, const packed *restrict B, int64_t b_step,                \
        real *restrict C, int64_t c_step, int64_t n, int add, real factor, struct prefetch_cursor *cursor)                  \
    {                                                                                                                  \
        struct prefetch_cursor rows = {.at = NULL};                                                                           \
        if (cursor)                                                                                                  \
            rows = *cursor;                                                                                          \
        int64_t t = 0;                                                                                                 \
        if (add) {                                                                                                     \
            UNROLL_ROWS(R, FETCH_ROW, V)                                                                                  \
        }                                                                                                              \
        UNROLL_ROWS(R, START_ROW, V)                                                                                      \
        ACCUMULATE(TILE_UNROLL, R, V, t, n, PREFETCH)                                                                           \
        UNROLL_ROWS(R, STORE_ROW, V)                                                                                      \
        if (cursor)                                                                                                  \
            *cursor = rows;                                                                                          \
    }
/* clang-format on */

/* All rows of C, V vectors wide: tiles of R rows, then of 4, then single rows. */
#define COLUMN(R, V) COLUMN_(R, V)
#define COLUMN_(R, V)                                                                                     \
    static inline __attribute__((always_inline)) void column_##V(                                         \
        int64_t rows, const packed *restrict A, int64_t row_step, int64_t step, const packed *restrict B, \
        int64_t b_step, real *restrict C, int64_t c_step, int64_t n, int add, real factor,                \
        struct prefetch_cursor *cursor)                                                                   \
    {                                                                                                     \
        for (; rows >= R; rows -= R, A += R * row_step, C += R * c_step)                                  \
            tile_##R##x##V(A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);              \
        for (; rows >= 4; rows -= 4, A += 4 * row_step, C += 4 * c_step)                                  \
            tile_4x##V(A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);                  \
        for (; rows > 0; rows--, A += row_step, C += c_step)                                              \
            tile_1x##V(A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);                  \
    }

TILE(1, 1)
TILE(1, 2)
TILE(1, 3)
TILE(4, 1)
TILE(4, 2)
TILE(4, 3)
#if TILE_ROWS_3 != 4
TILE(TILE_ROWS_3, 3)
#endif
#if TILE_ROWS_2 != 4
TILE(TILE_ROWS_2, 2)
#endif
TILE(TILE_ROWS_1, 1)
COLUMN(TILE_ROWS_3, 3)
COLUMN(TILE_ROWS_2, 2)
COLUMN(TILE_ROWS_1, 1)

/* C is rows x (vectors * LANES); add: 0 overwrites C, 1 adds to it. */
static inline __attribute__((always_inline)) void product(int64_t rows, int vectors, const packed *restrict A,
                                                          int64_t row_step, int64_t step, const packed *restrict B,
                                                          int64_t b_step, real *restrict C, int64_t c_step, int64_t n,
                                                          int add, real factor, struct prefetch_cursor *cursor)
{
    while (vectors > 0) {
        int width = vectors == 4 ? 2 : vectors < 3 ? vectors : 3;
        if (width == 3)
            column_3(rows, A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);
        else if (width == 2)
            column_2(rows, A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);
        else
            column_1(rows, A, row_step, step, B, b_step, C, c_step, n, add, factor, cursor);
        vectors -= width, B += width * LANES, C += width * LANES;
    }
}

/* A along its rows, a_step apart: C = factor * A B. Tiles multiply where terms are pairs; a factor of reals is hardly
 * ever other than 1. `upcoming` may be NULL. */
static void gemm_nn(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                    real *C, int64_t c_step, int64_t n, real factor, struct prefetch_cursor *cursor)
{
    if (cursor)
        product(rows, vectors, A, a_step, 1, B, b_step, C, c_step, n, 0, factor, cursor);
    else
        product(rows, vectors, A, a_step, 1, B, b_step, C, c_step, n, 0, factor, NULL);
    for (int64_t r = 0; r < rows && K_PACK == 1 && factor != 1; r++)
        scale_vectors(C + r * c_step, vectors * LANES, (double)factor);
}

/* C += A B. */
static void gemm_nn_acc(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n)
{
    product(rows, vectors, A, a_step, 1, B, b_step, C, c_step, n, 1, 1, NULL);
}

/* A down its columns, rows of A a_step apart: C += A^T B. `upcoming` may be NULL. */
static void gemm_tn_acc(int64_t rows, int vectors, const packed *A, int64_t a_step, const packed *B, int64_t b_step,
                        real *C, int64_t c_step, int64_t n, struct prefetch_cursor *cursor)
{
    if (cursor)
        product(rows, vectors, A, 1, a_step, B, b_step, C, c_step, n, 1, 1, cursor);
    else
        product(rows, vectors, A, 1, a_step, B, b_step, C, c_step, n, 1, 1, NULL);
}
