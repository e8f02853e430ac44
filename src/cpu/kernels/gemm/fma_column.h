/* Template of fma.h: COLUMN, all rows of C, as many vectors wide as its tiles. */

static inline __attribute__((always_inline)) void COLUMN(int64_t rows, struct strided_a A, struct packed_b B,
                                                         struct matrix C, int64_t k, enum gemm_mode mode,
                                                         struct gemm_extra extra)
{
    for (; rows >= TALL_ROWS; rows -= TALL_ROWS, A.data += TALL_ROWS * A.row, C.data += TALL_ROWS * C.stride)
        TALL_TILE(A, B, C, k, mode, extra);
    for (; rows >= 4; rows -= 4, A.data += 4 * A.row, C.data += 4 * C.stride)
        TILE_4(A, B, C, k, mode, extra);
#if USE_MMLA
    for (; rows >= 2; rows -= 2, A.data += 2 * A.row, C.data += 2 * C.stride)
        TILE_2(A, B, C, k, mode, extra);
#endif
    for (; rows > 0; rows--, A.data += A.row, C.data += C.stride)
        TILE_1(A, B, C, k, mode, extra);
}

#undef COLUMN
#undef TALL_ROWS
#undef TALL_TILE
#undef TILE_4
#undef TILE_2
#undef TILE_1
