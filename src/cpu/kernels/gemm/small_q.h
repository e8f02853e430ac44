/* The two products of few queries, at most a vector of them: R = 1, 2, 4, ... or LANES, zeros in place of those that
 * there are not. A vector of S holds LANES / R numbers for each query.
 *
 *     S[key][R] = Q K^T: lanes are terms of a row; or, where queries are many, R queries by LANES / R terms: Q lies so,
 *     and as many terms of K are repeated for all queries. In the end neighbours are added, until each query has one
 *     sum for each of LANES / R keys: no lane is empty, and little is left to add up.
 *
 *     O_i += sum over k < n of P_ik V_k: lanes along columns.
 *
 * Each row of K or V is read once for all queries, strip by strip; for each line that is read, one of the next strip is
 * asked for. Of rows that are read side by side, processors find few by themselves. */

#define DECODE_ROWS LANES /* most queries, and most of backward */
#define DECODE_BACKWARD_ROWS (LANES / 2)
#define DECODE_KEYS 64    /* of a block: whole tiles and vectors in every dialect */
#define DECODE_CHUNK_BYTES 8192 /* bytes of a strip: with the next one, a part of the first-level cache */

/* Sums of a register tile: keys whose scores are computed together. */
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

/* Keys of whole tiles, and of pairs of vectors of S where terms are pairs. */
static inline int64_t decode_key_unit(int R)
{
    int64_t pairs = K_PACK * LANES / R;
    return pairs > DECODE_ACCUMULATORS ? pairs : DECODE_ACCUMULATORS;
}

static inline int64_t round_up_decode_keys(int64_t n, int R)
{
    return mfa_cpu_ceil(n, decode_key_unit(R)) * decode_key_unit(R);
}

/* Asks for the next `bytes`, a constant, by two lines: rows that are not whole pairs of lines are asked for in part. */
static inline __attribute__((always_inline)) void prefetch_lines(struct prefetch_cursor *rows, const int64_t bytes)
{
    _Pragma("GCC unroll 8") for (int64_t done = 0; done < bytes; done += 128)
    {
        __builtin_prefetch(rows->at, 0, 3);
        if (bytes - done > 64)
            __builtin_prefetch(rows->at + 64, 0, 3);
        rows->at += bytes - done < 128 ? bytes - done : 128;
        if (rows->at >= rows->end) {
            rows->at += rows->gap;
            rows->end += rows->gap + rows->bytes;
        }
    }
}

/* Asks for as much as so many terms, a constant number, are in the caller's memory. */
static inline __attribute__((always_inline)) void prefetch_packs(struct prefetch_cursor *rows, const int64_t terms)
{
    if (rows->each == (int64_t)sizeof(packed))
        prefetch_lines(rows, terms * (int64_t)sizeof(packed));
    else
        prefetch_lines(rows, terms * 2);
}

/* Whether a tile of scores has whole vectors of terms, R queries and LANES / R keys; otherwise terms are repeated. */
static inline int decode_has_whole_vectors(int R)
{
    return R == 1 || LANES / R >= 4;
}

/* Q for scores, from rows across: [terms / n][R][n], n terms of each query side by side. */
static void pack_q_small(const packed *rows, int64_t stride, int R, packed *Q)
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

/* Rows of K or V: where they lie if they are whole vectors, else a copy. */
struct kv_rows {
    const char *rows;
    int64_t step; /* bytes */
    int dtype;
};

/* Those from n up to `whole` are zeros. */
static struct kv_rows kv_rows_of(packed *copy, const void *data, int dtype, const struct mfa_strides *s, int64_t batch,
                                 int64_t head, int64_t row, int64_t n, int64_t whole, int64_t columns, int must_copy)
{
    int64_t bytes = bytes_of(dtype), stride = row_packs(columns);
    const char *from = row_at(data, bytes, s, batch, head, row);
    if (!must_copy && s->column == 1 && columns == stride * K_PACK && n == whole)
        return (struct kv_rows){from, s->row * bytes, dtype};
    for (int64_t r = 0; r < n; r++)
        load_packs(copy + r * stride, from + r * s->row * bytes, dtype, s->column, columns);
    fill(copy + n * stride, (whole - n) * stride, 0);
    return (struct kv_rows){(const char *)copy, stride * (int64_t)sizeof(packed), K_PACK > 1 ? dtype : CPU_REAL};
}

/* Unrolled, clang loads all operands first. */
#ifdef __clang__
#define ONE_BY_ONE _Pragma("nounroll")
#else
#define ONE_BY_ONE
#endif

