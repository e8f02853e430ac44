/* A panel and a block of keys by products of bytes (gemm/int8.h), for K and V that are int8 with a scale for each row:
 *
 *     Q_scale = max |Q| / 127, Q = round(Q / Q_scale)                   once for a panel
 *     S = scores of K_scale * Q_scale * (K Q^T)
 *     M = maximum of S of the block, of each lane
 *     W = exp(S - M);  l += sum(W) * exp(M - m)
 *     R = maximum of W * V_scale of the block, of each lane: of the keys that it sees
 *     P = round(255 * W * V_scale / R)
 *     O^T += V^T P^T * R / 255 * exp(M - m)
 *
 * Rounding Q puts each score off, rounding P each weight, by at most 1 / 510 of the largest one of the block; l sums up
 * W, which is not rounded. include/mfa.h says how far off results are by both. A scale of V may be negative: P has no
 * signs, so keys with such a scale are multiplied by themselves then, and their product is subtracted. */

#if INT8_PRODUCTS
enum { INT8_COLUMNS = 512 }; /* of a row, at most */

/* What a worker keeps for it: of a panel, of a block of keys, of both. */
struct int8_operands {
    packed *Q;       /* of each panel: k-interleaved packs [packs][PANEL] */
    real *Q_factors; /* of each: [PANEL], what scores are multiplied by beside K_scale */
    packed *K, *V;   /* row-major packs [key][int8_row(head_dim)]; k-interleaved ones [key / 4][padded(value_dim)] */
    int32_t *K_start;
    real *K_scale, *V_scale;           /* [key] */
    packed *P;                         /* k-interleaved packs [key / 4][PANEL] */
    real *P_factors, *top, *O_factors; /* V_scale of one sign; M; what sums of P V are multiplied by */
};

/* Memory for blocks of n keys, whole tiles. */
static void int8_arena(const struct mfa_cpu_call *call, char *base, uint64_t *used, int64_t n, struct int8_operands *s)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = int8_row(a->head_dim), e = padded(a->value_dim);
    s->Q = arena_alloc(base, used, call->panels * d * PANEL);
    s->Q_factors = arena_alloc(base, used, call->panels * PANEL);
    s->K = arena_alloc(base, used, n * d);
    s->V = arena_alloc(base, used, int8_packs(n) * e);
    s->K_start = (int32_t *)(void *)arena_alloc(base, used, n);
    s->K_scale = arena_alloc(base, used, n);
    s->V_scale = arena_alloc(base, used, n);
    s->P = arena_alloc(base, used, int8_packs(n) * PANEL);
    s->P_factors = arena_alloc(base, used, n);
    s->top = arena_alloc(base, used, PANEL);
    s->O_factors = arena_alloc(base, used, PANEL);
}

/* A query as bytes Q + 128, in whole vectors of reals; returns its scale. One that is not finite gets NaN, and one
 * whose largest number is below 2^-100, whose inverse might not be finite, counts as zeros. */
static double quantize_query(const real *row, int64_t columns, uint8_t *to)
{
    const int64_t n = padded(columns);
    const double largest = (double)max_abs(row, n);
    const int counts = largest >= 0x1p-100;
    const vec inverse = vec_set1(counts ? (real)(127 / largest) : 0);
    for (int64_t c = 0; c < n; c += LANES)
        vec_store_bytes(to + c, vec_fma(vec_load(row + c), inverse, vec_set1(128)));
    return !all_finite(row, n) ? NAN : counts ? largest / 127 : 0;
}

/* Q of panel number p. rows: room for its rows as packs. */
static void int8_queries(const struct mfa_cpu_call *call, const struct panel *panel, int64_t p,
                         const struct int8_operands *s, packed *rows)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = int8_row(a->head_dim);
    _Alignas(64) real row[INT8_COLUMNS];
    for (int64_t i = 0; i < PANEL; i++) {
        double scale = 0;
        memset(rows + i * d, 128, (size_t)d * sizeof(packed)); /* zeros */
        if (i < panel->lanes) {
            load_row(row, panel_row(panel, call->q, bytes_of(call->dtype), &a->q, i), call->dtype, a->q.column,
                     a->head_dim);
            scale = quantize_query(row, a->head_dim, (uint8_t *)(rows + i * d));
        }
        s->Q_factors[p * PANEL + i] = (real)(scale * score_factor(call));
    }
    transpose(rows, d, s->Q + p * d * PANEL, PANEL, PANEL, d);
}

