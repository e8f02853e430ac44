/* P = exp(S - m). m is a reference, not the maximum itself: it lags by at most SLACK, which keeps P below SLACK_EXP and
 * saves nearly all rescaling. The result is the same function.
 *
 * Column by column, where S has been computed, capped and masked; or at once, as S = K Q^T is: then the exponentials of
 * one register tile stand between the multiply-adds of the next, so that processors find work for units that
 * multiply-adds leave idle. */

#define SLACK ((real)(5.5 * S_UNIT))
#define SLACK_EXP 256

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
static vec column_exp(const real *S, int64_t n, vec m, term *P, int64_t stride)
{
    vec l[2] = {vec_set1(0), vec_set1(0)};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        vec even = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        vec odd = exp_of(vec_sub(vec_load(S + (k + 1) * PANEL), m));
        l[0] = vec_add(l[0], even);
        l[1] = vec_add(l[1], odd);
        store_down(P, stride, k, even, odd);
    }
    if (k < n) {
        vec last = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        l[0] = vec_add(l[0], last);
        store_down_last(P, stride, k, last);
    }
    return vec_add(l[0], l[1]);
}

/* l += sum; or 0, if it shows that one exceeds m + SLACK. */
static inline int add_sums(real *l, const real *sum)
{
    int exceeds = 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        exceeds |= vec_any_less(vec_set1(SLACK_EXP), vec_load(sum + v * LANES));
    if (exceeds)
        return 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        vec_store(l + v * LANES, vec_add(vec_load(l + v * LANES), vec_load(sum + v * LANES)));
    return 1;
}

/* There is an m for each lane that has seen a key: l is at least 1. */
static int all_have_seen(const real *l)
{
    int none = 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        none |= vec_any_less(vec_load(l + v * LANES), vec_set1((real)0.5));
    return !none;
}

/* P = exp(factor * K Q^T - m) for a panel of full width, terms down, and l += its sum, by tiles of keys, until one
 * exceeds m + SLACK. How many keys are done. Not inline, where the pointers of the loop would lie in memory.
 * mask[key][lane], which is added to the scores, and `upcoming` may be NULL. */
#define MULTIPLY_EXP2(name, tiles)                                                                                  \
    static __attribute__((noinline)) int64_t name(int64_t keys, const term *K, int64_t k_stride, const term *Q,     \
                                                  int64_t n, real factor, const real *mask, const real *m, real *l, \
                                                  term *P, int64_t p_stride, struct upcoming *upcoming)             \
    {                                                                                                               \
        if (upcoming && !(TILES && mask)) /* with a mask, tile registers ask for nothing */                         \
            return tiles(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, upcoming);                       \
        if (mask)                                                                                                   \
            return tiles(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, NULL);                           \
        return tiles(keys, K, k_stride, Q, n, factor, NULL, m, l, P, p_stride, NULL);                               \
    }

#if TILES
/* factor * S - m, or with what the mask adds, if there is one. */
static inline vec below_reference(const real *S, real factor, const real *mask, vec m)
{
    if (!mask)
        return vec_fma(vec_load(S), vec_set1(factor), vec_sub(vec_set1(0), m));
    return vec_sub(masked(vec_mul(vec_load(S), vec_set1(factor)), vec_load(mask)), m);
}

/* P of KEY_UNIT keys of S, times factor, and its sums. Between the exponentials stands the product S_next = K Q^T,
 * unless n is 0. */
static inline __attribute__((always_inline)) void tile_exp2(const real *S, real factor, const real *mask, const real *m,
                                                            real *sum, term *P, int64_t p_stride, const term *K,
                                                            int64_t k_stride, const term *Q, int64_t n, real *S_next,
                                                            struct upcoming *upcoming)
{
    enum { ROWS = 4, PARTS = KEY_UNIT / ROWS };
    const int64_t q_stride = stride_of(padded(n), PANEL);
    for (int pair = 0; pair < PANEL_VECTORS; pair += 2) {
        struct pieces product;
        pieces_begin(&product, left_of_rows(K, k_stride), Q + place(q_stride, 0, pair * LANES), q_stride, n);
        for (int64_t at = pair * LANES; at < (pair + 2) * LANES; at += LANES) {
            vec l[2] = {vec_set1(0), vec_set1(0)}, reference = vec_load(m + at);
            for (int part = 0; part < PARTS; part++) {
                for (int64_t k = part * ROWS; k < (part + 1) * ROWS; k += 2) {
                    const real *next = mask ? mask + k * PANEL + at : NULL, *Sk = S + k * PANEL + at;
                    vec even = vec_exp2(below_reference(Sk, factor, next, reference));
                    vec odd = vec_exp2(below_reference(Sk + PANEL, factor, next ? next + PANEL : NULL, reference));
                    l[0] = vec_add(l[0], even);
                    l[1] = vec_add(l[1], odd);
                    store_down(P + place(p_stride, 0, at), p_stride, k, even, odd);
                }
                if (upcoming)
                    ask_upcoming(upcoming, 1);
                pieces_go_on(&product, 2 * PARTS);
            }
            vec_store(sum + at, vec_add(l[0], l[1]));
        }
        if (n)
            squares_store(2, 2, S_next + pair * LANES, PANEL);
    }
}

