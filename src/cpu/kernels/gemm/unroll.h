/* F for each row of a register tile, and for each vector of one: what makes its sums named variables. */

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

#define START(r, v) vec sum_##r##_##v = vec_set1(0);
