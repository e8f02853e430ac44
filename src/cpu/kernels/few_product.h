/* The two products of few queries, at most a vector of them: R = 1, 2, 4, ... or LANES, zeros in place of those that
 * there are not. A vector holds LANES / R numbers for each query.
 *
 *     S[key][R] = Q K^T: lanes are R queries by LANES / R terms of a row. Q lies so, and as many terms of K are
 *     repeated for all queries. In the end neighbours are added, until each query has one sum for each of LANES / R
 *     keys: no lane is empty, and little is left to add up where queries are many.
 *
 *     O_i += sum over k < n of P_ik V_k: lanes along columns.
 *
 * Each row of K or V is read once for all queries; for each that is read, one is asked for that comes later. */

#define FEW_ROWS LANES /* most queries, and most of backward */
#define FEW_BACKWARD_ROWS (LANES / 2)
#define FEW_KEYS 64    /* of a block: whole tiles and vectors in every dialect */
#define FEW_AHEAD 64   /* keys between those in use and those asked for */

/* Sums of a register tile: keys whose scores are computed together. */
#ifndef FEW_SUMS
#define FEW_SUMS 8
#endif

static inline int is_half(int dtype)
{
    return dtype == CPU_F16 || dtype == CPU_BF16;
}

/* The least R for so many queries. */
static inline int few_width(int64_t queries)
{
    int R = 1;
    while (R < queries)
        R *= 2;
    return R;
}

/* Keys of n in whole tiles, and in pairs of vectors of S where terms are pairs. */
static inline int64_t few_whole(int64_t n, int R)
{
    int64_t pairs = TERM * LANES / R, unit = pairs > FEW_SUMS ? pairs : FEW_SUMS;
    return mfa_cpu_ceil(n, unit) * unit;
}

/* Asks for the next `bytes`, a constant, by two lines: rows that are not whole pairs of lines are asked for in part. */
static inline __attribute__((always_inline)) void ask_lines(struct upcoming *rows, const int64_t bytes)
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
static inline __attribute__((always_inline)) void few_ask(struct upcoming *rows, const int64_t terms)
{
    if (rows->each == (int64_t)sizeof(term))
        ask_lines(rows, terms * (int64_t)sizeof(term));
    else
        ask_lines(rows, terms * 2);
}

/* Q for scores: [terms / (LANES / R)][R][LANES / R], from rows across. */
static void few_pack(const term *rows, int64_t stride, int R, term *Q)
{
    int n = LANES / R;
    if (R == LANES) {
        transpose(rows, stride, Q, LANES, LANES, stride);
        return;
    }
    for (int64_t t = 0; t < stride; t += n)
        for (int r = 0; r < R; r++, Q += n)
            if (n % 4 == 0)
                for (int i = 0; i < n; i += 4)
                    memcpy(Q + i, rows + r * stride + t + i, 4 * sizeof(term));
            else
                memcpy(Q, rows + r * stride + t, 2 * sizeof(term));
}

/* Rows of K or V: where they lie if they are whole vectors, else a copy. */
struct lines {
    const char *rows;
    int64_t step; /* bytes */
    int dtype;
};

/* Those from n up to `whole` are zeros. */
static struct lines lines_of(term *copy, const void *data, int dtype, const struct mfa_strides *s, int64_t batch,
                             int64_t head, int64_t row, int64_t n, int64_t whole, int64_t columns, int must_copy)
{
    int64_t bytes = bytes_of(dtype), stride = across_stride(columns);
    const char *from = row_at(data, bytes, s, batch, head, row);
    if (!must_copy && s->column == 1 && columns == stride * TERM && n == whole)
        return (struct lines){from, s->row * bytes, dtype};
    for (int64_t r = 0; r < n; r++)
        load_terms(copy + r * stride, from + r * s->row * bytes, dtype, s->column, columns);
    fill(copy + n * stride, (whole - n) * stride, 0);
    return (struct lines){(const char *)copy, stride * (int64_t)sizeof(term), TERM > 1 ? dtype : CPU_REAL};
}

