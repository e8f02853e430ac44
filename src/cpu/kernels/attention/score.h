/* What the scores of a panel, S = K Q^T, are multiplied by, and what softcap, mask and band make of them. */

/* tanh: Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel. */
static inline vec vec_tanh(vec x)
{
    if (sizeof(real) == 8) {
        real lane[LANES];
        vec_store(lane, x);
        for (int i = 0; i < LANES; i++)
            lane[i] = (real)tanh((double)lane[i]);
        return vec_load(lane);
    }
    vec size = vec_max(vec_sub(vec_set1(0), x), x), z = vec_mul(x, x);
    vec p = vec_fma(vec_set1((real)-5.70498872745e-3), z, vec_set1((real)2.06390887954e-2));
    p = vec_fma(p, z, vec_set1((real)-5.37397155531e-2));
    p = vec_fma(p, z, vec_set1((real)1.33314422036e-1));
    p = vec_fma(p, z, vec_set1((real)-3.33332819422e-1));
    p = vec_fma(vec_mul(p, z), x, x);
    vec bounded = vec_select_less(vec_set1(20), size, vec_set1(20), size);
    vec e = vec_exp2(vec_mul(bounded, vec_set1((real)(2 * LOG2E))));
    vec far = vec_sub(vec_set1(1), vec_div(vec_set1(2), vec_add(e, vec_set1(1))));
    far = vec_select_less(x, vec_set1(0), vec_sub(vec_set1(0), far), far);
    return vec_select_less(size, vec_set1((real)0.625), p, far);
}

/* S = softcap * tanh(S / softcap) of n rows; slope, if wanted, gets 1 - tanh^2. */
static void softcap_scores(int vectors, real *S, int64_t stride, int64_t n, double softcap, real *dtanh)
{
    vec cap = vec_set1((real)(softcap * S_UNIT)), inverse = vec_set1((real)(1 / softcap));
    for (int64_t k = 0; k < n; k++)
        for (int v = 0; v < vectors; v++) {
            vec t = vec_tanh(vec_mul(vec_load(S + k * stride + v * LANES), inverse));
            vec_store(S + k * stride + v * LANES, vec_mul(t, cap));
            if (dtanh)
                vec_store(dtanh + k * PANEL + v * LANES, vec_sub(vec_set1(1), vec_mul(t, t)));
        }
}

/* The scale as query_factor * score_factor: what Q is multiplied by before Q K^T, and this after it. A query's terms of
 * two numbers would be rounded, so nothing is done to them; reals are, but never beyond what they were, lest a query of
 * a scale above 1 overflows where its scores do not. So what is left for the product is a power of two, at most 2^64:
 * above that it would lose the digits of small products. */
static inline double score_factor(const struct mfa_cpu_call *call)
{
    int exponent;
    if (K_PACK > 1)
        return call->scale * (call->softcap > 0 ? 1 : S_UNIT);
    if (fabs(call->scale) <= 1)
        return 1;
    frexp(call->scale, &exponent);
    return ldexp(1, exponent < 64 ? exponent : 64);
}

static inline double query_factor(const struct mfa_cpu_call *call)
{
    return call->scale / score_factor(call);
}

static void scale_queries(const struct mfa_cpu_call *call, packed *Q, int64_t n)
{
    if (K_PACK == 1)
        scale_vectors(Q, n, query_factor(call));
}

/* Softcap, mask and band on the raw scores of vector v and keys [key, key + n): columns of S, mask and slope. The last
 * two may be NULL. */
static void panel_score(const struct panel *panel, const struct mfa_cpu_call *call, int v, int64_t key, int64_t n,
                        real *S, int64_t stride, const real *mask, real *dtanh)
{
    if (call->softcap > 0)
        softcap_scores(1, S, stride, n, call->softcap, dtanh);
    if (mask)
        for (int64_t k = 0; k < n; k++)
            vec_store(S + k * stride, add_mask(vec_load(S + k * stride), vec_load(mask + k * PANEL)));
    if (key >= panel->all_low && key + n - 1 <= panel->all_high)
        return;
    real low[LANES], high[LANES]; /* relative to `key`, so that small numbers are compared */
    for (int64_t i = 0; i < LANES; i++) {
        int64_t from = panel->low[v * LANES + i] - key, to = panel->high[v * LANES + i] - key;
        low[i] = (real)(from < 0 ? 0 : from > n ? n : from);
        high[i] = (real)(to < -1 ? -1 : to > n ? n : to);
    }
    vec hidden = vec_set1(-(real)INFINITY);
    for (int64_t k = 0; k < n; k++) {
        real *at = S + k * stride;
        vec j = vec_set1((real)k), s = vec_load(at);
        s = vec_select_less(j, vec_load(low), hidden, s);
        vec_store(at, vec_select_less(vec_load(high), j, hidden, s));
    }
}
