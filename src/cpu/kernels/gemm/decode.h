/* The two products of decode, where a KV head has at most a vector of queries: R = 1, 2, 4, ... or LANES, zeros in
 * place of those that there are not. A vector of S holds LANES / R numbers for each query.
 *
 *     S[key][R] = Q K^T: lanes are packs of a row; or, where queries are many, R queries by LANES / R packs: Q lies so,
 *     and as many packs of K are repeated for all queries. In the end neighbours are added, until each query has one
 *     sum for each of LANES / R keys: no lane is empty, and little is left to add up.
 *
 *     O_i += sum over k < n of P_ik V_k: lanes along columns.
 *
 * Each row of K or V is read once for all queries, chunk by chunk; for each line that is read, one of the next chunk is
 * prefetched. Processors foresee few of the rows that are read side by side. */

#define DECODE_ROWS LANES /* most queries, and most of backward */
#define DECODE_BACKWARD_ROWS (LANES / 2)
#define DECODE_KEYS 64      /* of a block: whole tiles and vectors on every instruction set */
#define KV_CHUNK_BYTES 8192 /* of K or V: with the next one, a part of the first-level cache */

/* Accumulators of a register tile: keys whose scores are computed together. */
#ifndef DECODE_ACCUMULATORS
#define DECODE_ACCUMULATORS 8
#endif

static inline int is_half(int dtype)
{
    return dtype == CPU_F16 || dtype == CPU_BF16;
}

/* The least R for so many queries. */
static inline int decode_width(int64_t queries)
{
    int R = 1;
    while (R < queries)
        R *= 2;
    return R;
}

/* Keys of whole tiles, and of pairs of vectors of S where packs are pairs. */
static inline int64_t decode_key_unit(int R)
{
    int64_t pairs = K_PACK * LANES / R;
    return pairs > DECODE_ACCUMULATORS ? pairs : DECODE_ACCUMULATORS;
}

static inline int64_t round_up_decode_keys(int64_t n, int R)
{
    return mfa_cpu_ceil(n, decode_key_unit(R)) * decode_key_unit(R);
}

/* How many keys a product with P takes along for n: packs of pairs are whole ones. */
static inline int64_t decode_pv_keys(int64_t n, int R)
{
    return K_PACK > 1 ? round_up_decode_keys(n, R) : n;
}

/* As much as so many packs, a constant number, take in the caller's memory. */
static inline __attribute__((always_inline)) void prefetch_packs(struct prefetch_cursor *rows, const int64_t packs)
{
    if (rows->bytes_per_pack == (int64_t)sizeof(packed))
        prefetch_lines(rows, packs * (int64_t)sizeof(packed));
    else if (rows->bytes_per_pack == 2)
        prefetch_lines(rows, packs * 2);
    else
        prefetch_lines(rows, packs);
}

/* Whether a tile of scores has whole vectors of packs, R queries and LANES / R keys; otherwise packs are repeated. With
 * registers for a tile of 8 queries by 2 keys, rows of any dtype are read in place. */
#define HAS_TILE_OF_8 (K_PACK == 1 && DECODE_ACCUMULATORS == 16)

static inline int decode_has_whole_vectors(int R)
{
    return R == 1 || LANES / R >= 4 || (R == 8 && HAS_TILE_OF_8);
}

/* Q for scores, from rows of packs: [packs / n][R][n], n packs of each query side by side. */
static void pack_q_decode(const packed *rows, int64_t stride, int R, packed *Q)
{
    int n = decode_has_whole_vectors(R) ? LANES : LANES / R;
    if (R == LANES) {
        transpose(rows, stride, Q, LANES, LANES, stride);
        return;
    }
    for (int64_t t = 0; t < stride; t += n)
        for (int r = 0; r < R; r++, Q += n)
            if (n == LANES)
                vec_store(Q, vec_load(rows + r * stride + t));
            else
                memcpy(Q, rows + r * stride + t, 2 * sizeof(packed));
}

/* Rows of K or V, where they lie or copied (attention/kv_source.h). */
struct kv_rows {
    const char *rows;
    int64_t step; /* bytes */
    int dtype;
    /* Of codes that are widened in registers: the scales of the first row; from row to row, from group to group of
     * columns; the columns of a group; and the numbers of 4 bits. One scale for a whole row is left out of the products
     * with its columns: S, or P, is multiplied by it. */
    const float *scales;
    int64_t scale_step, scale_column, group;
    const float *table;
    int scaled_by_row;
};

/* --- Codes ------------------------------------------------------------------------------------ */

static inline int is_codes(int dtype)
{
    return K_PACK == 1 && dtype > CPU_CODES;
}