/* LANES numbers as reals. */
static inline __attribute__((always_inline)) vec line_load(const char *at, int dtype)
{
    const void *from = at;
    return dtype == CPU_F16 ? vec_load_f16(from) : dtype == CPU_BF16 ? vec_load_bf16(from) : vec_load(from);
}

/* n terms of a row of K. */
static inline __attribute__((always_inline)) vec key_load(const char *at, int n, int dtype)
{
    return TERM == 1 && n == LANES ? line_load(at, dtype) : vec_repeat((const real *)(const void *)at, n);
}

#define KEY_GROUP(k) ((k) < 4 ? rows_0 : (k) < 8 ? rows_4 : (k) < 12 ? rows_8 : rows_12)
#define KEY_ADD(k, n) sum_##k##_0 = vec_dots(key_load(KEY_GROUP(k) + (k) % 4 * K.step, n, K.dtype), q, sum_##k##_0);
#define KEY_STORE(k, n) sums[k] = sum_##k##_0;

/* Sums of G keys, lane by lane. Four rows share a pointer that compilers do not see through: one for each row would not
 * find room in registers. */
#define KEYS(G) KEYS_(G)
#define KEYS_(G)                                                                                                  \
    static inline __attribute__((always_inline)) void keys_##G(const int n, const term *Q, struct lines K,        \
                                                               int64_t columns, vec *sums, struct upcoming *next) \
    {                                                                                                             \
        const int64_t bytes = n * (is_half(K.dtype) ? 2 * TERM : (int64_t)sizeof(term)), four = 4 * K.step;       \
        const char *rows_0 = K.rows, *rows_4 = rows_0 + four, *rows_8 = rows_4 + four, *rows_12 = rows_8 + four;  \
        struct upcoming rows = *next;                                                                             \
        EACH_ROW(G, START, 0)                                                                                     \
        for (int64_t t = 0; t < columns; t += n, Q += LANES) {                                                    \
            vec q = vec_load(Q);                                                                                  \
            EACH_ROW(G, KEY_ADD, n)                                                                               \
            rows_0 += bytes, rows_4 += bytes, rows_8 += bytes, rows_12 += bytes;                                  \
            __asm__("" : "+r"(rows_0), "+r"(rows_4), "+r"(rows_8), "+r"(rows_12));                                \
            few_ask(&rows, G *n);                                                                                 \
        }                                                                                                         \
        EACH_ROW(G, KEY_STORE, n)                                                                                 \
        *next = rows;                                                                                             \
    }

KEYS(1)
KEYS(4)
KEYS(FEW_SUMS)
#define keys_all(n, Q, K, columns, sums, next) KEYS_ALL(FEW_SUMS)(n, Q, K, columns, sums, next)
#define KEYS_ALL(G) KEYS_ALL_(G)
#define KEYS_ALL_(G) keys_##G

/* S = factor * Q K^T of FEW_SUMS keys. Memory is read fastest row after row; but where queries are many, as many rows
 * at once are wanted as hide the latency of a multiply-add. */
static inline __attribute__((always_inline)) void score_tile(int R, const term *Q, struct lines K, int64_t columns,
                                                             real factor, real *S, struct upcoming *next)
{
    const int n = LANES / R, together = R == 1 ? 1 : n >= 4 ? 4 : FEW_SUMS;
    vec sums[FEW_SUMS];
    _Pragma("GCC unroll 16") for (int k = 0; k < FEW_SUMS;
                                  k += together, K.rows += together * K.step) if (together == 1)
        keys_1(n, Q, K, columns, sums + k, next);
    else if (together == 4) keys_4(n, Q, K, columns, sums + k, next);
    else keys_all(n, Q, K, columns, sums + k, next);
    int count = FEW_SUMS;
    for (int left = n; left > 1; left /= 2) {
        count /= 2;
        for (int i = 0; i < count; i++)
            sums[i] = vec_add_neighbours(sums[2 * i], sums[2 * i + 1]);
    }
    for (int i = 0; i < count; i++)
        vec_store(S + i * LANES, TERM > 1 ? vec_mul(sums[i], vec_set1(factor)) : sums[i]);
}

