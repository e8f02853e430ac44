/* The products of decode (decode.h) with K and V of int8 that have a scale for each row, by products of 16-bit
 * integers: twice as many in an instruction as of f32, and codes are widened by half as many instructions. Sums are
 * exact.
 *
 *     q = round(Q / q_unit), q_unit = max |Q| / 32767 of a query
 *     S[key][R] = factor * q_unit * K_scale * (q K^T)
 *     w = P * V_scale,  p = round(w / p_unit), p_unit = max |w| / 32767 of a query and n keys
 *     O_i += p_unit * sum over k < n of p_ik V_k
 *
 * Sums of 512 columns, or of 64 keys, stay below 2^31. Lanes of K are columns; V takes pairs of keys, as rows of bf16
 * do: k and k + LANES / R. */

enum {
    INT16_COLUMNS = 2 * LANES, /* of a step */
    MAX_INT16_COLUMNS = 512,
    MAX_INT16 = 32767,
};

/* What rounding Q may put a score off by, at most. Random errors are about a thirtieth of the bound that is held
 * against this: 2^-14, where rounding P to f16 is 2^-12. */
#define INT16_SCORE_ERROR 0x1p-9

/* Of Q and of scales of K: what sums of 0 are multiplied by stays finite. */
#define MAX_INT16_SIZE 0x1p60

/* Queries as integers. */
struct int16_queries {
    int32_t *rows;        /* [R][columns / 2], pairs of columns */
    real *units;          /* [LANES], of each lane of [key][R] */
    double largest_scale; /* up to which a scale of K keeps scores within INT16_SCORE_ERROR; negative: none does */
};

#if INT16_PRODUCTS
#if DECODE_ACCUMULATORS == 16
#define INT16_QUERIES 8 /* of a tile, at most */
#else
#define INT16_QUERIES 4
#endif

#define TILE gemm_qk_int16_1x4
#define QUERIES 1
#define KEYS 4
#include "cpu/kernels/gemm/decode_int16_qk_tile.h"

#define TILE gemm_qk_int16_2x4
#define QUERIES 2
#define KEYS 4
#include "cpu/kernels/gemm/decode_int16_qk_tile.h"

#if INT16_QUERIES == 8
#define TILE gemm_qk_int16_4x4
#define QUERIES 4
#define KEYS 4
#include "cpu/kernels/gemm/decode_int16_qk_tile.h"
#endif

#define TILE gemm_qk_int16_many
#define QUERIES INT16_QUERIES
#define KEYS 2
#include "cpu/kernels/gemm/decode_int16_qk_tile.h"

/* Sums of so many keys and R queries, INT16_QUERIES at a time. */
static inline __attribute__((always_inline)) void gemm_qk_int16_tile(const int R, const int32_t *Q, int64_t stride,
                                                                     struct kv_rows K, int64_t columns, vec *sums,
                                                                     struct prefetch_cursor *next)
{
    struct prefetch_cursor again = *next;
    if (R == 1)
        gemm_qk_int16_1x4(R, Q, stride, K, columns, sums, next);
    else if (R == 2)
        gemm_qk_int16_2x4(R, Q, stride, K, columns, sums, next);
#if INT16_QUERIES == 8
    else if (R == 4)
        gemm_qk_int16_4x4(R, Q, stride, K, columns, sums, next);
#endif
    else
        gemm_qk_int16_many(R, Q, stride, K, columns, sums, next);
    if (R > INT16_QUERIES)
        gemm_qk_int16_many(R, Q + INT16_QUERIES * stride, stride, K, columns, sums + INT16_QUERIES, &again);
}

static inline __attribute__((always_inline)) void gemm_qk_int16_of(const int R, const struct int16_queries *Q,
                                                                   struct kv_rows K, int64_t columns, real factor,
                                                                   real *S, struct prefetch_cursor *next)
{
    const int n = LANES / R, tile = R < INT16_QUERIES ? 4 : 2, together = n > tile ? n : tile;
    const vec units = vec_mul(vec_load(Q->units), vec_set1(factor));
    vec sums[2 * LANES];
    for (int k = 0; k < DECODE_ACCUMULATORS; k += together) {
        _Pragma("GCC unroll 4") for (int i = 0; i < together; i += tile, K.rows += tile * K.step)
            gemm_qk_int16_tile(R, Q->rows, columns / 2, K, columns, sums + i * R, next);
        _Pragma("GCC unroll 2") for (int i = 0; i < together; i += n, S += LANES, K.scales += n * K.scale_step)
            store_scores(sums + i * R, LANES, LANES, vec_mul(units, row_scales(K, 0, n, R)), 1, S);
    }
}

/* S = factor * Q K^T of DECODE_ACCUMULATORS keys, K of int8 with a scale for each row; returns 0, and does nothing,
 * where scores might be off by more than INT16_SCORE_ERROR. */
