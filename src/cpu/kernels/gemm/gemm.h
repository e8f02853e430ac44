/* Matrix products, by multiply-adds or by tile registers. Both give
 *
 *     gemm_nn(rows, vectors, A, B, C, k, factor)      C = factor * A B     A: a kv_block
 *     gemm_nn_acc(rows, vectors, A, B, C, k)          C += A B             A: packed_a
 *     gemm_tn_acc(rows, vectors, A, B, C, k)          C += A^T B           A: packed_at
 *
 * for `rows` rows and vectors * LANES columns of C, and k packs; layout.h says how operands lie, pack.h makes them.
 * With epilogues there are gemm_exp2 (exp2.h) and gemm_dS (dS.h), and for few queries the products of decode.h. */
#if USE_AMX
#include "cpu/kernels/gemm/amx.h"
#else
#include "cpu/kernels/gemm/fma.h"
#endif