/* Whether a tile of K may lie where it does. Several queries take terms from all its rows in turn: these must not be
 * converted time and again, nor lie in the same set of the cache, as they do a multiple of 4096 bytes apart. */
static int few_reads(int R, const void *data, int dtype, const struct mfa_strides *s)
{
    int64_t step = s->row * bytes_of(dtype), bytes = sizeof(term);
    int whole_terms = TERM == 1 || ((uintptr_t)data % bytes == 0 && (s->batch | s->head | s->row) % TERM == 0);
    return whole_terms && (R == 1 || ((TERM > 1 || is_real(dtype)) && step % 4096 != 0));
}

static void few_scores(int R, const term *Q, struct lines K, int64_t columns, real factor, real *S,
                       struct upcoming *next)
{
    struct lines terms = {K.rows, K.step, TERM > 1 ? CPU_BF16 : CPU_REAL};
    if (LANES >= 16 && R == 16)
        score_tile(16, Q, terms, columns, factor, S, next);
    else if (LANES >= 8 && R == 8)
        score_tile(8, Q, terms, columns, factor, S, next);
    else if (LANES >= 4 && R == 4)
        score_tile(4, Q, terms, columns, factor, S, next);
    else if (R == 2)
        score_tile(2, Q, terms, columns, factor, S, next);
    else if (TERM == 1 && K.dtype == CPU_F16)
        score_tile(1, Q, (struct lines){K.rows, K.step, CPU_F16}, columns, factor, S, next);
    else if (TERM == 1 && K.dtype == CPU_BF16)
        score_tile(1, Q, (struct lines){K.rows, K.step, CPU_BF16}, columns, factor, S, next);
    else
        score_tile(1, Q, terms, columns, factor, S, next);
}

/* A vector of terms down: of LANES columns of the row `at` and, where terms are pairs, of the one `step` bytes on; half
 * says which columns of two vectors of pairs these are. */
static inline __attribute__((always_inline)) vec value_load(const char *at, int64_t step, int half, int dtype)
{
#if TERM == 1
    (void)step, (void)half;
    return line_load(at, dtype);
#else
    real pairs[2 * LANES];
    (void)dtype;
    at -= half * LANES * 2;
    vec_zip(vec_load((const real *)(const void *)at), vec_load((const real *)(const void *)(at + step)), pairs,
            pairs + LANES);
    return vec_load(pairs + half * LANES);
#endif
}

#define ROWS_1(F, n) F(0, n)
#define ROWS_2(F, n) ROWS_1(F, n) F(1, n)
#define ROWS_4(F, n) ROWS_2(F, n) F(2, n) F(3, n)
#define ROWS_8(F, n) ROWS_4(F, n) F(4, n) F(5, n) F(6, n) F(7, n)
#define ROWS_16(F, n) ROWS_8(F, n) F(8, n) F(9, n) F(10, n) F(11, n) F(12, n) F(13, n) F(14, n) F(15, n)

#define VALUE_START(n, R) ROWS_##R(START, n)
#define WEIGHT(r, n) const term p_##r = P[r];
#define VALUE(r, n) sum_##r##_##n = vec_dot(p_##r, line_##n, sum_##r##_##n);
#define VALUE_COLUMN(n, R)                                                                          \
    vec line_##n = value_load(V.rows + (c + (n) * LANES) * bytes, pair, (half + (n)) % 2, V.dtype); \
    ROWS_##R(VALUE, n)
