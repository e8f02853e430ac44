/* P = exp(S - m). m is a reference, not the maximum itself: it lags by at most SLACK, which keeps P below SLACK_EXP and
 * saves nearly all rescaling. The result is the same function.
 *
 * Column by column, where S has been computed, capped and masked; or at once, as S = K Q^T is: then the exponentials of
 * one register tile stand between the multiply-adds of the next, so that processors find work for units that
 * multiply-adds leave idle. */

#define RESCALE_THRESHOLD ((real)(5.5 * S_UNIT))
#define RESCALE_THRESHOLD_EXP 256

/* The largest of a column of n vectors. Four at a time, since one depends on the one before. */
static vec column_max(const real *S, int64_t n)
{
    vec m[4];
    for (int i = 0; i < 4; i++)
        m[i] = vec_set1(-(real)INFINITY);
    int64_t k = 0;
    for (; k + 4 <= n; k += 4, S += 4 * PANEL)
        for (int i = 0; i < 4; i++)
            m[i] = vec_max(m[i], vec_load(S + i * PANEL));
    for (; k < n; k++, S += PANEL)
        m[0] = vec_max(m[0], vec_load(S));
    return vec_max(vec_max(m[0], m[1]), vec_max(m[2], m[3]));
}

/* P = exp(S - m), terms down, in the place of S or before it; its sum. */
static vec column_exp(const real *S, int64_t n, vec m, packed *P, int64_t stride)
{
    vec l[2] = {vec_set1(0), vec_set1(0)};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        vec even = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        vec odd = exp_of(vec_sub(vec_load(S + (k + 1) * PANEL), m));
        l[0] = vec_add(l[0], even);
        l[1] = vec_add(l[1], odd);
        store_b_pair(P, stride, k, even, odd);
    }
    if (k < n) {
        vec last = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        l[0] = vec_add(l[0], last);
        store_b_last(P, stride, k, last);
    }
    return vec_add(l[0], l[1]);
}

/* l += sum; or 0, if it shows that one exceeds m + SLACK. */
static inline int add_sums(real *l, const real *sum)
{
    int exceeds = 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        exceeds |= vec_any_less(vec_set1(RESCALE_THRESHOLD_EXP), vec_load(sum + v * LANES));
    if (exceeds)
        return 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        vec_store(l + v * LANES, vec_add(vec_load(l + v * LANES), vec_load(sum + v * LANES)));
    return 1;
}

/* There is an m for each lane that has seen a key: l is at least 1. */
static int all_have_max(const real *l)
{
    int none = 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        none |= vec_any_less(vec_load(l + v * LANES), vec_set1((real)0.5));
    return !none;
}

/* P = exp(factor * K Q^T - m) for a panel of full width, terms down, and l += its sum, by tiles of keys, until one
 * exceeds m + SLACK. How many keys are done. Not inline, where the pointers of the loop would lie in memory.
 * mask[key][lane], which is added to the scores, and `upcoming` may be NULL. */
#define DEFINE_GEMM_EXP2(name, tiles)                                                                               \
    static __attribute__((noinline)) int64_t name(int64_t keys, const packed *K, int64_t k_stride, const packed *Q, \
                                                  int64_t n, real factor, const real *mask, const real *m, real *l, \
                                                  packed *P, int64_t p_stride, struct prefetch_cursor *cursor)      \
    {                                                                                                               \
        if (cursor && !(USE_AMX && mask)) /* with a mask, tile registers ask for nothing */                         \
            return tiles(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, cursor);                         \
        if (mask)                                                                                                   \
            return tiles(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, NULL);                           \
        return tiles(keys, K, k_stride, Q, n, factor, NULL, m, l, P, p_stride, NULL);                               \
    }

