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
#define UNROLL_PAIRS(R, F) UNROLL_PAIRS_(R, F)
#define UNROLL_PAIRS_(R, F) UNROLL_PAIRS_##R(F)
#define UNROLL_PAIRS_4(F) F(0, 1) F(2, 3)
#define UNROLL_PAIRS_8(F) UNROLL_PAIRS_4(F) F(4, 5) F(6, 7)

/* Steps of a tile. Its function has A (strided_a), B, C, and pointers a and b that move along k. */
#define ACC_ZERO(r, v) vec acc_##r##_##v = vec_set1(0);
#define ACC_ZERO_ROW(r, V) UNROLL_VECTORS_##V(ACC_ZERO, r)
#define LOAD_B(r, v) const vec b_##v = vec_load(b + (v) * LANES);
#define ACC_DOT(r, v) acc_##r##_##v = vec_dot(a_##r, b_##v, acc_##r##_##v);
#define ACC_DOT_ROW(r, V)                \
    const packed a_##r = a[(r) * A.row]; \
    UNROLL_VECTORS_##V(ACC_DOT, r)

/* acc += A B for packs t up to `end`, and `then` after each. */
#define ACCUMULATE(unroll, R, V, t, end, then)              \
    unroll for (; t < end; t++, a += A.pack, b += B.stride) \
    {                                                       \
        UNROLL_VECTORS(V, LOAD_B, 0)                        \
        UNROLL_ROWS(R, ACC_DOT_ROW, V)                      \
        then;                                               \
    }
