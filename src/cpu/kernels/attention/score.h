/* From S = K Q^T to the scores: scale, softcap, bias, band; and what the softcap's derivative is. Forward, decode,
 * backward and dbias all take them from here. A bias is what a mask adds: it comes as a tile transposed like the
 * scores (bias.h makes it). */

/* --- Scale ------------------------------------------------------------------------------------ */

/* The scale as query_factor * score_factor: what Q is multiplied by before Q K^T, and the score after it. Numbers of
 * bf16 would be rounded, so nothing is done to them; reals are, but never beyond what they were, lest a query of a
 * scale above 1 overflows where its scores do not. So what is left for the product is a power of two, at most 2^64:
 * above that it would lose the digits of small products. */
static inline double score_factor(const struct mfa_cpu_call *call)
{
    int exponent;
    if (OPERANDS_AS_GIVEN)
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
    if (!OPERANDS_AS_GIVEN)
        scale_vectors(Q, n, query_factor(call));
}

/* --- Softcap ---------------------------------------------------------------------------------- */

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

/* n vectors, `stride` and `dtanh_stride` apart: S = softcap * tanh(S / softcap); dtanh, if wanted, gets 1 - tanh^2. */
static void softcap_scores(real *S, int64_t stride, int64_t n, double softcap, real *dtanh, int64_t dtanh_stride)
{
    vec cap = vec_set1((real)(softcap * S_UNIT)), inverse = vec_set1((real)(1 / softcap));
    for (int64_t k = 0; k < n; k++) {
        vec t = vec_tanh(vec_mul(vec_load(S + k * stride), inverse));
        vec_store(S + k * stride, vec_mul(t, cap));
        if (dtanh)
            vec_store(dtanh + k * dtanh_stride, vec_sub(vec_set1(1), vec_mul(t, t)));
    }
}

/* --- Bias and band ---------------------------------------------------------------------------- */

/* S + bias, which may be NULL: -inf wherever the bias is, also if S is NaN. */
static inline vec score_plus(vec S, const real *bias)
{
    if (!bias)
        return S;
    vec b = vec_load(bias);
    return vec_select_less(b, vec_set1(-REAL_MAX), b, vec_add(S, b));
}

/* A vector of a panel, v, and n keys from `key` on: columns of S, bias and dtanh. The last two may be NULL. */
static void panel_score(const struct mfa_cpu_call *call, const struct panel *panel, int v, int64_t key, int64_t n,
                        struct matrix S, const real *bias, real *dtanh)
{
    if (call->softcap > 0)
        softcap_scores(S.data, S.stride, n, call->softcap, dtanh, PANEL);
    if (bias)
        for (int64_t k = 0; k < n; k++)
            vec_store(S.data + k * S.stride, score_plus(vec_load(S.data + k * S.stride), bias + k * PANEL));
    if (key >= panel->all_low && key + n - 1 <= panel->all_high)
        return;
    real low[LANES], high[LANES]; /* relative to `key`, so that small numbers are compared */
    for (int64_t i = 0; i < LANES; i++) {
        int64_t from = panel->low[v * LANES + i] - key, to = panel->high[v * LANES + i] - key;
        low[i] = (real)(from < 0 ? 0 : from > n ? n : from);
        high[i] = (real)(to < -1 ? -1 : to > n ? n : to);
    }
    vec none = vec_set1(-(real)INFINITY);
    for (int64_t k = 0; k < n; k++) {
        real *at = S.data + k * S.stride;
        vec j = vec_set1((real)k), s = vec_load(at);
        s = vec_select_less(j, vec_load(low), none, s);
        vec_store(at, vec_select_less(vec_load(high), j, none, s));
    }
}

/* The scores of n keys from `key` on in decode, [key][R], with room for `whole` of them; what belongs to them lies
 * likewise. */
struct decode_tile {
    int R;
    int64_t key, n, whole;
    real *S;
    real *dtanh;      /* for 1 - tanh^2; or NULL */
    real *bias_rows;  /* room for the biases */
    const real *bias; /* [key][PANEL]; or NULL */
};

/* The same for a decode tile; keys from n on get -inf. */
static void decode_score(const struct mfa_cpu_call *call, const struct panel *panel, enum block_mask seen,
                         struct decode_tile t)
{
    const int64_t n = t.n, whole = t.whole;
    const int R = t.R;
    if (call->softcap > 0)
        softcap_scores(t.S, LANES, whole * R / LANES, call->softcap, t.dtanh, LANES);
    if (t.bias) {
        for (int64_t k = 0; k < n; k++)
            memcpy(t.bias_rows + k * R, t.bias + k * PANEL, (size_t)R * sizeof(real));
        fill(t.bias_rows + n * R, (whole - n) * R, 0);
        for (int64_t i = 0; i < whole * R; i += LANES)
            vec_store(t.S + i, score_plus(vec_load(t.S + i), t.bias_rows + i));
    }
    for (int r = 0; r < R && seen != BLOCK_FULL; r++)
        for (int64_t k = 0; k < n; k++)
            if (t.key + k < panel->low[r] || t.key + k > panel->high[r])
                t.S[k * R + r] = -(real)INFINITY;
    fill(t.S + n * R, (whole - n) * R, -(real)INFINITY);
}

/* --- Their gradients -------------------------------------------------------------------------- */

/* exp(factor * S - L); the factor is 1 where products have multiplied by it. */
static inline vec probabilities(vec S, real factor, vec L)
{
    return exp_of(FACTOR_AFTER_GEMM ? vec_fma(S, vec_set1(factor), vec_sub(vec_set1(0), L)) : vec_sub(S, L));
}

/* dS = P * (dP - D), times 1 - tanh^2 with softcap; dtanh may be NULL. */
static inline vec score_gradient(vec P, vec dP, vec D, const real *dtanh)
{
    vec dS = vec_mul(P, vec_sub(dP, D));
    return dtanh ? vec_mul(dS, vec_load(dtanh)) : dS;
}