#if USE_AMX
/* factor * S - m, or with what the mask adds, if there is one. */
static inline vec minus_reference(const real *S, real factor, const real *mask, vec m)
{
    if (!mask)
        return vec_fma(vec_load(S), vec_set1(factor), vec_sub(vec_set1(0), m));
    return vec_sub(add_mask(vec_mul(vec_load(S), vec_set1(factor)), vec_load(mask)), m);
}

/* P of KEY_UNIT keys of S, times factor, and its sums. Between the exponentials stands the product S_next = K Q^T,
 * unless n is 0. */
static inline __attribute__((always_inline)) void tile_exp2(const real *S, real factor, const real *mask, const real *m,
                                                            real *sum, packed *P, int64_t p_stride, const packed *K,
                                                            int64_t k_stride, const packed *Q, int64_t n, real *S_next,
                                                            struct prefetch_cursor *cursor)
{
    enum { ROWS = 4, PARTS = KEY_UNIT / ROWS };
    const int64_t q_stride = packed_b_stride(padded(n), PANEL);
    for (int pair = 0; pair < PANEL_VECTORS; pair += 2) {
        struct gemm_steps product;
        gemm_steps_begin(&product, a_of_rows(K, k_stride), Q + packed_b_index(q_stride, 0, pair * LANES), q_stride, n);
        for (int64_t at = pair * LANES; at < (pair + 2) * LANES; at += LANES) {
            vec l[2] = {vec_set1(0), vec_set1(0)}, reference = vec_load(m + at);
            for (int part = 0; part < PARTS; part++) {
                for (int64_t k = part * ROWS; k < (part + 1) * ROWS; k += 2) {
                    const real *next = mask ? mask + k * PANEL + at : NULL, *Sk = S + k * PANEL + at;
                    vec even = vec_exp2(minus_reference(Sk, factor, next, reference));
                    vec odd = vec_exp2(minus_reference(Sk + PANEL, factor, next ? next + PANEL : NULL, reference));
                    l[0] = vec_add(l[0], even);
                    l[1] = vec_add(l[1], odd);
                    store_b_pair(P + packed_b_index(p_stride, 0, at), p_stride, k, even, odd);
                }
                if (cursor)
                    prefetch_next(cursor, 1);
                gemm_step(&product, 2 * PARTS);
            }
            vec_store(sum + at, vec_add(l[0], l[1]));
        }
        if (n)
            amx_store_c(2, 2, S_next + pair * LANES, PANEL);
    }
}

static inline __attribute__((always_inline)) int64_t exp2_tiles(int64_t keys, const packed *K, int64_t k_stride,
                                                                const packed *Q, int64_t n, real factor,
                                                                const real *mask, const real *m, real *l, packed *P,
                                                                int64_t p_stride, struct prefetch_cursor *cursor)
{
    enum { R = KEY_UNIT };
    _Alignas(64) real S[2][R * PANEL], sum[PANEL];
    gemm_nn(keys < R ? 0 : R, PANEL_VECTORS, K, k_stride, Q, packed_b_stride(padded(n), PANEL), S[0], PANEL, n, 1,
            cursor);
    int64_t done = 0;
    for (int turn = 0; done + R <= keys; done += R, turn = !turn) {
        tile_exp2(S[turn], factor, mask ? mask + done * PANEL : NULL, m, sum,
                  P + packed_b_index(p_stride, done / K_PACK, 0), p_stride, K + (done + R) * k_stride, k_stride, Q,
                  done + 2 * R <= keys ? n : 0, S[!turn], cursor);
        if (!add_sums(l, sum))
            break;
    }
    return done;
}
DEFINE_GEMM_EXP2(gemm_exp2, exp2_tiles)
#else
/* What is stored for the exponentials: dot products are multiplied by the factor anyway, and so m is subtracted for
 * nothing; from other products it is when P is made. */