#define VALUE_STORE(r, n)                     \
    at = O + (r) * columns + c + (n) * LANES; \
    vec_store(at, vec_add(vec_load(at), sum_##r##_##n));
#define VALUE_STORE_COLUMN(n, R) ROWS_##R(VALUE_STORE, n)

/* Unrolled, clang loads all operands first. */
#ifdef __clang__
#define ONE_BY_ONE _Pragma("nounroll")
#else
#define ONE_BY_ONE
#endif

/* O += P V for n keys and N vectors of columns. Where terms are pairs, P holds those of keys k and k + LANES / R. */
/* clang-format off */
#define VALUES_TILE(R, N)                                                                                              \
    static inline __attribute__((always_inline)) void values_##R##x##N(                                                \
        const term *P, struct lines V, int64_t n, real *O, int64_t columns, int64_t c, int half, struct upcoming *next)\
    {                                                                                                                  \
        const int64_t keys = TERM > 1 ? LANES / R : 1, pair = keys * V.step;                                           \
        const int64_t bytes = is_half(V.dtype) ? 2 : (int64_t)sizeof(real);                                            \
        struct upcoming rows = *next;                                                                                  \
        real *at;                                                                                                      \
        EACH_##N(VALUE_START, R)                                                                                       \
        for (int64_t k = 0; k < n; k += TERM * keys, V.rows += pair * (TERM - 1))                                      \
            ONE_BY_ONE for (int64_t i = 0; i < keys; i++, V.rows += V.step, P += R) {                                  \
                ROWS_##R(WEIGHT, N)                                                                                    \
                EACH_##N(VALUE_COLUMN, R)                                                                              \
                few_ask(&rows, N * LANES);                                                                             \
            }                                                                                                          \
        EACH_##N(VALUE_STORE_COLUMN, R)                                                                                \
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
#if FEW_SUMS == 16
VALUES_TILE(2, 8)
VALUES_TILE(4, 4)
VALUES_TILE(8, 2)
#else
VALUES_TILE(4, 2)
#endif

/* All columns: tiles of N and M vectors, then of 1. */
#define VALUES(R, N, M)                                                                                           \
    static inline __attribute__((always_inline)) void values_##R(const term *P, struct lines V, int64_t n,        \
                                                                 int64_t columns, real *O, struct upcoming *next) \
    {                                                                                                             \
        int64_t c = 0;                                                                                            \
        for (; (N) > (M) && c + (N) * LANES <= columns; c += (N) * LANES)                                         \
            values_##R##x##N(P, V, n, O, columns, c, 0, next);                                                    \
        for (; (M) > 1 && c + (M) * LANES <= columns; c += (M) * LANES)                                           \
            values_##R##x##M(P, V, n, O, columns, c, 0, next);                                                    \
        for (; c < columns; c += TERM * LANES)                                                                    \
            for (int half = 0; half < TERM; half++)                                                               \
                values_##R##x1(P, V, n, O, columns, c + half * LANES, half, next);                                \
    }

VALUES(1, 8, 4)
#if FEW_SUMS == 16
VALUES(2, 8, 4)
VALUES(4, 4, 1)
VALUES(8, 2, 1)
#else
VALUES(2, 4, 1)
VALUES(4, 2, 1)
VALUES(8, 1, 1)
#endif
VALUES(16, 1, 1)

static inline __attribute__((always_inline)) void few_values(int R, const term *P, struct lines V, int64_t n,
                                                             int64_t columns, real *O, struct upcoming *next)
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
static void few_outputs(int R, const term *P, struct lines V, int64_t n, int64_t columns, real *O,
                        struct upcoming *next)
{
    if (TERM == 1 && V.dtype == CPU_F16)
        few_values(R, P, (struct lines){V.rows, V.step, CPU_F16}, n, columns, O, next);
    else if (TERM > 1 || V.dtype == CPU_BF16)
        few_values(R, P, (struct lines){V.rows, V.step, CPU_BF16}, n, columns, O, next);
    else
        few_values(R, P, (struct lines){V.rows, V.step, CPU_REAL}, n, columns, O, next);
}