static inline int is_nibbles(int dtype)
{
    return dtype == CPU_INT4 || dtype == CPU_NF4;
}

/* Columns that are widened in one step: a block, if columns share bytes. */
static inline int64_t codes_step(int dtype)
{
    return is_nibbles(dtype) ? MFA_KV_BLOCK : LANES;
}

/* What the codes of a group of a row are widened with, if not with the scale of the whole row, which is left out: their
 * scale; or that times the numbers of 4 bits. */
struct code_group {
    vec scale;
    struct code_table table;
};

/* That of row k, of a group whose scales begin at `column`. */
static inline __attribute__((always_inline)) struct code_group code_group_at(struct kv_rows rows, int64_t k,
                                                                             int64_t column)
{
    const real scale = rows.scaled_by_row ? 1 : (real)rows.scales[k * rows.scale_step + column];
    return (struct code_group){vec_set1(scale), vec_code_table(rows.table, scale)};
}

/* LANES numbers of a row from column t on; of a block of 4-bit codes its vector i. Where the row's scale is left out,
 * code_unit is, too. */
static inline __attribute__((always_inline)) vec codes_at(struct kv_rows rows, const char *row, int64_t t, int i,
                                                          struct code_group group)
{
    enum { HALF = MFA_KV_BLOCK / 2 };
    const uint8_t *from = (const uint8_t *)row;
    if (is_nibbles(rows.dtype))
        return vec_load_nibbles(from + t / MFA_KV_BLOCK * HALF + i * LANES % HALF, i * LANES / HALF % 2, group.table);
    return rows.scaled_by_row ? load_part(from + t, rows.dtype) : vec_mul(load_code(from + t, rows.dtype), group.scale);
}

/* The scales of n rows from row k on, LANES / R at the most, as factors of a vector of [key][R]; 1 past them. */
static inline __attribute__((always_inline)) vec row_scales(struct kv_rows rows, int64_t k, int64_t n, int R)
{
    float scales[LANES];
    if (rows.scale_step == 1 && n >= LANES / R)
        return vec_spread(rows.scales + k, R);
    for (int i = 0; i < LANES / R; i++)
        scales[i] = i < n ? rows.scales[(k + i) * rows.scale_step] : 1;
    return vec_spread(scales, R);
}

/* As much as so many columns of codes take. */
static inline __attribute__((always_inline)) void prefetch_codes(struct prefetch_cursor *rows, int dtype,
                                                                 const int64_t columns)
{
    prefetch_lines(rows, is_nibbles(dtype) ? columns / 2 : columns);
}

/* P or dS, vectors of [key][R], as packs: in place; with pairs, those of keys k and k + LANES / R in `to`, which may be
 * the same memory. */
static inline packed *decode_pack(real *P, int64_t vectors, packed *to)
{
#if K_PACK == 1
    (void)vectors, (void)to;
    return P;
#else
    for (int64_t v = 0; v < vectors; v += K_PACK)
        vec_store(to + v / K_PACK * LANES, vec_pair(vec_load(P + v * LANES), vec_load(P + (v + 1) * LANES)));
    return to;
#endif
}

/* Unrolled, clang loads all operands first. */
#ifdef __clang__
#define ONE_BY_ONE _Pragma("nounroll")
#else
#define ONE_BY_ONE
#endif

/* LANES packs; of reals, widened from the dtype. */
static inline __attribute__((always_inline)) vec load_widened(const char *at, int dtype)
{
    const void *from = at;
    return K_PACK > 1          ? vec_load(from)
           : dtype == CPU_F16  ? vec_load_f16(from)
           : dtype == CPU_BF16 ? vec_load_bf16(from)
                               : vec_load(from);
}

/* As UNROLL_ROWS, for the inner of two. */
#define UNROLL_QUERIES(R, F, n) UNROLL_QUERIES_(R, F, n)
#define UNROLL_QUERIES_(R, F, n) ROWS_##R(F, n)
#define ROWS_1(F, n) F(0, n)
#define ROWS_2(F, n) ROWS_1(F, n) F(1, n)
#define ROWS_4(F, n) ROWS_2(F, n) F(2, n) F(3, n)
#define ROWS_8(F, n) ROWS_4(F, n) F(4, n) F(5, n) F(6, n) F(7, n)
#define ROWS_16(F, n) ROWS_8(F, n) F(8, n) F(9, n) F(10, n) F(11, n) F(12, n) F(13, n) F(14, n) F(15, n)

#define TILE gemm_qk_1x1
#define QUERIES 1
#define KEYS 1
#include "cpu/kernels/gemm/decode_qk_tile.h"