static int gemm_qk_int16(int R, const struct int16_queries *Q, struct kv_rows K, int64_t columns, real factor, real *S,
                         struct prefetch_cursor *next)
{
    int exact = 1;
    for (int64_t k = 0; k < DECODE_ACCUMULATORS; k++)
        exact &= fabs((double)K.scales[k * K.scale_step]) <= Q->largest_scale;
    if (!exact)
        return 0;
    if (LANES >= 16 && R == 16)
        gemm_qk_int16_of(16, Q, K, columns, factor, S, next);
    else if (R == 8)
        gemm_qk_int16_of(8, Q, K, columns, factor, S, next);
    else if (R == 4)
        gemm_qk_int16_of(4, Q, K, columns, factor, S, next);
    else if (R == 2)
        gemm_qk_int16_of(2, Q, K, columns, factor, S, next);
    else
        gemm_qk_int16_of(1, Q, K, columns, factor, S, next);
    return 1;
}

/* Q as integers, from R rows of reals, `stride` apart. `factor` is what their products with K are multiplied by. */
static void quantize_queries(int R, const real *rows, int64_t stride, int64_t columns, double factor,
                             struct int16_queries *Q)
{
    enum { CODE = 128 }; /* the largest */
    double worst = 0;
    int fits = 1;
    for (int r = 0; r < R; r++) {
        const real *row = rows + r * stride;
        vec off = vec_set1(0);
        const double largest = (double)max_abs(row, columns);
        fits &= all_finite(row, columns) && (largest == 0 || (largest >= 0x1p-60 && largest <= MAX_INT16_SIZE));
        const real unit = fits ? (real)(largest / MAX_INT16) : 0;
        const vec inverse = vec_set1(fits && largest > 0 ? (real)(MAX_INT16 / largest) : 0);
        for (int64_t c = 0; c < columns; c += INT16_COLUMNS) {
            /* lanes hold pairs of columns that follow one another */
            int32_t numbers[INT16_COLUMNS];
            for (int64_t i = 0; i < INT16_COLUMNS; i += LANES) {
                const vec x = vec_load(row + c + i);
                const int_vec rounded = int_of_reals(vec_mul(x, inverse));
                const vec error = vec_sub(x, vec_mul(vec_of_ints(rounded), vec_set1(unit)));
                off = vec_add(off, vec_max(error, vec_sub(vec_set1(0), error)));
                int_store(numbers + i, rounded);
            }
            for (int i = 0; i < LANES; i++)
                Q->rows[(r * columns + c) / 2 + i] =
                    (int32_t)(((uint32_t)numbers[2 * i] & 0xffff) | (uint32_t)numbers[2 * i + 1] << 16);
        }
        const double error = (double)horizontal_sum(off);
        worst = error > worst ? error : worst;
        for (int i = r; i < LANES; i += R)
            Q->units[i] = unit;
    }
    Q->largest_scale = fits ? fmin(INT16_SCORE_ERROR / (worst * CODE * fabs(factor)), MAX_INT16_SIZE) : -1;
}

#define TILE gemm_pv_int16_1x4
#define QUERIES 1
#define VECTORS 4
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

#define TILE gemm_pv_int16_1x2
#define QUERIES 1
#define VECTORS 2
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

#define TILE gemm_pv_int16_2x4
#define QUERIES 2
#define VECTORS 4
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

#define TILE gemm_pv_int16_2x2
#define QUERIES 2
#define VECTORS 2
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

#if INT16_QUERIES == 8
#define TILE gemm_pv_int16_4x4
#define QUERIES 4
#define VECTORS 4
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

#define TILE gemm_pv_int16_4x2
#define QUERIES 4
#define VECTORS 2
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"
#endif

#define TILE gemm_pv_int16_many
#define QUERIES INT16_QUERIES
#define VECTORS 2
#include "cpu/kernels/gemm/decode_int16_pv_tile.h"

/* Pairs of p from P, [key][R], and the scales of n keys; p_unit of each query. */
static void quantize_probabilities(int R, const real *P, const real *scales, int64_t n, int32_t *pairs, real *units)
{
    const int keys = LANES / R;
    real weights[DECODE_KEYS * LANES], tops[LANES];
    vec top = vec_set1(0x1p-100f); /* what is smaller counts as 0 */
    for (int64_t v = 0; v < n / keys; v++) {
        const vec w = vec_mul(vec_load(P + v * LANES), vec_spread(scales + v * keys, R));
        vec_store(weights + v * LANES, w);
        top = vec_max(top, vec_max(w, vec_sub(vec_set1(0), w)));
    }
    vec_store(tops, top);
    for (int i = R; i < LANES; i++)
        tops[i % R] = tops[i] > tops[i % R] ? tops[i] : tops[i % R];
    for (int i = R; i < LANES; i++)
        tops[i] = tops[i % R];
    vec_store(units, vec_mul(vec_load(tops), vec_set1(1 / (real)MAX_INT16)));
    const vec inverse = vec_div(vec_set1(MAX_INT16), vec_load(tops));
    for (int64_t v = 0; v < n / keys; v += 2, pairs += LANES)
        int_store(pairs, int_join(int_of_reals(vec_mul(vec_load(weights + v * LANES), inverse)),
                                  int_of_reals(vec_mul(vec_load(weights + (v + 1) * LANES), inverse))));
}

