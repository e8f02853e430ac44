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
    return exp_of(USE_AMX ? vec_fma(s, vec_set1(factor), vec_sub(vec_set1(0), L)) : vec_sub(s, L));
}

static inline vec score_gradients(vec P, vec dP, vec D, const real *dtanh)
{
    vec dS = vec_mul(P, vec_sub(dP, D));
    return dtanh ? vec_mul(dS, vec_load(dtanh)) : dS;
}

/* Where P and dS of a panel go: terms across, and their stride; of dS also down, and its stride. */
struct gradients {
    packed *P, *dS;
    int64_t across;
    packed *dS_b;
    int64_t down;
};

/* P and dS of a panel for n keys, from factor * S and dP, rows `stride` apart. */
static void panel_gradients(int vectors, int64_t n, const real *S, const real *dP, int64_t stride, const real *L,
                            const real *D, const real *dtanh, real factor, struct gradients to)
{
    for (int v = 0; v < vectors; v++) {
        int64_t at = v * LANES;
        packed *P = to.P + packed_a_index(to.across, 0, at / K_PACK),
               *dS = to.dS + packed_a_index(to.across, 0, at / K_PACK);
        packed *dS_b = to.dS_b + packed_b_index(to.down, 0, at);
        vec l = vec_load(L + at), delta = vec_load(D + at);
        for (int64_t k = 0; k < n; k += 2) {
            const real *Sk = S + k * stride + at, *dPk = dP + k * stride + at,
                       *t = dtanh ? dtanh + k * PANEL + at : NULL;
            vec P0 = probabilities(Sk, factor, l), dS0 = score_gradients(P0, vec_load(dPk), delta, t);
            store_a(P + packed_a_index(to.across, k, 0), P0);
            if (K_PACK > 1)
                store_a(dS + packed_a_index(to.across, k, 0), dS0);
            if (k + 1 == n) {
                store_b_last(dS_b, to.down, k, dS0);
                break;
            }
            vec P1 = probabilities(Sk + stride, factor, l),
                dS1 = score_gradients(P1, vec_load(dPk + stride), delta, t ? t + PANEL : NULL);
            store_a(P + packed_a_index(to.across, k + 1, 0), P1);
            if (K_PACK > 1)
                store_a(dS + packed_a_index(to.across, k + 1, 0), dS1);
            store_b_pair(dS_b, to.down, k, dS0, dS1);
        }
    }
    pad_b(to.dS_b, to.down, n, vectors * LANES);
}

#if USE_AMX
/* Both products of a tile of keys go through memory. */
static __attribute__((noinline)) int64_t gemm_gradients(int64_t keys, const packed *K, int64_t k_stride,
                                                        const packed *Qt, int64_t k_terms, real factor, const packed *V,
                                                        int64_t v_stride, const packed *dOt, int64_t v_terms,
                                                        const real *mask, const real *L, const real *D,
                                                        struct gradients to, struct prefetch_cursor *cursor)
{
    enum { R = KEY_UNIT };
    (void)cursor; /* as in tile_product.h */
    _Alignas(64) real S[R * PANEL], dP[R * PANEL];
    int64_t done = 0;
    for (; done + R <= keys; done += R) {
        gemm_nn(R, PANEL_VECTORS, K + done * k_stride, k_stride, Qt, packed_b_stride(padded(k_terms), PANEL), S, PANEL,
                k_terms, 1, NULL);
        gemm_nn(R, PANEL_VECTORS, V + done * v_stride, v_stride, dOt, packed_b_stride(padded(v_terms), PANEL), dP,
                PANEL, v_terms, 1, NULL);
        for (int64_t i = 0; mask && i < R * PANEL; i += LANES)
            vec_store(S + i, add_mask(vec_mul(vec_load(S + i), vec_set1(factor)), vec_load(mask + done * PANEL + i)));
        panel_gradients(PANEL_VECTORS, R, S, dP, PANEL, L, D, NULL, mask ? 1 : factor, to);
        to.P += packed_a_index(to.across, R, 0), to.dS += packed_a_index(to.across, R, 0),
            to.dS_b += packed_b_index(to.down, R / K_PACK, 0);
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
            vec_store(at, add_mask(vec_load(at), vec_load(mask + k * PANEL + v * LANES)));
        vec P = probabilities(at, 1, vec_load(L + v * LANES));
        store_a(to->P + k * to->across + v * LANES / K_PACK, P);
        if (K_PACK > 1)
            vec_store(at, P);
    }
}