/* LANES terms; reals, if these are reals. */
static inline __attribute__((always_inline)) vec load_widened(const char *at, int dtype)
{
    const void *from = at;
    return K_PACK > 1          ? vec_load(from)
           : dtype == CPU_F16  ? vec_load_f16(from)
           : dtype == CPU_BF16 ? vec_load_bf16(from)
                               : vec_load(from);
}

#define ROWS_1(F, n) F(0, n)
#define ROWS_2(F, n) ROWS_1(F, n) F(1, n)
#define ROWS_4(F, n) ROWS_2(F, n) F(2, n) F(3, n)
#define ROWS_8(F, n) ROWS_4(F, n) F(4, n) F(5, n) F(6, n) F(7, n)
#define ROWS_16(F, n) ROWS_8(F, n) F(8, n) F(9, n) F(10, n) F(11, n) F(12, n) F(13, n) F(14, n) F(15, n)

#define SCORE_START(k, R) ROWS_##R(START, k)
#define SCORE_QUERY(r, k) const vec q_##r = vec_load(Q + (r) * LANES);
#define SCORE(r, k) sum_##r##_##k = vec_dots(key_##k, q_##r, sum_##r##_##k);
#define SCORE_KEY(k, R)                                               \
    const vec key_##k = load_widened(K.rows + (k) * K.step, K.dtype); \
    ROWS_##R(SCORE, k)
#define SCORE_STORE(r, k) sums[(k) * queries + (r)] = sum_##r##_##k;
#define SCORE_STORE_KEY(k, R) ROWS_##R(SCORE_STORE, k)

/* Sums of R queries and G keys, lane by lane. */
/* clang-format off */
#define SCORES(R, G)                                                                                                   \
    static inline __attribute__((always_inline)) void scores_##R##x##G(const packed *Q, struct kv_rows K,      \
                                                                       int64_t columns, vec *sums, struct prefetch_cursor *next)\
    {                                                                                                                  \
        const int queries = R;                                                                                         \
        const int64_t bytes = LANES * (is_half(K.dtype) ? 2 * K_PACK : (int64_t)sizeof(packed));                       \
        struct prefetch_cursor rows = *next;                                                                           \
        UNROLL_##G(SCORE_START, R)                                                                                     \
        ONE_BY_ONE for (int64_t t = 0; t < columns; t += LANES, Q += R * LANES, K.rows += bytes) {                     \
            ROWS_##R(SCORE_QUERY, 0)                                                                                   \
            UNROLL_##G(SCORE_KEY, R)                                                                                   \
            prefetch_packs(&rows, G * LANES);                                                                          \
        }                                                                                                              \
        UNROLL_##G(SCORE_STORE_KEY, R)                                                                                 \
        *next = rows;                                                                                                  \
    }
/* clang-format on */

SCORES(1, 1)
SCORES(2, 1)
SCORES(4, 4)

/* n terms of a row of K. */
static inline __attribute__((always_inline)) vec key_load(const char *at, int n)
{
    return vec_repeat((const real *)(const void *)at, n);
}

#define KEY_GROUP(k) ((k) < 4 ? rows_0 : (k) < 8 ? rows_4 : (k) < 12 ? rows_8 : rows_12)
#define KEY_ADD(k, n) sum_##k##_0 = vec_dots(key_load(KEY_GROUP(k) + (k) % 4 * K.step, n), q, sum_##k##_0);
#define KEY_STORE(k, n) sums[k] = sum_##k##_0;

/* Sums of FEW_SUMS keys, lane by lane, n terms repeated for all queries. Four rows share a pointer that compilers do
 * not see through: one for each row would not find room in registers. */
