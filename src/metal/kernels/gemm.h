/* Products of a simdgroup's rows, in registers, with a tile in threadgroup memory. A simdgroup has 8 * ROWS rows: each
 * fragment of the tile is loaded once for all of them.
 *
 * A tile has its rows in pairs: the elements (r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1), for even r and c, lie next
 * to each other. So what a lane needs of two fragments of B^T is one load: the sum over columns does not depend on
 * their order, and the columns 2 i of 16 make one fragment, 2 i + 1 the next. A has them in the same order
 * (load_row_paired). A pair of rows is 32 bytes longer than its elements, against bank conflicts. */

#define PAIR_STRIDE(columns) (2 * (columns) + 32 / int(sizeof(tile_element))) /* from a pair of rows to the next */

/* Where row `row` of a tile begins, and column `column` of it; both are even. */
#define TILE_ROW(row, columns) ((row) / 2 * PAIR_STRIDE(columns))
#define TILE_COLUMN(column) (2 * (column))

/* S += A B^T. A: COLUMNS fragments for each of ROWS; B: 8 * FRAGMENTS rows of a tile, of which the COLUMNS * 8 columns
 * from `tile` on are used. */
template <int ROWS, int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void gemm_nt(thread float2 *S, thread const storage2 *A, threadgroup const tile_element *tile, lane_coord at)
{
    threadgroup const tile_element *own = tile + at.column / 2 * STRIDE + at.row * 4;
    UNROLL
    for (int d = 0; d + 1 < COLUMNS; d += 2) {
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            tile_element4 b = *(threadgroup const tile_element4 *)(own + n * 4 * STRIDE + TILE_COLUMN(d * 8));
            float2 even = float2{widen(b[0]), widen(b[2])}, odd = float2{widen(b[1]), widen(b[3])};
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                multiply_add(S[r * FRAGMENTS + n], widen(A[r * COLUMNS + d]), even);
                multiply_add(S[r * FRAGMENTS + n], widen(A[r * COLUMNS + d + 1]), odd);
            }
        }
    }
    if (COLUMNS % 2 == 1) { /* the last fragment has its columns in their own order */
        constexpr int d = COLUMNS - 1;
        own = tile + at.column / 2 * STRIDE + TILE_COLUMN(d * 8) + at.row / 2 * 4 + at.row % 2;
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            float2 b = float2{widen(own[n * 4 * STRIDE]), widen(own[n * 4 * STRIDE + 2])};
            UNROLL
            for (int r = 0; r < ROWS; r++)
                multiply_add(S[r * FRAGMENTS + n], widen(A[r * COLUMNS + d]), b);
        }
    }
}

/* O += P B. P: FRAGMENTS fragments for each of ROWS, as many columns as B has rows. */
template <int ROWS, int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void gemm_nn(thread float2 *O, thread const float2 *P, threadgroup const tile_element *tile, lane_coord at)
{
    threadgroup const tile_element *own = tile + at.row / 2 * STRIDE + at.row % 2 * 2 + TILE_COLUMN(at.column);
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        UNROLL
        for (int d = 0; d < COLUMNS; d++) {
            float2 b = widen(*(threadgroup const tile_element2 *)(own + n * 4 * STRIDE + TILE_COLUMN(d * 8)));
            UNROLL
            for (int r = 0; r < ROWS; r++)
                multiply_add(O[r * COLUMNS + d], P[r * FRAGMENTS + n], b);
        }
    }
}
