/* Products of a simdgroup's 8 rows, in registers, with a tile in threadgroup memory. Rows of a tile are padded: 16
 * bytes more than the columns, against bank conflicts. */

#define PADDED(columns) ((columns) + 16 / int(sizeof(storage))) /* a row's elements in threadgroup memory */

/* S += A B^T. A: 8 rows in registers; B: 8 * FRAGMENTS rows of a tile, of which the COLUMNS * 8 columns from `tile` on
 * are used. */
template <int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void gemm_nt(thread float2 *S, thread const storage2 *A, threadgroup const storage *tile, lane_coord at)
{
    threadgroup const storage *own = tile + at.column * STRIDE + at.row;
    UNROLL
    for (int d = 0; d < COLUMNS; d++) {
        float2 a = widen(A[d]);
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            threadgroup const storage *b = own + n * 8 * STRIDE + d * 8;
            multiply_add(S[n], a, float2{widen(b[0]), widen(b[STRIDE])});
        }
    }
}

/* O += P B. P: 8 rows in registers, as many columns as B has rows, 8 * FRAGMENTS. */
template <int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void gemm_nn(thread float2 *O, thread const float2 *P, threadgroup const storage *tile, lane_coord at)
{
    threadgroup const storage *own = tile + at.row * STRIDE + at.column;
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        UNROLL
        for (int d = 0; d < COLUMNS; d++) {
            threadgroup const storage *b = own + n * 8 * STRIDE + d * 8;
            multiply_add(O[d], P[n], widen(*(threadgroup const storage2 *)b));
        }
    }
}