/* Codes of a row, then zeros up to `whole` bytes. */
static void copy_codes(const struct kv_source *source, int64_t key, uint8_t *to, int64_t whole)
{
    const uint8_t *from = (const uint8_t *)kv_row(source, key);
    const int64_t n = source->columns, step = source->strides->column;
    if (step == 1)
        memcpy(to, from, (size_t)n);
    for (int64_t c = 0; c < n && step != 1; c++)
        to[c] = from[c * step];
    memset(to + n, 0, (size_t)(whole - n));
}

static real row_scale(const struct kv_source *source, int64_t key)
{
    if (!source->scales)
        return 1;
    return *(const float *)(const void *)kv_row_in(source, source->scales, sizeof(float), source->scale_strides, key);
}

/* Keys [key, key + n), and zeros up to whole tiles. */
static void int8_keys(const struct kv_source *K, const struct kv_source *V, int64_t key, int64_t n,
                      const struct int8_operands *s)
{
    const int64_t d = int8_row(K->columns), e = padded(V->columns), whole = round_up_keys(n);
    _Alignas(64) uint8_t rows[INT8_K][INT8_COLUMNS];
    for (int64_t r = 0; r < whole; r++) {
        int_vec sum = int_set1(0);
        if (r < n)
            copy_codes(K, key + r, (uint8_t *)(s->K + r * d), d * INT8_K);
        else
            memset(s->K + r * d, 0, (size_t)d * sizeof(packed));
        for (int64_t c = 0; c < d; c += LANES)
            sum = int_dots(vec_load(s->K + r * d + c), vec_of_bytes(128), sum);
        s->K_start[r] = -int_sum(sum);
        const real scale = r < n ? row_scale(K, key + r) : 0;
        s->K_scale[r] = scale + (scale - scale); /* NaN for an infinite one: inf times a sum would hide the key */
        s->V_scale[r] = r < n ? row_scale(V, key + r) : 0;
    }
    for (int64_t r = 0; r < whole; r += INT8_K) {
        for (int64_t i = 0; i < INT8_K; i++)
            if (r + i < n)
                copy_codes(V, key + r + i, rows[i], e);
            else
                memset(rows[i], 0, (size_t)e);
        for (int64_t c = 0; c < e; c += LANES)
            vec_store(s->V + r / INT8_K * e + c, vec_zip_bytes(rows[0] + c, rows[1] + c, rows[2] + c, rows[3] + c));
    }
}

/* The scales of one sign of n keys, 0 for those of the other; returns the largest, NaN if one is not finite. */
static real int8_factors(const real *scales, int64_t n, real sign, real *factors)
{
    vec top = vec_set1(0);
    memcpy(factors, scales, (size_t)n * sizeof(real));
    fill(factors + n, padded(n) - n, 0);
    if (!all_finite(factors, padded(n)))
        return (real)NAN;
    for (int64_t k = 0; k < n; k += LANES) {
        const vec scale = vec_max(vec_mul(vec_load(factors + k), vec_set1(sign)), vec_set1(0));
        vec_store(factors + k, scale);
        top = vec_max(top, scale);
    }
    return horizontal_max(top);
}

/* W in place of a column of scores, of n keys; returns their sum. */
static vec int8_exponentials(real *S, int64_t n, vec top)
{
    vec l[2] = {vec_set1(0), vec_set1(0)};
    for (int64_t k = 0; k < n; k += 2, S += 2 * PANEL) {
        const vec even = exp_of(vec_sub(vec_load(S), top)), odd = exp_of(vec_sub(vec_load(S + PANEL), top));
        l[0] = vec_add(l[0], even);
        l[1] = vec_add(l[1], odd);
        vec_store(S, even);
        vec_store(S + PANEL, odd);
    }
    return vec_add(l[0], l[1]);
}

/* P of a column of W, `packs` packs of them, with such factors; returns R. Products with a small R are made larger
 * first, for its inverse might not be finite. */
