/* The online softmax: m, l and O of queries, started, kept up to date and brought to an end here, for forward, decode
 * and merge. A sink (sinks.h) enters where they end; P is dropped
 * (dropout.h) between its sum and its product with V.
 *
 * m is a reference, not the maximum itself: it lags by at most RESCALE_THRESHOLD, which keeps P = exp(S - m) below
 * RESCALE_THRESHOLD_EXP and saves nearly all rescaling. The result is the same function. */

#define RESCALE_THRESHOLD ((real)(5.5 * S_UNIT))
#define RESCALE_THRESHOLD_EXP 256

struct accumulators { /* of one panel: real O[padded(value_dim)][PANEL], m[PANEL], l[PANEL] */
    real *O, *m, *l;
    real *unit; /* what O is still to be multiplied by: a power of two */
};

static inline int64_t accumulator_reals(const struct mfa_args *a)
{
    return (padded(a->value_dim) + 2) * PANEL + LANES;
}

static struct accumulators accumulators_at(real *memory, const struct mfa_args *a, int64_t panel)
{
    real *O = memory + panel * accumulator_reals(a), *m = O + padded(a->value_dim) * PANEL;
    return (struct accumulators){O, m, m + PANEL, m + 2 * PANEL};
}

/* V is multiplied by 2^-SHRINK_BITS, or not. */
static inline real unit_of(int shrinks_V)
{
    return (real)ldexp(1, shrinks_V ? SHRINK_BITS : 0);
}

static void softmax_start(const struct mfa_args *a, struct accumulators acc, int shrinks_V)
{
    fill(acc.O, padded(a->value_dim) * PANEL, 0);
    fill(acc.m, PANEL, -REAL_MAX);
    fill(acc.l, PANEL, 0);
    *acc.unit = unit_of(shrinks_V);
}

/* --- A column of scores: one vector of lanes, n keys, rows PANEL apart --------------------------- */

/* The largest. Four at a time, since one depends on the one before. */
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

/* P = exp(S - m), in the place of S or before it; returns its sum. */
static vec column_exp(const real *S, int64_t n, vec m, struct packed_b P)
{
    vec l[2] = {vec_set1(0), vec_set1(0)};
    int64_t k = 0;
    for (; k + 2 <= n; k += 2) {
        vec even = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        vec odd = exp_of(vec_sub(vec_load(S + (k + 1) * PANEL), m));
        l[0] = vec_add(l[0], even);
        l[1] = vec_add(l[1], odd);
        store_b_pair(P, k, even, odd);
    }
    if (k < n) {
        vec last = exp_of(vec_sub(vec_load(S + k * PANEL), m));
        l[0] = vec_add(l[0], last);
        store_b_last(P, k, last);
    }
    return vec_add(l[0], l[1]);
}

/* m, l and O of a column's lanes. */
static inline struct accumulators accumulators_from(struct accumulators acc, int64_t lane)
{
    return (struct accumulators){acc.O + lane, acc.m + lane, acc.l + lane, acc.unit};
}

/* Returns m for scores of a column up to `top`; m, and with it O, is rescaled where it is stale. */
static inline vec softmax_rescale(struct accumulators acc, int64_t value_dim, vec top)
{
    vec reference = vec_load(acc.m);
    if (!vec_any_less(vec_add(reference, vec_set1(RESCALE_THRESHOLD)), top))
        return reference;
    vec raised = vec_max(top, reference), alpha = exp_of(vec_sub(reference, raised));
    int64_t rows = vec_any_less(vec_set1(0), vec_load(acc.l)) ? value_dim : 0; /* else O is 0 */
    vec_store(acc.m, raised);
    vec_store(acc.l, vec_mul(vec_load(acc.l), alpha));
    for (int64_t d = 0; d < rows; d++)
        vec_store(acc.O + d * PANEL, vec_mul(vec_load(acc.O + d * PANEL), alpha));
    return raised;
}

/* P of a column of scores. */
static void softmax_step(struct accumulators acc, int64_t value_dim, const real *S, int64_t n, struct packed_b P)
{
    const vec reference = softmax_rescale(acc, value_dim, column_max(S, n));
    vec_store(acc.l, vec_add(vec_load(acc.l), column_exp(S, n, reference, P)));
}

/* --- What the fused products need (gemm/exp2.h) ------------------------------------------------- */

/* l += sum; or 0, if the sum shows that a score exceeds m + RESCALE_THRESHOLD. */
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

/* Whether each lane has an m: it has seen a key, and l is at least 1. */
static int all_have_max(const real *l)
{
    int none = 0;
    for (int v = 0; v < PANEL_VECTORS; v++)
        none |= vec_any_less(vec_load(l + v * LANES), vec_set1((real)0.5));
    return !none;
}

/* --- Decode: S is [key][R], so a query's m is repeated for the LANES / R keys of a vector, and the lanes of its l are
 * added up at the end. m[LANES], l[LANES], O[R][columns] --------------------------------------------- */