static inline __attribute__((always_inline)) int64_t exp2_tiles(int64_t keys, const term *K, int64_t k_stride,
                                                                const term *Q, int64_t n, real factor, const real *mask,
                                                                const real *m, real *l, term *P, int64_t p_stride,
                                                                struct upcoming *upcoming)
{
    enum { R = KEY_UNIT };
    _Alignas(64) real S[2][R * PANEL], sum[PANEL];
    multiply_rows(keys < R ? 0 : R, PANEL_VECTORS, K, k_stride, Q, stride_of(padded(n), PANEL), S[0], PANEL, n, 1,
                  upcoming);
    int64_t done = 0;
    for (int turn = 0; done + R <= keys; done += R, turn = !turn) {
        tile_exp2(S[turn], factor, mask ? mask + done * PANEL : NULL, m, sum, P + place(p_stride, done / TERM, 0),
                  p_stride, K + (done + R) * k_stride, k_stride, Q, done + 2 * R <= keys ? n : 0, S[!turn], upcoming);
        if (!add_sums(l, sum))
            break;
    }
    return done;
}
MULTIPLY_EXP2(multiply_exp2, exp2_tiles)
#else
/* What is stored for the exponentials: dot products are multiplied by the factor anyway, and so m is subtracted for
 * nothing; from other products it is when P is made. */