/* The scales of n rows; returns 0 where one is not finite, or where all are so small that numbers which count as 0
 * beside larger ones might not. */
static int scales_of_rows(struct kv_rows V, int64_t n, real *scales)
{
    for (int64_t k = 0; k < n; k++)
        scales[k] = (real)V.scales[k * V.scale_step];
    fill(scales + n, padded(n) - n, 0);
    const real largest = max_abs(scales, padded(n));
    return all_finite(scales, padded(n)) && (largest == 0 || largest >= (real)0x1p-60);
}

/* Columns from c on, by the tile that fills the registers best; returns how many. */
static inline __attribute__((always_inline)) int64_t gemm_pv_int16_tile(int R, const int32_t *P, const real *units,
                                                                        struct kv_rows V, int64_t n, real *O,
                                                                        int64_t columns, int64_t c,
                                                                        struct prefetch_cursor *next)
{
    struct prefetch_cursor again = *next;
    const int wide = R < INT16_QUERIES && columns - c >= 2 * INT16_COLUMNS;
    if (R == 1 && wide)
        gemm_pv_int16_1x4(1, P, units, V, n, O, columns, c, next);
    else if (R == 1)
        gemm_pv_int16_1x2(1, P, units, V, n, O, columns, c, next);
    else if (R == 2 && wide)
        gemm_pv_int16_2x4(2, P, units, V, n, O, columns, c, next);
    else if (R == 2)
        gemm_pv_int16_2x2(2, P, units, V, n, O, columns, c, next);
#if INT16_QUERIES == 8
    else if (R == 4 && wide)
        gemm_pv_int16_4x4(4, P, units, V, n, O, columns, c, next);
    else if (R == 4)
        gemm_pv_int16_4x2(4, P, units, V, n, O, columns, c, next);
#endif
    else if (R == INT16_QUERIES)
        gemm_pv_int16_many(INT16_QUERIES, P, units, V, n, O, columns, c, next);
    else {
        enum { Q = INT16_QUERIES };
        gemm_pv_int16_many(2 * Q, P, units, V, n, O, columns, c, next);
        gemm_pv_int16_many(2 * Q, P + Q, units + Q, V, n, O + Q * columns, columns, c, &again);
    }
    return wide ? 2 * INT16_COLUMNS : INT16_COLUMNS;
}

/* O += P V for n keys; returns 0, and does nothing, where rows or their number do not fit, or a number is not
 * finite. */
static int gemm_pv_int16(int R, const real *P, struct kv_rows V, int64_t n, int64_t columns, real *O,
                         struct prefetch_cursor *next)
{
    int32_t pairs[DECODE_KEYS / 2 * LANES];
    real scales[DECODE_KEYS], units[LANES];
    if (V.dtype != CPU_INT8 || !V.scaled_by_row || columns % INT16_COLUMNS != 0 || n % (2 * LANES / R) != 0 ||
        n > DECODE_KEYS || !all_finite(P, n * R) || !scales_of_rows(V, n, scales))
        return 0;
    quantize_probabilities(R, P, scales, n, pairs, units);
    for (int64_t c = 0; c < columns;)
        c += gemm_pv_int16_tile(R, pairs, units, V, n, O, columns, c, next);
    return 1;
}
#else
static int gemm_qk_int16(int R, const struct int16_queries *Q, struct kv_rows K, int64_t columns, real factor, real *S,
                         struct prefetch_cursor *next)
{
    (void)R, (void)Q, (void)K, (void)columns, (void)factor, (void)S, (void)next;
    return 0;
}

static void quantize_queries(int R, const real *rows, int64_t stride, int64_t columns, double factor,
                             struct int16_queries *Q)
{
    (void)R, (void)rows, (void)stride, (void)columns, (void)factor, (void)Q;
}

static int gemm_pv_int16(int R, const packed *P, struct kv_rows V, int64_t n, int64_t columns, real *O,
                         struct prefetch_cursor *next)
{
    (void)R, (void)P, (void)V, (void)n, (void)columns, (void)O, (void)next;
    return 0;
}
#endif