/* Makes m the maximum `top` of each query that exceeds it by more than RESCALE_THRESHOLD. */
static void decode_rescale(int R, vec top, struct accumulators acc, int64_t columns)
{
    real most[LANES], alpha[LANES];
    vec_store(most, top);
    for (int i = R; i < LANES; i++)
        most[i % R] = most[i] > most[i % R] ? most[i] : most[i % R];
    for (int i = 0; i < LANES; i++)
        most[i] = most[i % R] > acc.m[i] + RESCALE_THRESHOLD ? most[i % R] : acc.m[i];
    vec factor = exp_of(vec_sub(vec_load(acc.m), vec_load(most)));
    vec_store(alpha, factor);
    vec_store(acc.l, vec_mul(vec_load(acc.l), factor));
    memcpy(acc.m, most, sizeof most);
    for (int r = 0; r < R; r++)
        scale_vectors(acc.O + r * columns, columns, alpha[r]);
}

/* P in place of so many vectors of scores. */
static void decode_softmax_step(int R, real *S, int64_t vectors, struct accumulators acc, int64_t columns)
{
    vec top = vec_load(S);
    for (int64_t v = 1; v < vectors; v++)
        top = vec_max(top, vec_load(S + v * LANES));
    if (vec_any_less(vec_add(vec_load(acc.m), vec_set1(RESCALE_THRESHOLD)), top))
        decode_rescale(R, top, acc, columns);
    const vec reference = vec_load(acc.m);
    vec sum = vec_set1(0); /* first by itself: beside a large l, one small P after the other would be lost */
    for (int64_t v = 0; v < vectors; v++) {
        vec P = exp_of(vec_sub(vec_load(S + v * LANES), reference));
        sum = vec_add(sum, P);
        vec_store(S + v * LANES, P);
    }
    vec_store(acc.l, vec_add(vec_load(acc.l), sum));
}

/* --- The end ---------------------------------------------------------------------------------- */

/* What O of a lane is multiplied by at the end, and L = m + log(l). Below a large sink the weight may be subnormal in
 * f32, where it would lose the digits of O. */
struct softmax_end {
    double weight;
    real L;
};

static inline struct softmax_end softmax_end(const struct mfa_cpu_call *call, const struct panel *panel,
                                             struct accumulators acc, int64_t lane)
{
    const real m = acc.m[lane], l = acc.l[lane];
    if (!(call->features & CPU_SINKS))
        return (struct softmax_end){l == 0 ? 0 : (double)(*acc.unit / (l * (real)call->kept)),
                                    l == 0 ? -(real)INFINITY : (real)((double)m / S_UNIT + log((double)l))};
    const double sink = sink_of(call, panel->seq, panel->head[lane]) * S_UNIT;
    const struct sink_sum with = add_sink((double)m, (double)l, sink);
    return (struct softmax_end){with.l == 0 ? 0 : (double)*acc.unit * with.alpha / (with.l * call->kept),
                                with.l == 0 ? -(real)INFINITY : (real)(with.m / S_UNIT + log(with.l))};
}

/* O = unit * O / l and L = m + log(l): writes the panel's rows of O and L, and of what rounding takes off O if that is
 * wanted. rows: room for LANES rows of O. */
static void softmax_epilogue(const struct mfa_cpu_call *call, const struct panel *panel, struct accumulators acc,
                             real *rows)
{
    const struct mfa_args *a = &call->args;
    int64_t e = padded(a->value_dim), bytes = bytes_of(call->out_dtype);
    for (int64_t i = 0; i < panel->lanes; i++) {
        real *row = rows + i % LANES * e;
        if (i % LANES == 0)
            transpose(acc.O + i, PANEL, rows, e, e, LANES);
        const struct softmax_end end = softmax_end(call, panel, acc, i);
        scale_vectors(row, e, end.weight);
        if (call->lse)
            *(real *)panel_row(panel, call->lse, sizeof(real), &a->lse, i) = end.L;
        char *to = (char *)panel_row(panel, call->o, bytes, &a->o, i);
        if (call->o_low)
            store_row_and_rest(to, (char *)panel_row(panel, call->o_low, bytes, &a->o, i), call->out_dtype, a->o.column,
                               row, a->value_dim);
        else
            store_row(to, call->out_dtype, a->o.column, row, a->value_dim);
    }
}

/* whole += part, of some vectors of lanes: m = max of both, l and O = sum of exp(m_s - m) times theirs. Both O come to
 * be in whole's unit. */
static void softmax_merge(struct accumulators whole, struct accumulators part, int vectors, int64_t value_dim)
{
    const vec shrink = vec_set1(*part.unit / *whole.unit);
    for (int64_t at = 0; at < vectors * LANES; at += LANES) {
        vec m0 = vec_load(whole.m + at), m1 = vec_load(part.m + at), m = vec_max(m0, m1);
        vec w0 = exp_of(vec_sub(m0, m)), w1 = exp_of(vec_sub(m1, m));
        vec_store(whole.m + at, m);
        vec l = vec_mul(vec_load(whole.l + at), w0);
        vec_store(whole.l + at, vec_fma(vec_load(part.l + at), w1, l));
        w1 = vec_mul(w1, shrink);
        for (int64_t r = 0; r < value_dim; r++) {
            real *O = whole.O + r * PANEL + at;
            vec_store(O, vec_fma(vec_load(part.O + r * PANEL + at), w1, vec_mul(vec_load(O), w0)));
        }
    }
}