#define LESS(r, v) vec less_##v = vec_sub(vec_set1(0), vec_load(m + (v) * LANES));
#define BELOW(r, v)                           \
    vec_store(C + (r) * c_step + (v) * LANES, \
              TERM > 1 ? vec_fma(sum_##r##_##v, vec_set1(factor), less_##v) : sum_##r##_##v);
#define BELOW_ROW(r, V) EACH_VECTOR_##V(BELOW, r)

/* The same of a first tile, which has no exponentials. */
static __attribute__((noinline)) void first_below(int64_t rows, const term *K, int64_t k_stride, const term *Q,
                                                  int64_t n, real factor, const real *m, real *S,
                                                  struct upcoming *upcoming)
{
    multiply_rows(rows, PANEL_VECTORS, K, k_stride, Q, PANEL, S, PANEL, n, factor, upcoming);
    if (TERM > 1)
        for (int64_t at = 0; at < rows * PANEL; at += LANES)
            vec_store(S + at, vec_sub(vec_load(S + at), vec_load(m + at % PANEL)));
}

/* P of some rows of a vector of S, and of what the mask adds, if there is one; adds them to l. P of reals has the mask
 * before m, for S + mask is to be rounded as it is in backward. */
static inline __attribute__((always_inline)) void exp_part(int64_t rows, const real *S, const real *mask,
                                                           const real *m, real *l, term *P)
{
    vec reference = vec_load(m), sum = vec_load(l);
    for (int64_t k = 0; k < rows; k += 2) {
        vec even = vec_load(S + k * PANEL), odd = vec_load(S + (k + 1) * PANEL);
        if (mask) {
            even = masked(even, vec_load(mask + k * PANEL));
            odd = masked(odd, vec_load(mask + (k + 1) * PANEL));
        }
        even = exp_of(TERM > 1 ? even : vec_sub(even, reference));
        odd = exp_of(TERM > 1 ? odd : vec_sub(odd, reference));
        sum = vec_add(sum, vec_add(even, odd));
        store_down(P, PANEL, k, even, odd);
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
#define EXP2_TILES(name, R, V, PART, ASKING) EXP2_TILES_(name, R, V, PART, ASKING)
#define EXP2_TILES_(name, R, V, PART, ASKING)                                                                          \
    static inline __attribute__((always_inline)) void tile_exp2_##name(                                                \
        const term *restrict A, int64_t row_step, const term *restrict B, int64_t n, real factor, real *restrict C,    \
        const real *restrict mask, const real *restrict m, real *restrict l, term *restrict P,                         \
        struct upcoming *upcoming)                                                                                     \
    {                                                                                                                  \
        const int64_t step = 1, b_step = PANEL, c_step = PANEL;                                                        \
        struct upcoming rows = {.at = NULL};                                                                           \
        if (upcoming)                                                                                                  \
            rows = *upcoming;                                                                                          \
        int64_t t = 0;                                                                                                 \
        EACH_ROW(R, START_ROW, V)                                                                                      \
        ALL_PARTS                                                                                                      \
        for (int64_t i = 0; i < R * V / PART; i++) {                                                                   \
            int64_t lane = i / (R / PART) * LANES, k = i % (R / PART) * PART, at = k * PANEL + lane;                   \
            exp_part(PART, C + at, mask ? mask + at : NULL, m + lane, l + lane, P + k / TERM * PANEL + lane);          \
            int64_t end = n * (i + 1) / (R * V / PART);                                                                \
            SUM_UP(PART_UNROLL, R, V, t, end, ASK)                                                                     \
        }                                                                                                              \
        EACH_VECTOR_##V(LESS, 0)                                                                                       \
        EACH_ROW(R, BELOW_ROW, V)                                                                                      \
        if (TERM == 1 && factor != 1)                                                                                  \
            scale_vectors(C, R * PANEL, (double)factor);                                                               \
        if (upcoming)                                                                                                  \
            *upcoming = rows;                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    static inline __attribute__((always_inline)) int64_t exp2_tiles_##name(                                            \
        int64_t keys, const term *K, int64_t k_stride, const term *Q, int64_t n, real factor, const real *mask,        \
        const real *m, real *l, term *P, int64_t p_stride, struct upcoming *upcoming)                                  \
    {                                                                                                                  \
        (void)p_stride; /* PANEL */                                                                                    \
        _Alignas(64) real S[R * PANEL];                                                                                \
        if (keys < R)                                                                                                  \
            return 0;                                                                                                  \
        first_below(R, K, k_stride, Q, n, factor, m, S, upcoming);                                                     \
        int64_t done = 0;                                                                                              \
        for (; done + R <= keys; done += R) {                                                                          \
            _Alignas(64) real sum[PANEL] = {0};                                                                        \
            int64_t next = done + 2 * R <= keys ? n : 0;                                                               \
            if (upcoming && !ASKING)                                                                                   \
                ask_at_once(upcoming, R * next);                                                                       \
            tile_exp2_##name(K + (next ? done + R : 0) * k_stride, k_stride, Q, next, factor, S,                       \
                             mask ? mask + done * PANEL : NULL, m, sum, P + done / TERM * PANEL,                       \
                             ASKING ? upcoming : NULL);                                                                \
            if (!add_sums(l, sum))                                                                                     \
                break;                                                                                                 \
        }                                                                                                              \
        return done;                                                                                                   \
    }                                                                                                                  \
    MULTIPLY_EXP2(multiply_exp2_##name, exp2_tiles_##name)
/* clang-format on */

EXP2_TILES(long, TILE_ROWS_3, PANEL_VECTORS, 4, 1)
#if SHORT_TERMS
EXP2_TILES(short, SHORT_ROWS, PANEL_VECTORS, 2, 0)
#endif

/* The same of fewer keys than a tile has. */
static __attribute__((noinline)) int64_t multiply_exp2_few(int64_t keys, const term *K, int64_t k_stride, const term *Q,
                                                           int64_t n, real factor, const real *m, real *l, term *P)
{
    _Alignas(64) real S[TILE_ROWS_3 * PANEL], sum[PANEL];
    multiply_rows(keys, PANEL_VECTORS, K, k_stride, Q, PANEL, S, PANEL, n, factor, NULL);
    for (int64_t lane = 0; lane < PANEL; lane += LANES)
        vec_store(sum + lane, column_exp(S + lane, keys, vec_load(m + lane), P + lane, PANEL));
    return add_sums(l, sum) ? keys : 0;
}

static int64_t multiply_exp2(int64_t keys, const term *K, int64_t k_stride, const term *Q, int64_t n, real factor,
                             const real *mask, const real *m, real *l, term *P, int64_t p_stride,
                             struct upcoming *upcoming)
{
    int64_t rows = TILE_ROWS_3, done;
#if SHORT_TERMS
    if (n <= SHORT_TERMS) {
        rows = SHORT_ROWS;
        done = multiply_exp2_short(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, upcoming);
    } else
#endif
        done = multiply_exp2_long(keys, K, k_stride, Q, n, factor, mask, m, l, P, p_stride, upcoming);
    int64_t left = keys - done;
    if (0 < left && left < rows && !mask)
        done += multiply_exp2_few(left, K + done * k_stride, k_stride, Q, n, factor, m, l, P + done / TERM * PANEL);
    return done;
}
#endif