#define UNROLL_PAIRS(R, F) UNROLL_PAIRS_(R, F)
#define UNROLL_PAIRS_(R, F) UNROLL_PAIRS_##R(F)
#define UNROLL_PAIRS_4(F) F(0, 1) F(2, 3)
#define UNROLL_PAIRS_8(F) UNROLL_PAIRS_4(F) F(4, 5) F(6, 7)

#define GRADIENT(r, v)                                                                                                 \
    sum_##r##_##v =                                                                                                    \
        score_gradients(vec_load(K_PACK > 1 ? S + (r) * PANEL + (v) * LANES : to->P + (r) * to->across + (v) * LANES), \
                        sum_##r##_##v, vec_load(D + (v) * LANES), NULL);                                               \
    if (K_PACK > 1)                                                                                                    \
        store_a(to->dS + (r) * to->across + (v) * LANES / K_PACK, sum_##r##_##v);
#define GRADIENT_ROW(r, V) UNROLL_VECTORS_##V(GRADIENT, r)
#define GRADIENT_DOWN(even, odd)                                                   \
    store_b_pair(to->dS_b, to->down, even, sum_##even##_0, sum_##odd##_0);         \
    store_b_pair(to->dS_b + LANES, to->down, even, sum_##even##_1, sum_##odd##_1); \
    store_b_pair(to->dS_b + 2 * LANES, to->down, even, sum_##even##_2, sum_##odd##_2);

/* P and dS of a tile whose S is there: R rows of V times dO^T. */
#define TILE_GRADIENTS(R, V) TILE_GRADIENTS_(R, V)
#define TILE_GRADIENTS_(R, V)                                                                                       \
    static inline __attribute__((always_inline)) void tile_gradients(                                               \
        const packed *restrict A, int64_t row_step, const packed *restrict B, int64_t n, real *S, const real *mask, \
        const real *L, const real *D, const struct gradients *to)                                                   \
    {                                                                                                               \
        const int64_t step = 1, b_step = PANEL;                                                                     \
        int64_t t = 0;                                                                                              \
        UNROLL_ROWS(R, START_ROW, V)                                                                                \
        for (int64_t k = 0; k < R; k++) {                                                                           \
            exp_row(V, S, k, mask, L, to);                                                                          \
            int64_t end = n * (k + 1) / R;                                                                          \
            ACCUMULATE(TILE_UNROLL, R, V, t, end, NO_PREFETCH)                                                      \
        }                                                                                                           \
        UNROLL_ROWS(R, GRADIENT_ROW, V)                                                                             \
        UNROLL_PAIRS(R, GRADIENT_DOWN)                                                                              \
    }
TILE_GRADIENTS(TILE_ROWS_3, 3)

/* P and dS of a panel of full width, from S = factor * K Q^T, sums of k_terms, and dP = V dO^T, of v_terms; by whole
 * tiles of keys. mask[key][lane], which is added to the scores, may be NULL. The tiles ask for two matrices in
 * turn, or for none: upcoming may be NULL, too. How many keys are done. */
static __attribute__((noinline)) int64_t gemm_gradients(int64_t keys, const packed *K, int64_t k_stride,
                                                        const packed *Qt, int64_t k_terms, real factor, const packed *V,
                                                        int64_t v_stride, const packed *dOt, int64_t v_terms,
                                                        const real *mask, const real *L, const real *D,
                                                        struct gradients to, struct prefetch_cursor *cursor)
{
    enum { R = TILE_ROWS_3 };
    int64_t done = 0;
    for (; done + R <= keys; done += R) {
        _Alignas(64) real S[R * PANEL];
        gemm_nn(R, PANEL_VECTORS, K + done * k_stride, k_stride, Qt, PANEL, S, PANEL, k_terms, factor,
                cursor ? &cursor[done / R % 2] : NULL);
        tile_gradients(V + done * v_stride, v_stride, dOt, v_terms, S, mask ? mask + done * PANEL : NULL, L, D, &to);
        to.P += R * to.across, to.dS += R * to.across, to.dS_b += R / K_PACK * to.down;
    }
    return done;
}
#endif
