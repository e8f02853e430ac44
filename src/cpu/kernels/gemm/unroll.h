/* F(r, V) for each row r of a register tile, F(r, v) for each vector v of a row. Unrolling by macros makes accumulators
 * named variables, acc_0_0 and so on: compilers keep arrays of vectors in memory. */

#define UNROLL_1(F, V) F(0, V)
#define UNROLL_2(F, V) F(0, V) F(1, V)
#define UNROLL_4(F, V) UNROLL_2(F, V) F(2, V) F(3, V)
#define UNROLL_6(F, V) UNROLL_4(F, V) F(4, V) F(5, V)
#define UNROLL_8(F, V) UNROLL_6(F, V) F(6, V) F(7, V)
#define UNROLL_12(F, V) UNROLL_8(F, V) F(8, V) F(9, V) F(10, V) F(11, V)
#define UNROLL_16(F, V) UNROLL_12(F, V) F(12, V) F(13, V) F(14, V) F(15, V)
#define UNROLL_ROWS(R, F, V) UNROLL_ROWS_(R, F, V)
#define UNROLL_ROWS_(R, F, V) UNROLL_##R(F, V)

#define UNROLL_VECTORS_1(F, r) F(r, 0)
#define UNROLL_VECTORS_2(F, r) F(r, 0) F(r, 1)
#define UNROLL_VECTORS_3(F, r) F(r, 0) F(r, 1) F(r, 2)
#define UNROLL_VECTORS(V, F, r) UNROLL_VECTORS_(V, F, r)
#define UNROLL_VECTORS_(V, F, r) UNROLL_VECTORS_##V(F, r)
#define UNROLL_PAIRS(R, F, V) UNROLL_PAIRS_(R, F, V)
#define UNROLL_PAIRS_(R, F, V) UNROLL_PAIRS_##R(F, V)
#define UNROLL_PAIRS_2(F, V) F(0, 1, V)
#define UNROLL_PAIRS_4(F, V) UNROLL_PAIRS_2(F, V) F(2, 3, V)
#define UNROLL_PAIRS_8(F, V) UNROLL_PAIRS_4(F, V) F(4, 5, V) F(6, 7, V)
#define UNROLL_PAIRS_12(F, V) UNROLL_PAIRS_8(F, V) F(8, 9, V) F(10, 11, V)

/* Steps of a tile. Its function has A (strided_a), B, C, and pointers a and b that move along k. A tile of R rows has
 * SUM_ROWS(R) rows of accumulators, of which SUMS_TO_ROWS, after the last step, makes rows of C. */
#define ACC_ZERO(r, v) vec acc_##r##_##v = vec_set1(0);
#define ACC_ZERO_ROW(r, V) UNROLL_VECTORS_##V(ACC_ZERO, r)
#if USE_MMLA
/* Of two rows of C and a vector of columns, the first accumulator has the sums of the first two columns, 2 x 2 of them,
 * the second those of the others. */
#define SUM_ROWS(R) SUM_ROWS_(R)
#define SUM_ROWS_(R) SUM_ROWS_##R
#define SUM_ROWS_1 2
#define SUM_ROWS_2 2
#define SUM_ROWS_4 4
#define SUM_ROWS_8 8
#define SUM_ROWS_12 12
#define LOAD_B(r, v) const vec b_0_##v = vec_load(b + 2 * (v) * LANES), b_1_##v = vec_load(b + (2 * (v) + 1) * LANES);
#define ACC_DOT(r, v) acc_##r##_##v = vec_mmla(a_##r, (r) % 2 ? b_1_##v : b_0_##v, acc_##r##_##v);
#define ACC_DOT_ROW(r, V)                                \
    const vec a_##r = vec_load(a + (r) / 2 * 2 * A.row); \
    UNROLL_VECTORS_##V(ACC_DOT, r)
#define BLOCKS_TO_ROWS(even, odd, v)                              \
    {                                                             \
        const vec low = acc_##even##_##v, high = acc_##odd##_##v; \
        acc_##even##_##v = vec_blocks_low(low, high);             \
        acc_##odd##_##v = vec_blocks_high(low, high);             \
    }
#define BLOCKS_TO_ROWS_1(even, odd) BLOCKS_TO_ROWS(even, odd, 0)
#define BLOCKS_TO_ROWS_2(even, odd) BLOCKS_TO_ROWS_1(even, odd) BLOCKS_TO_ROWS(even, odd, 1)
#define BLOCKS_TO_ROWS_3(even, odd) BLOCKS_TO_ROWS_2(even, odd) BLOCKS_TO_ROWS(even, odd, 2)
#define BLOCKS_TO_ROWS_OF(even, odd, V) BLOCKS_TO_ROWS_##V(even, odd)
#define SUMS_TO_ROWS(R, V) UNROLL_PAIRS(SUM_ROWS(R), BLOCKS_TO_ROWS_OF, V)
#else
#define SUM_ROWS(R) R
#define SUMS_TO_ROWS(R, V)
#define LOAD_B(r, v) const vec b_##v = vec_load(b + (v) * LANES);
#define ACC_DOT(r, v) acc_##r##_##v = vec_dot(a_##r, b_##v, acc_##r##_##v);
#define ACC_DOT_ROW(r, V)                \
    const packed a_##r = a[(r) * A.row]; \
    UNROLL_VECTORS_##V(ACC_DOT, r)
#endif

/* acc += A B for steps t up to `end`, and `then` after each. */
#define ACCUMULATE(unroll, R, V, t, end, then)                       \
    unroll for (; t < end; t++, a += A.step, b += K_STEP * B.stride) \
    {                                                                \
        UNROLL_VECTORS(V, LOAD_B, 0)                                 \
        UNROLL_ROWS(SUM_ROWS(R), ACC_DOT_ROW, V)                     \
        then;                                                        \
    }
