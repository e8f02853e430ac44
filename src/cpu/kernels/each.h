/* F for each row of a register tile, and for each vector of one: what makes its sums named variables. */

#define EACH_1(F, V) F(0, V)
#define EACH_2(F, V) F(0, V) F(1, V)
#define EACH_4(F, V) EACH_2(F, V) F(2, V) F(3, V)
#define EACH_6(F, V) EACH_4(F, V) F(4, V) F(5, V)
#define EACH_8(F, V) EACH_6(F, V) F(6, V) F(7, V)
#define EACH_12(F, V) EACH_8(F, V) F(8, V) F(9, V) F(10, V) F(11, V)
#define EACH_16(F, V) EACH_12(F, V) F(12, V) F(13, V) F(14, V) F(15, V)
#define EACH_ROW(R, F, V) EACH_ROW_(R, F, V)
#define EACH_ROW_(R, F, V) EACH_##R(F, V)

#define EACH_VECTOR_1(F, r) F(r, 0)
#define EACH_VECTOR_2(F, r) F(r, 0) F(r, 1)
#define EACH_VECTOR_3(F, r) F(r, 0) F(r, 1) F(r, 2)

#define START(r, v) vec sum_##r##_##v = vec_set1(0);