#define TILE gemm_qk_2x1
#define QUERIES 2
#define KEYS 1
#include "cpu/kernels/gemm/decode_qk_tile.h"

#define TILE gemm_qk_4x4
#define QUERIES 4
#define KEYS 4
#include "cpu/kernels/gemm/decode_qk_tile.h"

#define TILE gemm_qk_8x2
#define QUERIES 8
#define KEYS 2
#include "cpu/kernels/gemm/decode_qk_tile.h"

/* n packs of a row of K. */
static inline __attribute__((always_inline)) vec key_load(const char *at, int n)
{
    return vec_repeat((const real *)(const void *)at, n);
}

#define KEY_GROUP(k) ((k) < 4 ? rows_0 : (k) < 8 ? rows_4 : (k) < 12 ? rows_8 : rows_12)
#define KEY_ADD(k, n) acc_##k##_0 = vec_dots(key_load(KEY_GROUP(k) + (k) % 4 * K.step, n), q, acc_##k##_0);
#define KEY_STORE(k, n) sums[k] = acc_##k##_0;

/* Sums of DECODE_ACCUMULATORS keys, lane by lane, n packs repeated for all queries. Four rows share a pointer that
 * compilers do not see through: one for each row would not find room in registers. */
static inline __attribute__((always_inline)) void scores_repeated(const int n, const packed *Q, struct kv_rows K,
                                                                  int64_t columns, vec *sums,
                                                                  struct prefetch_cursor *next)
{
    const int64_t bytes = n * (int64_t)sizeof(packed), four = 4 * K.step;
    const char *rows_0 = K.rows, *rows_4 = rows_0 + four, *rows_8 = rows_4 + four, *rows_12 = rows_8 + four;
    struct prefetch_cursor rows = *next;
    UNROLL_ROWS(DECODE_ACCUMULATORS, ACC_ZERO, 0)
    for (int64_t t = 0; t < columns; t += n, Q += LANES) {
        vec q = vec_load(Q);
        UNROLL_ROWS(DECODE_ACCUMULATORS, KEY_ADD, n)
        rows_0 += bytes, rows_4 += bytes, rows_8 += bytes, rows_12 += bytes;
        __asm__("" : "+r"(rows_0), "+r"(rows_4), "+r"(rows_8), "+r"(rows_12));
        prefetch_packs(&rows, DECODE_ACCUMULATORS * n);
    }
    UNROLL_ROWS(DECODE_ACCUMULATORS, KEY_STORE, n)
    *next = rows;
}

/* S of keys whose sums are next to each other: adds neighbours until each sum is that of `lanes` lanes. */
static inline __attribute__((always_inline)) void store_scores(vec *sums, int count, int lanes, vec factor,
                                                               const real unit, real *S)
{
    for (int left = lanes; left > 1; left /= 2) {
        count /= 2;
        for (int i = 0; i < count; i++)
            sums[i] = vec_add_neighbours(sums[2 * i], sums[2 * i + 1]);
    }
    for (int i = 0; i < count; i++)
        vec_store(S + i * LANES,
                  unit != 1 ? vec_mul(vec_mul(sums[i], factor), vec_set1(unit)) : vec_mul(sums[i], factor));
}

/* S = factor * Q K^T of DECODE_ACCUMULATORS keys. Memory is read fastest row after row; but where queries are many, so
 * that arithmetic takes long, several rows at once share what is loaded of Q. */
static inline __attribute__((always_inline)) void score_tile(int R, const packed *Q, struct kv_rows K, int64_t columns,
                                                             real factor, real *S, struct prefetch_cursor *next)
{
    const int n = LANES / R, together = R < 4 ? 1 : R < 8 ? 4 : 2;
    vec sums[DECODE_ACCUMULATORS > LANES ? DECODE_ACCUMULATORS : LANES];
    if (!decode_has_whole_vectors(R)) {
        scores_repeated(n, Q, K, columns, sums, next);
        store_scores(sums, DECODE_ACCUMULATORS, n, vec_set1(factor), 1, S);
        return;
    }
    for (int k = 0; k < DECODE_ACCUMULATORS; k += n, S += LANES) {
        vec all = vec_set1(factor);
        real unit = 1;
        if (is_codes(K.dtype) && K.scaled_by_row) {
            all = vec_mul(all, row_scales(K, 0, n, R));
            unit = code_unit(K.dtype);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < n; i += together, K.rows += together * K.step)
        {
            if (R == 1)
                gemm_qk_1x1(Q, K, columns, sums + i, next);
            else if (R == 2)
                gemm_qk_2x1(Q, K, columns, sums + 2 * i, next);
            else if (R == 4)
                gemm_qk_4x4(Q, K, columns, sums + 4 * i, next);
            else
                gemm_qk_8x2(Q, K, columns, sums + 8 * i, next);
            if (is_codes(K.dtype))
                K.scales += together * K.scale_step;
        }
        store_scores(sums, LANES, LANES, all, unit, S);
    }
}