static vec int8_weights(const real *W, int64_t packs, const real *factors, packed *P)
{
    vec R = vec_set1(0);
    for (int64_t k = 0; k < packs * INT8_K; k++)
        R = vec_max(R, vec_mul(vec_load(W + k * PANEL), vec_set1(factors[k])));
    const vec lift = vec_select_less(R, vec_set1(1), vec_set1(0x1p60f), vec_set1(1));
    const vec unit = vec_div(vec_set1(255), vec_mul(R, lift));
    for (int64_t k = 0; k < packs * INT8_K; k += INT8_K, W += INT8_K * PANEL, P += PANEL) {
        vec weight[INT8_K];
        for (int i = 0; i < INT8_K; i++)
            weight[i] = vec_mul(vec_mul(vec_mul(vec_load(W + i * PANEL), vec_set1(factors[k + i])), lift), unit);
        vec_store(P, vec_pack_bytes(weight[0], weight[1], weight[2], weight[3]));
    }
    return R;
}

/* A panel, whose queries are packed, and the block of keys that it visits. */
struct int8_step {
    const struct panel *panel;
    int64_t p, key;                /* the number of the panel; the first key of the block */
    const real *bias;              /* of the first key visited; or NULL */
    const struct dropout *dropout; /* or NULL */
    int shrinks_V;
    struct accumulators acc;
};

/* Scores of n keys, r.from and those after it, in S; of each lane, m, and M in s->top. */
static void int8_score(const struct mfa_cpu_call *call, const struct int8_operands *s, const struct int8_step *step,
                       struct range r, real *S)
{
    const struct mfa_args *a = &call->args;
    const int64_t n = r.to - r.from, d = int8_row(a->head_dim), rows = (n + INT8_ROWS - 1) / INT8_ROWS * INT8_ROWS;
    int8_scores(rows, int8_packs(a->head_dim), s->K + r.from * d, d, s->K_start + r.from, s->K_scale + r.from,
                s->Q + step->p * d * PANEL, s->Q_factors + step->p * PANEL, S);
    for (int v = 0; v < step->panel->vectors; v++) {
        const struct matrix column = {S + v * LANES, PANEL};
        panel_score(call, step->panel, v, step->key + r.from, n, column, step->bias ? step->bias + v * LANES : NULL,
                    NULL);
        const vec top = column_max(column.data, n);
        softmax_rescale(accumulators_from(step->acc, v * LANES), a->value_dim, top);
        vec_store(s->top + v * LANES, vec_max(top, vec_set1(-REAL_MAX))); /* finite where no key is seen */
    }
    fill(S + n * PANEL, (rows - n) * PANEL, -(real)INFINITY);
}

/* m, l and O of the panel from keys r of the block. S: room for the scores. */
static __attribute__((noinline)) void int8_attend(const struct mfa_cpu_call *call, const struct int8_operands *s,
                                                  const struct int8_step *step, struct range r, real *S)
{
    const int64_t n = r.to - r.from, packs = int8_packs(n), e = padded(call->args.value_dim);
    const struct accumulators acc = step->acc;
    int8_score(call, s, step, r, S);
    for (int64_t lane = 0; lane < step->panel->vectors * LANES; lane += LANES) {
        const vec top = vec_load(s->top + lane), alpha = exp_of(vec_sub(top, vec_load(acc.m + lane)));
        const vec sum = int8_exponentials(S + lane, packs * INT8_K, top);
        vec_store(acc.l + lane, vec_fma(sum, alpha, vec_load(acc.l + lane)));
        vec_store(s->top + lane, alpha); /* M is needed no more */
    }
    for (int sign = 1; sign >= -1; sign -= 2) {
        const real largest = int8_factors(s->V_scale + r.from, n, (real)sign, s->P_factors);
        if (sign < 0 && largest == 0)
            break;
        const vec unit = vec_set1((real)sign / (255 * unit_of(step->shrinks_V)));
        fill(s->O_factors, PANEL, 0);
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const int64_t lane = v * LANES;
            if (v >= step->panel->vectors) {
                for (int64_t k = 0; k < packs; k++)
                    vec_store(s->P + k * PANEL + lane, vec_set1(0));
                continue;
            }
            const vec R = int8_weights(S + lane, packs, s->P_factors, s->P + lane), alpha = vec_load(s->top + lane);
            const vec factor = vec_mul(vec_mul(alpha, R), unit);
            vec_store(s->O_factors + lane, largest >= 0 ? factor : vec_set1((real)NAN));
            if (step->dropout)
                drop_bytes(step->dropout, v, step->key + r.from, packs * INT8_K, s->P + lane);
        }
        int8_values(e, packs, s->V + r.from / INT8_K * e, e, s->P, s->O_factors, acc.O);
    }
}
#endif