#define LESS(r, v) vec less_##v = vec_sub(vec_set1(0), vec_load(m + (v) * LANES));
#define BELOW(r, v)                           \
    vec_store(C + (r) * c_step + (v) * LANES, \
              K_PACK > 1 ? vec_fma(sum_##r##_##v, vec_set1(factor), less_##v) : sum_##r##_##v);
#define BELOW_ROW(r, V) UNROLL_VECTORS_##V(BELOW, r)

/* The same of a first tile, which has no exponentials. */
static __attribute__((noinline)) void first_below(int64_t rows, const packed *K, int64_t k_stride, const packed *Q,
                                                  int64_t n, real factor, const real *m, real *S,
                                                  struct prefetch_cursor *cursor)
{
    gemm_nn(rows, PANEL_VECTORS, K, k_stride, Q, PANEL, S, PANEL, n, factor, cursor);
    if (K_PACK > 1)
        for (int64_t at = 0; at < rows * PANEL; at += LANES)
            vec_store(S + at, vec_sub(vec_load(S + at), vec_load(m + at % PANEL)));
}

/* P of some rows of a vector of S, and of what the mask adds, if there is one; adds them to l. P of reals has the mask
 * before m, for S + mask is to be rounded as it is in backward. */
static inline __attribute__((always_inline)) void exp_part(int64_t rows, const real *S, const real *mask, const real *m,
                                                           real *l, packed *P)
{
    vec reference = vec_load(m), sum = vec_load(l);
    for (int64_t k = 0; k < rows; k += 2) {
        vec even = vec_load(S + k * PANEL), odd = vec_load(S + (k + 1) * PANEL);
        if (mask) {
            even = add_mask(even, vec_load(mask + k * PANEL));
            odd = add_mask(odd, vec_load(mask + (k + 1) * PANEL));
        }
        even = exp_of(K_PACK > 1 ? even : vec_sub(even, reference));
        odd = exp_of(K_PACK > 1 ? odd : vec_sub(odd, reference));
        sum = vec_add(sum, vec_add(even, odd));
        store_b_pair(P, PANEL, k, even, odd);
    }
    vec_store(l, sum);
}

#ifndef __clang__ /* which then keeps sums in memory */
#define ALL_PARTS _Pragma("GCC unroll 9")
#else
#define ALL_PARTS
#endif

/* clang-format off */
/* P and its sums l of a tile of S, in whose place the next is then stored: R rows of K times Q. PART rows of a vector
 * of exponentials come before each part of the multiply-adds. Then the same for many tiles, which ask for memory in
 * their products (ASKING) or, where these are short, before them. */
#define EXP2_TILES(name, R, V, PART, PREFETCHING) EXP2_TILES_(name, R, V, PART, PREFETCHING)
#define EXP2_TILES_(name, R, V, PART, PREFETCHING)                                                                          \
    static inline __attribute__((always_inline)) void tile_exp2_##name(                                                \
        const packed *restrict A, int64_t row_step, const packed *restrict B, int64_t n, real factor, real *restrict C,    \
        const real *restrict mask, const real *restrict m, real *restrict l, packed *restrict P,                         \
        struct prefetch_cursor *cursor)                                                                                     \
    {                                                                                                                  \
        const int64_t step = 1, b_step = PANEL, c_step = PANEL;                                                        \
        struct prefetch_cursor rows = {.at = NULL};                                                                           \
        if (cursor)                                                                                                  \
            rows = *cursor;                                                                                          \
        int64_t t = 0;                                                                                                 \
        UNROLL_ROWS(R, START_ROW, V)                                                                                      \
        ALL_PARTS                                                                                                      \
        for (int64_t i = 0; i < R * V / PART; i++) {                                                                   \
            int64_t lane = i / (R / PART) * LANES, k = i % (R / PART) * PART, at = k * PANEL + lane;                   \
            exp_part(PART, C + at, mask ? mask + at : NULL, m + lane, l + lane, P + k / K_PACK * PANEL + lane);          \
            int64_t end = n * (i + 1) / (R * V / PART);                                                                \
            ACCUMULATE(PART_UNROLL, R, V, t, end, PREFETCH)                                                                     \
        }                                                                                                              \
        UNROLL_VECTORS_##V(LESS, 0)                                                                                       \
        UNROLL_ROWS(R, BELOW_ROW, V)                                                                                      \
        if (K_PACK == 1 && factor != 1)                                                                                  \
            scale_vectors(C, R * PANEL, (double)factor);                                                               \
        if (cursor)                                                                                                  \
            *cursor = rows;                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    static inline __attribute__((always_inline)) int64_t exp2_tiles_##name(                                            \
        int64_t keys, const packed *K, int64_t k_stride, const packed *Q, int64_t n, real factor, const real *mask,        \
        const real *m, real *l, packed *P, int64_t p_stride, struct prefetch_cursor *cursor)                                  \
    {                                                                                                                  \
        (void)p_stride; /* PANEL */                                                                                    \
        _Alignas(64) real S[R * PANEL];                                                                                \
        if (keys < R)                                                                                                  \
            return 0;                                                                                                  \
        first_below(R, K, k_stride, Q, n, factor, m, S, cursor);                                                     \
        int64_t done = 0;                                                                                              \
        for (; done + R <= keys; done += R) {                                                                          \
            _Alignas(64) real sum[PANEL] = {0};                                                                        \
            int64_t next = done + 2 * R <= keys ? n : 0;                                                               \
            if (cursor && !PREFETCHING)                                                                                   \
                prefetch_all(cursor, R * next);                                                                       \
            tile_exp2_##name(K + (next ? done + R : 0) * k_stride, k_stride, Q, next, factor, S,                       \
                             mask ? mask + done * PANEL : NULL, m, sum, P + done / K_PACK * PANEL,                       \
                             PREFETCHING ? cursor : NULL);                                                                \
            if (!add_sums(l, sum))                                                                                     \
                break;                                                                                                 \
        }                                                                                                              \
        return done;                                                                                                   \
    }                                                                                                                  \
    DEFINE_GEMM_EXP2(gemm_exp2_##name, exp2_tiles_##name)
/* clang-format on */

EXP2_TILES(long, TILE_ROWS_3, PANEL_VECTORS, 4, 1)
#if SHORT_K_PACKS
EXP2_TILES(short, SHORT_ROWS, PANEL_VECTORS, 2, 0)
#endif

/* The same of fewer keys than a tile has. */
static __attribute__((noinline)) int64_t gemm_exp2_tail(int64_t keys, const packed *K, int64_t k_stride,
                                                        const packed *Q, int64_t n, real factor, const real *m, real *l,
                                                        packed *P)
{
    _Alignas(64) real S[TILE_ROWS_3 * PANEL], sum[PANEL];
    gemm_nn(keys, PANEL_VECTORS, K, k_stride, Q, PANEL, S, PANEL, n, factor, NULL);
    for (int64_t lane = 0; lane < PANEL; lane += LANES)
        vec_store(sum + lane, column_exp(S + lane, keys, vec_load(m + lane), P + lane, PANEL));
    return add_sums(l, sum) ? keys : 0;
}

static int64_t gemm_exp2(int64_t keys, const packed *K, int64_t k_stride, const packed *Q, int64_t n, real factor,
                         const real *mask, const real *m, real *l, packed *P, int64_t p_stride,
                         struct prefetch_cursor *cursor)
{
    int64_t rows = TILE_ROWS_3, done;
#if SHORT_K_PACKS
    if (n <= SHORT_K_PACKS) {
        rows = SHORT_ROWS;
        done = gemm_exp2_short(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, cursor);
    } else
#endif
        done = gemm_exp2_long(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, cursor);
    int64_t left = keys - done;
    if (0 < left && left < rows && !mask)
        done += gemm_exp2_tail(left, K + done * k_stride, k_stride, Q, n, factor, m, l, P + done / K_PACK * PANEL);
    return done;
}
#endif