/* Whether a tile of K may lie where it does. Repeated packs are taken from all its rows in turn: these must not be
 * converted time and again, nor lie in the same set of the cache, as they do a multiple of 4096 bytes apart. */
static int decode_reads_in_place(int R, const void *data, int dtype, const struct mfa_strides *s)
{
    int64_t step = s->row * bytes_of(dtype), bytes = sizeof(packed);
    int whole_packs = K_PACK == 1 || ((uintptr_t)data % bytes == 0 && (s->batch | s->head | s->row) % K_PACK == 0);
    return whole_packs && (decode_has_whole_vectors(R) || ((K_PACK > 1 || is_real(dtype)) && step % 4096 != 0));
}

static inline __attribute__((always_inline)) void gemm_qk_decode_of(int R, const packed *Q, struct kv_rows K,
                                                                    int64_t columns, real factor, real *S,
                                                                    struct prefetch_cursor *next)
{
    if (LANES >= 16 && R == 16)
        score_tile(16, Q, K, columns, factor, S, next);
    else if (LANES >= 8 && R == 8)
        score_tile(8, Q, K, columns, factor, S, next);
    else if (LANES >= 4 && R == 4)
        score_tile(4, Q, K, columns, factor, S, next);
    else if (R == 2)
        score_tile(2, Q, K, columns, factor, S, next);
    else
        score_tile(1, Q, K, columns, factor, S, next);
}

/* The same rows; where constants are given, the compiler knows their dtype, and how codes are scaled. */
static inline __attribute__((always_inline)) struct kv_rows rows_of_dtype(struct kv_rows rows, const int dtype)
{
    rows.dtype = dtype;
    return rows;
}

static inline __attribute__((always_inline)) struct kv_rows rows_of_codes(struct kv_rows rows, const int dtype,
                                                                          const int scaled_by_row)
{
    rows.dtype = dtype;
    rows.scaled_by_row = scaled_by_row;
    return rows;
}

/* product(rows), where the compiler knows their dtype, and how codes are scaled. */
#define BY_DTYPE(product, rows)                        \
    if (sizeof(real) == sizeof(double))                \
        product(rows_of_dtype(rows, CPU_REAL));        \
    else if (K_PACK > 1 || (rows).dtype == CPU_BF16)   \
        product(rows_of_dtype(rows, CPU_BF16));        \
    else if ((rows).dtype == CPU_F16)                  \
        product(rows_of_dtype(rows, CPU_F16));         \
    else if (!WIDENS_CODES || !is_codes((rows).dtype)) \
        product(rows_of_dtype(rows, CPU_REAL));        \
    else if ((rows).scaled_by_row)                     \
        BY_CODES(product, rows, 1)                     \
    else                                               \
        BY_CODES(product, rows, 0)

#define BY_CODES(product, rows, by_row)                                   \
    switch ((rows).dtype) {                                               \
    case CPU_INT8: product(rows_of_codes(rows, CPU_INT8, by_row)); break; \
    case CPU_E4M3: product(rows_of_codes(rows, CPU_E4M3, by_row)); break; \
    case CPU_E5M2: product(rows_of_codes(rows, CPU_E5M2, by_row)); break; \
    default: product(rows_of_codes(rows, CPU_INT4, by_row));              \
    }

static void gemm_qk_decode(int R, const packed *Q, struct kv_rows K, int64_t columns, real factor, real *S,
                           struct prefetch_cursor *next)
{
#define QK(rows) gemm_qk_decode_of(R, Q, rows, columns, factor, S, next)
    BY_DTYPE(QK, K)
#undef QK
}

/* A vector of k-interleaved packs: of LANES columns of the row `at` and, where packs are pairs, of the one `step` bytes
 * on; half says which columns of two vectors of pairs these are. */
static inline __attribute__((always_inline)) vec value_load(const char *at, int64_t step, int half, int dtype)
{
#if K_PACK == 1
    (void)step, (void)half;
    return load_widened(at, dtype);
#else
    (void)dtype;
    at -= half * LANES * 2;
    vec even = vec_load((const real *)(const void *)at), odd = vec_load((const real *)(const void *)(at + step));
    return half ? vec_zip_high(even, odd) : vec_zip_low(even, odd);
#endif
}