static inline __attribute__((always_inline)) void scores_repeated(const int n, const packed *Q, struct kv_rows K,
                                                                  int64_t columns, vec *sums,
                                                                  struct prefetch_cursor *next)
{
    const int64_t bytes = n * (int64_t)sizeof(packed), four = 4 * K.step;
    const char *rows_0 = K.rows, *rows_4 = rows_0 + four, *rows_8 = rows_4 + four, *rows_12 = rows_8 + four;
    struct prefetch_cursor rows = *next;
    UNROLL_ROWS(DECODE_ACCUMULATORS, START, 0)
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
static inline __attribute__((always_inline)) void store_scores(vec *sums, int count, int lanes, real factor, real *S)
{
    for (int left = lanes; left > 1; left /= 2) {
        count /= 2;
        for (int i = 0; i < count; i++)
            sums[i] = vec_add_neighbours(sums[2 * i], sums[2 * i + 1]);
    }
    for (int i = 0; i < count; i++)
        vec_store(S + i * LANES, vec_mul(sums[i], vec_set1(factor)));
}

/* S = factor * Q K^T of FEW_SUMS keys. Memory is read fastest row after row; but where queries are many, so that
 * arithmetic takes long, several rows at once share what is loaded of Q. */
static inline __attribute__((always_inline)) void score_tile(int R, const packed *Q, struct kv_rows K, int64_t columns,
                                                             real factor, real *S, struct prefetch_cursor *next)
{
    const int n = LANES / R, together = R < 4 ? 1 : 4;
    vec sums[DECODE_ACCUMULATORS > LANES ? DECODE_ACCUMULATORS : LANES];
    if (!decode_has_whole_vectors(R)) {
        scores_repeated(n, Q, K, columns, sums, next);
        store_scores(sums, DECODE_ACCUMULATORS, n, factor, S);
        return;
    }
    for (int k = 0; k < DECODE_ACCUMULATORS; k += n, S += LANES) {
        _Pragma("GCC unroll 16") for (int i = 0; i < n; i += together, K.rows += together * K.step)
        {
            if (R == 1)
                scores_1x1(Q, K, columns, sums + i, next);
            else if (R == 2)
                scores_2x1(Q, K, columns, sums + 2 * i, next);
            else
                scores_4x4(Q, K, columns, sums + 4 * i, next);
        }
        store_scores(sums, LANES, LANES, factor, S);
    }
}

/* Whether a tile of K may lie where it does. Repeated terms are taken from all its rows in turn: these must not be
 * converted time and again, nor lie in the same set of the cache, as they do a multiple of 4096 bytes apart. */
static int reads_in_place(int R, const void *data, int dtype, const struct mfa_strides *s)
{
    int64_t step = s->row * bytes_of(dtype), bytes = sizeof(packed);
    int whole_terms = K_PACK == 1 || ((uintptr_t)data % bytes == 0 && (s->batch | s->head | s->row) % K_PACK == 0);
    return whole_terms && (decode_has_whole_vectors(R) || ((K_PACK > 1 || is_real(dtype)) && step % 4096 != 0));
}

static inline __attribute__((always_inline)) void gemm_qk_small_of(int R, const packed *Q, struct kv_rows K,
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

static void gemm_qk_small(int R, const packed *Q, struct kv_rows K, int64_t columns, real factor, real *S,
                          struct prefetch_cursor *next)
{
    if (K_PACK == 1 && K.dtype == CPU_F16)
        gemm_qk_small_of(R, Q, (struct kv_rows){K.rows, K.step, CPU_F16}, columns, factor, S, next);
    else if (K_PACK > 1 || K.dtype == CPU_BF16)
        gemm_qk_small_of(R, Q, (struct kv_rows){K.rows, K.step, CPU_BF16}, columns, factor, S, next);
    else
        gemm_qk_small_of(R, Q, (struct kv_rows){K.rows, K.step, CPU_REAL}, columns, factor, S, next);
}

/* A vector of terms down: of LANES columns of the row `at` and, where terms are pairs, of the one `step` bytes on; half
 * says which columns of two vectors of pairs these are. */
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

#define VALUE_START(n, R) ROWS_##R(START, n)
#define WEIGHT(r, n) const packed p_##r = P[r];
#define VALUE(r, n) sum_##r##_##n = vec_dot(p_##r, line_##n, sum_##r##_##n);
#define VALUE_COLUMN(n, R)                                                                          \
    vec line_##n = value_load(V.rows + (c + (n) * LANES) * bytes, pair, (half + (n)) % 2, V.dtype); \
    ROWS_##R(VALUE, n)
#define VALUE_STORE(r, n)                     \
    at = O + (r) * columns + c + (n) * LANES; \
    vec_store(at, vec_add(vec_load(at), sum_##r##_##n));
#define VALUE_STORE_COLUMN(n, R) ROWS_##R(VALUE_STORE, n)

/* O += P V for n keys and N vectors of columns. Where terms are pairs, P holds those of keys k and k + LANES / R. */
/* clang-format off */
#define VALUES_TILE(R, N)                                                                                              \
    static inline __attribute__((always_inline)) void values_##R##x##N(                                                \
        const packed *P, struct kv_rows V, int64_t n, real *O, int64_t columns, int64_t c, const int half,             \
        struct prefetch_cursor *next)                                                                                  \
    {                                                                                                                  \
        const int64_t keys = K_PACK > 1 ? LANES / R : 1, pair = keys * V.step;                                         \
        const int64_t bytes = is_half(V.dtype) ? 2 : (int64_t)sizeof(real);                                            \
        struct prefetch_cursor rows = *next;                                                                           \
        real *at;                                                                                                      \
        UNROLL_##N(VALUE_START, R)                                                                                     \
        for (int64_t k = 0; k < n; k += K_PACK * keys, V.rows += pair * (K_PACK - 1))                                  \
            ONE_BY_ONE for (int64_t i = 0; i < keys; i++, V.rows += V.step, P += R) {                                  \
                ROWS_##R(WEIGHT, N)                                                                                    \
                UNROLL_##N(VALUE_COLUMN, R)                                                                            \
                prefetch_packs(&rows, N * LANES);                                                                      \
            }                                                                                                          \
        UNROLL_##N(VALUE_STORE_COLUMN, R)                                                                              \
        *next = rows;                                                                                                  \
    }
/* clang-format on */

VALUES_TILE(1, 1)
VALUES_TILE(1, 4)
VALUES_TILE(1, 8)
VALUES_TILE(2, 1)
VALUES_TILE(2, 4)
VALUES_TILE(4, 1)
VALUES_TILE(8, 1)
VALUES_TILE(16, 1)
#if DECODE_ACCUMULATORS == 16
VALUES_TILE(2, 8)
VALUES_TILE(4, 4)
VALUES_TILE(8, 2)
#else
VALUES_TILE(4, 2)
#endif

/* All columns: tiles of N and M vectors, then of 1. */
#define VALUES(R, N, M)                                                                                       \
    static inline __attribute__((always_inline)) void values_##R(                                             \
        const packed *P, struct kv_rows V, int64_t n, int64_t columns, real *O, struct prefetch_cursor *next) \
    {                                                                                                         \
        int64_t c = 0;                                                                                        \
        for (; (N) > (M) && c + (N) * LANES <= columns; c += (N) * LANES)                                     \
            values_##R##x##N(P, V, n, O, columns, c, 0, next);                                                \
        for (; (M) > 1 && c + (M) * LANES <= columns; c += (M) * LANES)                                       \
            values_##R##x##M(P, V, n, O, columns, c, 0, next);                                                \
        for (; c < columns; c += K_PACK * LANES) {                                                            \
            values_##R##x1(P, V, n, O, columns, c, 0, next);                                                  \
            if (K_PACK > 1)                                                                                   \
                values_##R##x1(P, V, n, O, columns, c + LANES, 1, next);                                      \
        }                                                                                                     \
    }

VALUES(1, 8, 4)
#if DECODE_ACCUMULATORS == 16
VALUES(2, 8, 4)
VALUES(4, 4, 1)
VALUES(8, 2, 1)
#else
VALUES(2, 4, 1)
VALUES(4, 2, 1)
VALUES(8, 1, 1)
#endif
VALUES(16, 1, 1)

static inline __attribute__((always_inline)) void gemm_pv_small_of(int R, const packed *P, struct kv_rows V, int64_t n,
                                                                   int64_t columns, real *O,
                                                                   struct prefetch_cursor *next)
{
    if (LANES >= 16 && R == 16)
        values_16(P, V, n, columns, O, next);
    else if (LANES >= 8 && R == 8)
        values_8(P, V, n, columns, O, next);
    else if (LANES >= 4 && R == 4)
        values_4(P, V, n, columns, O, next);
    else if (R == 2)
        values_2(P, V, n, columns, O, next);
    else
        values_1(P, V, n, columns, O, next);
}

/* O += P V for n keys. */
static void gemm_pv_small(int R, const packed *P, struct kv_rows V, int64_t n, int64_t columns, real *O,
                          struct prefetch_cursor *next)
{
    if (K_PACK == 1 && V.dtype == CPU_F16)
        gemm_pv_small_of(R, P, (struct kv_rows){V.rows, V.step, CPU_F16}, n, columns, O, next);
    else if (K_PACK > 1 || V.dtype == CPU_BF16)
        gemm_pv_small_of(R, P, (struct kv_rows){V.rows, V.step, CPU_BF16}, n, columns, O, next);
    else
        gemm_pv_small_of(R, P, (struct kv_rows){V.rows, V.step, CPU_REAL}, n, columns, O, next);
}
