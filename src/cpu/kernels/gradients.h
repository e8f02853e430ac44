/* P = exp(S - L) and dS = P * (dP - D): a vector of them; and of whole tiles at once, where nothing else is done to
 * the scores. There, as in softmax.h, the exponentials stand between multiply-adds: those of S = K Q^T between those of
 * dP = V dO^T.
 *
 * S is what forward rounded. Its error, which grows with |S|, is then in L as well, and falls out where it would show,
 * in the P of keys that outweigh others. L is in the unit of S (terms.h), but no log2(e) is left in results: dS is the
 * gradient of the scores in base e, and dK = scale * dS^T Q and dQ = scale * dS K have Q and K as the caller gave
 * them. */

/* Only what tile registers made is still to be multiplied. */
static inline vec probabilities(const real *S, real factor, vec L)
{
    vec s = vec_load(S);
    return exp_of(TILES ? vec_fma(s, vec_set1(factor), vec_sub(vec_set1(0), L)) : vec_sub(s, L));
}

static inline vec score_gradients(vec P, vec dP, vec D, const real *slope)
{
    vec dS = vec_mul(P, vec_sub(dP, D));
    return slope ? vec_mul(dS, vec_load(slope)) : dS;
}

/* Where P and dS of a panel go: terms across, and their stride; of dS also down, and its stride. */
struct gradients {
    term *P, *dS;
    int64_t across;
    term *dS_down;
    int64_t down;
};

/* P and dS of a panel for n keys, from factor * S and dP, rows `stride` apart. */
static void panel_gradients(int vectors, int64_t n, const real *S, const real *dP, int64_t stride, const real *L,
                            const real *D, const real *slope, real factor, struct gradients to)
{
    for (int v = 0; v < vectors; v++) {
        int64_t at = v * LANES;
        term *P = to.P + left_place(to.across, 0, at / TERM), *dS = to.dS + left_place(to.across, 0, at / TERM);
        term *dS_down = to.dS_down + place(to.down, 0, at);
        vec l = vec_load(L + at), delta = vec_load(D + at);
        for (int64_t k = 0; k < n; k += 2) {
            const real *Sk = S + k * stride + at, *dPk = dP + k * stride + at,
                       *t = slope ? slope + k * PANEL + at : NULL;
            vec P0 = probabilities(Sk, factor, l), dS0 = score_gradients(P0, vec_load(dPk), delta, t);
            store_across(P + left_place(to.across, k, 0), P0);
            if (TERM > 1)
                store_across(dS + left_place(to.across, k, 0), dS0);
            if (k + 1 == n) {
                store_down_last(dS_down, to.down, k, dS0);
                break;
            }
            vec P1 = probabilities(Sk + stride, factor, l),
                dS1 = score_gradients(P1, vec_load(dPk + stride), delta, t ? t + PANEL : NULL);
            store_across(P + left_place(to.across, k + 1, 0), P1);
            if (TERM > 1)
                store_across(dS + left_place(to.across, k + 1, 0), dS1);
            store_down(dS_down, to.down, k, dS0, dS1);
        }
    }
    end_down(to.dS_down, to.down, n, vectors * LANES);
}

#if TILES
/* Both products of a tile of keys go through memory. */
static __attribute__((noinline)) int64_t multiply_gradients(int64_t keys, const term *K, int64_t k_stride,
                                                            const term *Qt, int64_t k_terms, real factor, const term *V,
                                                            int64_t v_stride, const term *dOt, int64_t v_terms,
                                                            const real *mask, const real *L, const real *D,
                                                            struct gradients to, struct upcoming *upcoming)
{
    enum { R = KEY_UNIT };
    (void)upcoming; /* as in tile_product.h */
    _Alignas(64) real S[R * PANEL], dP[R * PANEL];
    int64_t done = 0;
    for (; done + R <= keys; done += R) {
        multiply_rows(R, PANEL_VECTORS, K + done * k_stride, k_stride, Qt, stride_of(padded(k_terms), PANEL), S, PANEL,
                      k_terms, 1, NULL);
        multiply_rows(R, PANEL_VECTORS, V + done * v_stride, v_stride, dOt, stride_of(padded(v_terms), PANEL), dP,
                      PANEL, v_terms, 1, NULL);
        for (int64_t i = 0; mask && i < R * PANEL; i += LANES)
            vec_store(S + i, masked(vec_mul(vec_load(S + i), vec_set1(factor)), vec_load(mask + done * PANEL + i)));
        panel_gradients(PANEL_VECTORS, R, S, dP, PANEL, L, D, NULL, mask ? 1 : factor, to);
        to.P += left_place(to.across, R, 0), to.dS += left_place(to.across, R, 0),
            to.dS_down += place(to.down, R / TERM, 0);
    }
    return done;
}
#else
/* P of row k of S, and of what the mask adds, if there is one; in the place of S and in P. */
static inline void exp_row(int vectors, real *S, int64_t k, const real *mask, const real *L, const struct gradients *to)
{
    for (int v = 0; v < vectors; v++) {
        real *at = S + k * PANEL + v * LANES;
        if (mask)
            vec_store(at, masked(vec_load(at), vec_load(mask + k * PANEL + v * LANES)));
        vec P = probabilities(at, 1, vec_load(L + v * LANES));
        store_across(to->P + k * to->across + v * LANES / TERM, P);
        if (TERM > 1)
            vec_store(at, P);
    }
}

