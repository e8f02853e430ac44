/* exp2.h by multiply-adds. */

/* What is stored for the exponentials: dot products are multiplied by the factor anyway, and so m is subtracted for
 * nothing; from other products it is when P is made. This is a first tile, which has no exponentials beside it. */
static __attribute__((noinline)) void gemm_minus_m(int64_t rows, struct kv_block K, struct packed_b Q, int64_t k,
                                                   real factor, const real *m, real *S)
{
    gemm_nn(rows, PANEL_VECTORS, K, Q, (struct matrix){S, PANEL}, k, factor);
    if (K_PACK > 1)
        for (int64_t at = 0; at < rows * PANEL; at += LANES)
            vec_store(S + at, vec_sub(vec_load(S + at), vec_load(m + at % PANEL)));
}

/* P of some rows of a vector of S, [row][PANEL]; its sums are added to l. The bias of reals is added before m is
 * subtracted, for S + bias is to be rounded as it is in backward. */
static inline __attribute__((always_inline)) void exp_part(int64_t rows, const real *S, const real *bias, const real *m,
                                                           real *l, struct packed_b P)
{
    vec reference = vec_load(m), sum = vec_load(l);
    for (int64_t k = 0; k < rows; k += 2) {
        vec even = score_plus(vec_load(S + k * PANEL), bias ? bias + k * PANEL : NULL);
        vec odd = score_plus(vec_load(S + (k + 1) * PANEL), bias ? bias + (k + 1) * PANEL : NULL);
        even = exp_of(K_PACK > 1 ? even : vec_sub(even, reference));
        odd = exp_of(K_PACK > 1 ? odd : vec_sub(odd, reference));
        sum = vec_add(sum, vec_add(even, odd));
        store_b_pair(P, k, even, odd);
    }
    vec_store(l, sum);
}

#ifndef __clang__ /* which then keeps accumulators in memory */
#define ALL_PARTS _Pragma("GCC unroll 9")
#else
#define ALL_PARTS
#endif

/* Tiles of TILE_ROWS_3 keys: PART rows of a vector of exponentials before each part of the multiply-adds. */
#define TILE exp2_tile
#define TILES exp2_tiles
#define GEMM_EXP2 gemm_exp2_tiles
#define ROWS TILE_ROWS_3
#define PART 4
#define PREFETCH_IN_PRODUCT 1
#include "cpu/kernels/gemm/exp2_tile.h"

#if SHORT_K_PACKS
/* For products of few packs: there are more exponentials for each multiply-add, and they want registers. */
#define TILE exp2_tile_short
#define TILES exp2_tiles_short
#define GEMM_EXP2 gemm_exp2_tiles_short
#define ROWS SHORT_ROWS
#define PART 2
#define PREFETCH_IN_PRODUCT 0
#include "cpu/kernels/gemm/exp2_tile.h"
#endif

/* The same of fewer keys than a tile has. */
static __attribute__((noinline)) int64_t gemm_exp2_tail(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k,
                                                        struct exp2_epilogue e)
{
    _Alignas(64) real S[TILE_ROWS_3 * PANEL], sum[PANEL];
    K.next = NULL;
    gemm_nn(keys, PANEL_VECTORS, K, Q, (struct matrix){S, PANEL}, k, e.factor);
    for (int64_t lane = 0; lane < PANEL; lane += LANES)
        vec_store(sum + lane, column_exp(S + lane, keys, vec_load(e.m + lane), b_from(e.P, 0, lane)));
    return add_sums(e.l, sum) ? keys : 0;
}

/* How many keys are done: all, or up to a tile in which a score exceeds m + RESCALE_THRESHOLD. */
static int64_t gemm_exp2(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k, struct exp2_epilogue e)
{
    int64_t rows = TILE_ROWS_3, done;
#if SHORT_K_PACKS
    if (k <= SHORT_K_PACKS) {
        rows = SHORT_ROWS;
        done = gemm_exp2_tiles_short(keys, K, Q, k, e);
    } else
#endif
        done = gemm_exp2_tiles(keys, K, Q, k, e);
    const int64_t rest = keys - done;
    if (0 < rest && rest < rows && !e.bias)
        done += gemm_exp2_tail(rest, block_from(K, done), Q, k, exp2_from(e, done));
    return done;
}