/* Register tiles of so many queries by vectors of columns. */
#define TILE gemm_pv_1x1
#define QUERIES 1
#define VECTORS 1
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_1x4
#define QUERIES 1
#define VECTORS 4
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_1x8
#define QUERIES 1
#define VECTORS 8
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_2x1
#define QUERIES 2
#define VECTORS 1
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_2x4
#define QUERIES 2
#define VECTORS 4
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_4x1
#define QUERIES 4
#define VECTORS 1
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_8x1
#define QUERIES 8
#define VECTORS 1
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_16x1
#define QUERIES 16
#define VECTORS 1
#include "cpu/kernels/gemm/decode_pv_tile.h"

#if DECODE_ACCUMULATORS == 16
#define TILE gemm_pv_2x8
#define QUERIES 2
#define VECTORS 8
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_4x4
#define QUERIES 4
#define VECTORS 4
#include "cpu/kernels/gemm/decode_pv_tile.h"

#define TILE gemm_pv_8x2
#define QUERIES 8
#define VECTORS 2
#include "cpu/kernels/gemm/decode_pv_tile.h"

#else
#define TILE gemm_pv_4x2
#define QUERIES 4
#define VECTORS 2
#include "cpu/kernels/gemm/decode_pv_tile.h"

#endif

/* All columns, by the tiles that fill the registers best. */
#define COLUMNS gemm_pv_1
#define WIDE_TILE gemm_pv_1x8
#define WIDE 8
#define MIDDLE_TILE gemm_pv_1x4
#define MIDDLE 4
#define NARROW_TILE gemm_pv_1x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#if DECODE_ACCUMULATORS == 16
#define COLUMNS gemm_pv_2
#define WIDE_TILE gemm_pv_2x8
#define WIDE 8
#define MIDDLE_TILE gemm_pv_2x4
#define MIDDLE 4
#define NARROW_TILE gemm_pv_2x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#define COLUMNS gemm_pv_4
#define WIDE_TILE gemm_pv_4x4
#define WIDE 4
#define MIDDLE_TILE gemm_pv_4x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_4x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#define COLUMNS gemm_pv_8
#define WIDE_TILE gemm_pv_8x2
#define WIDE 2
#define MIDDLE_TILE gemm_pv_8x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_8x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#else
#define COLUMNS gemm_pv_2
#define WIDE_TILE gemm_pv_2x4
#define WIDE 4
#define MIDDLE_TILE gemm_pv_2x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_2x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#define COLUMNS gemm_pv_4
#define WIDE_TILE gemm_pv_4x2
#define WIDE 2
#define MIDDLE_TILE gemm_pv_4x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_4x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#define COLUMNS gemm_pv_8
#define WIDE_TILE gemm_pv_8x1
#define WIDE 1
#define MIDDLE_TILE gemm_pv_8x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_8x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

#endif

#define COLUMNS gemm_pv_16
#define WIDE_TILE gemm_pv_16x1
#define WIDE 1
#define MIDDLE_TILE gemm_pv_16x1
#define MIDDLE 1
#define NARROW_TILE gemm_pv_16x1
#include "cpu/kernels/gemm/decode_pv_columns.h"

static inline __attribute__((always_inline)) void gemm_pv_decode_of(int R, const packed *P, struct kv_rows V, int64_t n,
                                                                    int64_t columns, real *O,
                                                                    struct prefetch_cursor *next)
{
    if (LANES >= 16 && R == 16)
        gemm_pv_16(P, V, n, columns, O, next);
    else if (LANES >= 8 && R == 8)
        gemm_pv_8(P, V, n, columns, O, next);
    else if (LANES >= 4 && R == 4)
        gemm_pv_4(P, V, n, columns, O, next);
    else if (R == 2)
        gemm_pv_2(P, V, n, columns, O, next);
    else
        gemm_pv_1(P, V, n, columns, O, next);
}

/* P, [key][R], times the scales of n rows of V. Where that is infinite, O will not be finite. */
static void scale_probabilities(int R, struct kv_rows V, int64_t n, real *P)
{
    const vec unit = vec_set1(code_unit(V.dtype));
    for (int64_t k = 0; k < n; k += LANES / R, P += LANES)
        vec_store(P, vec_mul(vec_mul(vec_load(P), row_scales(V, k, n - k, R)), unit));
}

/* O += P V for n keys. */
static void gemm_pv_decode(int R, const packed *P, struct kv_rows V, int64_t n, int64_t columns, real *O,
                           struct prefetch_cursor *next)
{
#define PV(rows) gemm_pv_decode_of(R, P, rows, n, columns, O, next)
    BY_DTYPE(PV, V)
#undef PV
}