#define EACH_PAIR(R, F) EACH_PAIR_(R, F)
#define EACH_PAIR_(R, F) EACH_PAIR_##R(F)
#define EACH_PAIR_4(F) F(0, 1) F(2, 3)
#define EACH_PAIR_8(F) EACH_PAIR_4(F) F(4, 5) F(6, 7)

#define GRADIENT(r, v)                                                                                               \
    sum_##r##_##v =                                                                                                  \
        score_gradients(vec_load(TERM > 1 ? S + (r) * PANEL + (v) * LANES : to->P + (r) * to->across + (v) * LANES), \
                        sum_##r##_##v, vec_load(D + (v) * LANES), NULL);                                             \
    if (TERM > 1)                                                                                                    \
        store_across(to->dS + (r) * to->across + (v) * LANES / TERM, sum_##r##_##v);
#define GRADIENT_ROW(r, V) EACH_VECTOR_##V(GRADIENT, r)
#define GRADIENT_DOWN(even, odd)                                                    \
    store_down(to->dS_down, to->down, even, sum_##even##_0, sum_##odd##_0);         \
    store_down(to->dS_down + LANES, to->down, even, sum_##even##_1, sum_##odd##_1); \
    store_down(to->dS_down + 2 * LANES, to->down, even, sum_##even##_2, sum_##odd##_2);

/* P and dS of a tile whose S is there: R rows of V times dO^T. */
#define TILE_GRADIENTS(R, V) TILE_GRADIENTS_(R, V)
#define TILE_GRADIENTS_(R, V)                                                                                   \
    static inline __attribute__((always_inline)) void tile_gradients(                                           \
        const term *restrict A, int64_t row_step, const term *restrict B, int64_t n, real *S, const real *mask, \
        const real *L, const real *D, const struct gradients *to)                                               \
    {                                                                                                           \
        const int64_t step = 1, b_step = PANEL;                                                                 \
        int64_t t = 0;                                                                                          \
        EACH_ROW(R, START_ROW, V)                                                                               \
        for (int64_t k = 0; k < R; k++) {                                                                       \
            exp_row(V, S, k, mask, L, to);                                                                      \
            int64_t end = n * (k + 1) / R;                                                                      \
            SUM_UP(TILE_UNROLL, R, V, t, end, ASK_NOTHING)                                                      \
        }                                                                                                       \
        EACH_ROW(R, GRADIENT_ROW, V)                                                                            \
        EACH_PAIR(R, GRADIENT_DOWN)                                                                             \
    }
TILE_GRADIENTS(TILE_ROWS_3, 3)

/* P and dS of a panel of full width, from S = factor * K Q^T, sums of k_terms, and dP = V dO^T, of v_terms; by whole
 * tiles of keys. mask[key][lane], which is added to the scores, may be NULL. The tiles ask for two matrices in
 * turn, or for none: upcoming may be NULL, too. How many keys are done. */
static __attribute__((noinline)) int64_t multiply_gradients(int64_t keys, const term *K, int64_t k_stride,
                                                            const term *Qt, int64_t k_terms, real factor, const term *V,
                                                            int64_t v_stride, const term *dOt, int64_t v_terms,
                                                            const real *mask, const real *L, const real *D,
                                                            struct gradients to, struct upcoming *upcoming)
{
    enum { R = TILE_ROWS_3 };
    int64_t done = 0;
    for (; done + R <= keys; done += R) {
        _Alignas(64) real S[R * PANEL];
        multiply_rows(R, PANEL_VECTORS, K + done * k_stride, k_stride, Qt, PANEL, S, PANEL, k_terms, factor,
                      upcoming ? &upcoming[done / R % 2] : NULL);
        tile_gradients(V + done * v_stride, v_stride, dOt, v_terms, S, mask ? mask + done * PANEL : NULL, L, D, &to);
        to.P += R * to.across, to.dS += R * to.across, to.dS_down += R / TERM * to.down;
    }
    return done;
}
#endif
