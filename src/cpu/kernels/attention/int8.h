/* A panel and a block of keys by products of bytes (gemm/int8.h), for K and V that are int8 with a scale for each row:
 *
 *     Q_scale = max |Q| / 127, Q = round(Q / Q_scale)                   once for a panel
 *     S = scores of K_scale * Q_scale * (K Q^T)
 *     M = maximum of S of the block, of each lane
 *     W = exp(S - M);  l += sum(W) * exp(M - m)
 *     P = round(255 * W * V_scale / max V_scale)
 *     O^T += V^T P^T * max V_scale / 255 * exp(M - m)
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
    real *P_factors, *top, *O_factors; /* 255 * V_scale / max V_scale; M; what sums of P V are multiplied by */
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
    vec top = vec_set1(0);
    for (int64_t c = 0; c < n; c += LANES)
        top = vec_max(top, vec_max(vec_load(row + c), vec_sub(vec_set1(0), vec_load(row + c))));
    const double largest = (double)horizontal_max(top);
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
        s->K_scale[r] = r < n ? row_scale(K, key + r) : 0;
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

/* P_factors of n keys with scales of one sign; returns the largest scale, NaN if one is not finite. */
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
    const real largest = horizontal_max(top);
    for (int64_t k = 0; k < n && largest > 0; k += LANES)
        vec_store(factors + k, vec_mul(vec_div(vec_load(factors + k), vec_set1(largest)), vec_set1(255)));
    return largest;
}

/* P of a column of scores, `packs` packs of them, each times its factor; returns the sum of exp(S - top). */
static vec int8_weights(const real *S, int64_t packs, vec top, const real *factors, packed *P)
{
    vec l[2] = {vec_set1(0), vec_set1(0)};
    for (int64_t k = 0; k < packs * INT8_K; k += INT8_K, S += INT8_K * PANEL, P += PANEL) {
        const vec a = exp_of(vec_sub(vec_load(S), top)), b = exp_of(vec_sub(vec_load(S + PANEL), top));
        const vec c = exp_of(vec_sub(vec_load(S + 2 * PANEL), top)), d = exp_of(vec_sub(vec_load(S + 3 * PANEL), top));
        l[0] = vec_add(l[0], vec_add(a, b));
        l[1] = vec_add(l[1], vec_add(c, d));
        vec_store(P, vec_pack_bytes(vec_mul(a, vec_set1(factors[k])), vec_mul(b, vec_set1(factors[k + 1])),
                                    vec_mul(c, vec_set1(factors[k + 2])), vec_mul(d, vec_set1(factors[k + 3]))));
    }
    return vec_add(l[0], l[1]);
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
    for (int sign = 1; sign >= -1; sign -= 2) {
        const real largest = int8_factors(s->V_scale + r.from, n, (real)sign, s->P_factors);
        if (sign < 0 && largest == 0)
            break;
        const vec unit = vec_set1((real)sign * largest / (255 * unit_of(step->shrinks_V)));
        fill(s->O_factors, PANEL, 0);
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const int64_t lane = v * LANES;
            if (v >= step->panel->vectors) {
                for (int64_t k = 0; k < packs; k++)
                    vec_store(s->P + k * PANEL + lane, vec_set1(0));
                continue;
            }
            const vec top = vec_load(s->top + lane), alpha = exp_of(vec_sub(top, vec_load(acc.m + lane)));
            const vec sum = int8_weights(S + lane, packs, top, s->P_factors, s->P + lane);
            if (sign > 0)
                vec_store(acc.l + lane, vec_fma(sum, alpha, vec_load(acc.l + lane)));
            vec_store(s->O_factors + lane, vec_mul(alpha, unit));
            if (step->dropout)
                drop_bytes(step->dropout, v, step->key + r.from, packs * INT8_K, s->P + lane);
        }
        int8_values(e, packs, s->V + r.from / INT8_K * e, e, s->P, s->O_factors, acc.O);
    }
}
#endif
