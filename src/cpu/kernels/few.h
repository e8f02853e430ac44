/* Forward for few queries, as in a decode step, by blocks of keys:
 *
 *     for each block of keys that the queries see:
 *         S = Q K^T                                           (softcap, mask, band)
 *         if any max(S) > m + SLACK: m' = max(m, max(S)); l, O *= exp(m - m'); m = m'
 *         P = exp(S - m), l += sum(P), O += P V
 *
 * Reading memory is what takes the time: K and V are read once for all query heads of a group, where they lie if they
 * can be (few_product.h). S is [key][R], and what belongs to a query is repeated for the LANES / R keys of a vector:
 * m, and l, whose lanes are added up at the end. Leaves its sums as forward does, for merge and finish. */

struct few_scratch {
    term *rows, *Q, *K, *V;
    real *S, *O, *sums, *mask, *mask_rows, *mask_tile;
};

static uint64_t few_carve(const struct mfa_cpu_call *call, char *base, struct few_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = across_stride(a->head_dim), e = across_stride(a->value_dim);
    int64_t wide = padded(a->head_dim > a->value_dim ? a->head_dim : a->value_dim);
    int masked = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = carve(base, &used, PANEL * d); /* this and the next as in forward_carve, for merge */
    s->rows = carve(base, &used, PANEL * wide);
    s->K = carve(base, &used, FEW_SUMS * d);
    s->V = carve(base, &used, FEW_KEYS * e);
    s->S = carve(base, &used, FEW_KEYS * LANES);
    s->O = carve(base, &used, LANES * e * TERM);
    s->sums = carve(base, &used, sums_reals(a));
    s->mask = carve(base, &used, masked ? FEW_KEYS * LANES : 0);
    s->mask_rows = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    s->mask_tile = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    return used;
}

static uint64_t few_scratch(const struct mfa_cpu_call *call)
{
    struct few_scratch s;
    return few_carve(call, NULL, &s);
}

/* The panel's rows of a tensor of queries, R of them, terms across; zeros for those that there are not. */
static void few_load(const struct mfa_cpu_call *call, const struct panel *panel, int R, int64_t batch, const void *data,
                     const struct mfa_strides *s, int64_t columns, term *rows)
{
    int64_t stride = across_stride(columns);
    for (int64_t i = 0; i < panel->lanes; i++)
        load_terms(rows + i * stride, row_at(data, bytes_of(call->dtype), s, batch, panel->head[i], panel->row[i]),
                   call->dtype, s->column, columns);
    fill(rows + panel->lanes * stride, (R - panel->lanes) * stride, 0);
}

/* Softcap, mask, band, and the end of the keys, on the raw scores of n keys; slope, if wanted, gets 1 - tanh^2. mask is
 * room for as many. */
static void few_adjust(const struct mfa_cpu_call *call, const struct panel *panel, int R, enum visibility seen,
                       int64_t key, int64_t n, real *S, real *mask, const real *mask_tile, real *slope)
{
    int64_t whole = few_whole(n, R), vectors = whole * R / LANES;
    if (call->softcap > 0)
        cap_scores((int)vectors, S, 0, 1, call->softcap, slope);
    if (seen == MASKED) {
        for (int64_t k = 0; k < n; k++)
            memcpy(mask + k * R, mask_tile + k * PANEL, (size_t)R * sizeof(real));
        fill(mask + n * R, (whole - n) * R, 0);
        for (int64_t i = 0; i < vectors * LANES; i += LANES)
            vec_store(S + i, masked(vec_load(S + i), vec_load(mask + i)));
    }
    for (int r = 0; r < R && seen != SHOWN; r++)
        for (int64_t k = 0; k < n; k++)
            if (key + k < panel->low[r] || key + k > panel->high[r])
                S[k * R + r] = -(real)INFINITY;
    fill(S + n * R, (whole - n) * R, -(real)INFINITY);
}

/* Makes m the maximum `top` of each query that exceeds it by more than SLACK. */
static void few_raise(int R, vec top, real *m, real *l, real *O, int64_t columns)
{
    real most[LANES], alpha[LANES];
    vec_store(most, top);
    for (int i = R; i < LANES; i++)
        most[i % R] = most[i] > most[i % R] ? most[i] : most[i % R];
    for (int i = 0; i < LANES; i++)
        most[i] = most[i % R] > m[i] + SLACK ? most[i % R] : m[i];
    vec factor = exp_of(vec_sub(vec_load(m), vec_load(most)));
    vec_store(alpha, factor);
    vec_store(l, vec_mul(vec_load(l), factor));
    memcpy(m, most, sizeof most);
    for (int r = 0; r < R; r++)
        scale_vectors(O + r * columns, columns, alpha[r]);
}

/* P in place of the scores: terms down, in vectors. */
static void few_softmax(int R, real *S, int64_t vectors, real *m, real *l, real *O, int64_t columns)
{
    vec top = vec_load(S), sum = vec_load(l);
    for (int64_t v = 1; v < vectors; v++)
        top = vec_max(top, vec_load(S + v * LANES));
    if (vec_any_less(vec_add(vec_load(m), vec_set1(SLACK)), top)) {
        few_raise(R, top, m, l, O, columns);
        sum = vec_load(l);
    }
    vec reference = vec_load(m);
    for (int64_t v = 0; v < vectors; v += TERM) {
        vec even = exp_of(vec_sub(vec_load(S + v * LANES), reference));
        sum = vec_add(sum, even);
#if TERM == 1
        vec_store(S + v * LANES, even);
#else
        vec odd = exp_of(vec_sub(vec_load(S + (v + 1) * LANES), reference));
        sum = vec_add(sum, odd);
        store_down(S, LANES, v, even, odd);
#endif
    }
    vec_store(l, sum);
}

/* The rows of K or of V. */
struct few_rows {
    const void *data;
    const struct mfa_strides *strides;
    int64_t columns;
};

/* Keys of a strip, a part of a block: about FEW_STRIP bytes; or all, where tiles take terms from many rows in turn. */
static int64_t few_strip(const struct mfa_cpu_call *call, int R, const struct few_rows *rows)
{
    int64_t n = FEW_KEYS;
    while (few_whole_terms(R) && n > few_unit(R) && n * rows->columns * bytes_of(call->dtype) > FEW_STRIP)
        n /= 2;
    return n;
}

/* What to ask for while keys [k, k + n) of the block of `block` keys from `key` on are read: as many rows a strip
 * further on, and past the block those of `after` from key `then` on. If nothing follows, a row that there is, again
 * and again. */
static struct upcoming few_upcoming(const struct mfa_cpu_call *call, const struct chunk *c, int R, int64_t key,
                                    int64_t block, int64_t k, int64_t n, const struct few_rows *rows,
                                    const struct few_rows *after, int64_t then)
{
    k += few_strip(call, R, rows);
    const struct few_rows *next = k < block ? rows : after;
    int64_t from = k < block ? key + k : then + k - block;
    int last = from + mfa_cpu_ceil(n * rows->columns, next->columns) > call->args.kv_len || next->strides->column != 1;
    struct upcoming upcoming = upcoming_rows(call, c, last ? key : from, next->data, next->strides, next->columns);
    if (last)
        upcoming.gap = -upcoming.bytes;
    return upcoming;
}

/* S = factor * Q K^T for n keys, by tiles. The last one's missing keys are zeros. */
static void few_multiply(const struct mfa_cpu_call *call, const struct chunk *c, int64_t key, int64_t n, int R,
                         const term *Q, const struct few_rows *rows, const struct few_rows *after, int64_t then,
                         real factor, term *copy, real *S)
{
    int must_copy = !few_reads(R, rows->data, call->dtype, rows->strides);
    for (int64_t k = 0; k < n; k += FEW_SUMS) {
        int64_t some = n - k < FEW_SUMS ? n - k : FEW_SUMS;
        struct upcoming next = few_upcoming(call, c, R, key, n, k, FEW_SUMS, rows, after, then);
        struct lines K = lines_of(copy, rows->data, call->dtype, rows->strides, c->batch, c->kv_head, key + k, some,
                                  FEW_SUMS, rows->columns, must_copy);
        few_scores(R, Q, K, across_stride(rows->columns), factor, S + k * R, &next);
    }
}

/* O += P V, by strips. */
static void few_add(const struct mfa_cpu_call *call, const struct chunk *c, int64_t key, int64_t n, int R,
                    const term *P, const struct few_rows *rows, const struct few_rows *after, int64_t then, term *copy,
                    real *O)
{
    int64_t strip = few_strip(call, R, rows);
    for (int64_t k = 0; k < n; k += strip) {
        int64_t some = n - k < strip ? n - k : strip, whole = TERM > 1 ? few_whole(some, R) : some;
        struct upcoming next = few_upcoming(call, c, R, key, n, k, strip, rows, after, then);
        struct lines V = lines_of(copy, rows->data, call->dtype, rows->strides, c->batch, c->kv_head, key + k, some,
                                  whole, rows->columns, c->shrinks_V);
        if (c->shrinks_V)
            shrink_terms(copy, some * across_stride(rows->columns));
        few_outputs(R, P + k * R / TERM, V, whole, across_stride(rows->columns) * TERM, O, &next);
    }
}

/* m, l and O of the queries from their part `split` of the keys. */
static void few_attend(const struct mfa_cpu_call *call, const struct chunk *c, const struct few_scratch *s,
                       const struct panel *panel, int R, int64_t split, real *m, real *l)
{
    const struct mfa_args *a = &call->args;
    const int64_t e = across_stride(a->value_dim) * TERM;
    fill(s->S, FEW_KEYS * LANES, 0);
    fill(s->O, LANES * e, 0);
    fill(m, LANES, -REAL_MAX);
    fill(l, LANES, 0);

    const struct few_rows K = {call->k, &a->k, a->head_dim}, V = {call->v, &a->v, a->value_dim};
    struct range blocks = split_of(call, split, panel->any_low, panel->any_high, FEW_KEYS);
    for (int64_t j = blocks.from; j < blocks.to; j++) {
        int64_t key = j * FEW_KEYS, n = a->kv_len - key < FEW_KEYS ? a->kv_len - key : FEW_KEYS;
        enum visibility seen = panel_sees(panel, call, c->batch, key, n, s->mask_rows, s->mask_tile);
        if (seen == HIDDEN)
            continue;
        few_multiply(call, c, key, n, R, s->Q, &K, &V, key, (real)score_factor(call), s->K, s->S);
        few_adjust(call, panel, R, seen, key, n, s->S, s->mask, s->mask_tile, NULL);
        few_softmax(R, s->S, few_whole(n, R) * R / LANES, m, l, s->O, e);
        few_add(call, c, key, n, R, s->S, &V, &K, key + n, s->V, s->O);
    }
}

static void few(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct few_scratch s;
    few_carve(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    struct chunk c = chunk_of(call, task / call->splits);
    struct panel panel;
    chunk_panel(&c, a, 0, &panel);
    int R = few_width(panel.lanes);
    int64_t d = across_stride(a->head_dim), e = across_stride(a->value_dim) * TERM;
    real m[LANES], l[LANES];
    few_load(call, &panel, R, c.batch, call->q, &a->q, a->head_dim, s.rows);
    scale_queries(call, s.rows, R * d);
    few_pack(s.rows, d, R, s.Q);
    few_attend(call, &c, &s, &panel, R, task % call->splits, m, l);
    if (!all_finite(s.O, LANES * e)) { /* as in forward.h */
        c.shrinks_V = 1;
        few_attend(call, &c, &s, &panel, R, task % call->splits, m, l);
    }

    if (call->splits > 1)
        s.sums = (real *)(void *)((char *)call->partials + (uint64_t)task * partial_bytes(call));
    struct sums sums = sums_at(s.sums, a, 0);
    for (int i = R; i < LANES; i++)
        l[i % R] += l[i];
    transpose(s.O, e, sums.O, PANEL, LANES, padded(a->value_dim));
    memcpy(sums.m, m, sizeof m);
    memcpy(sums.l, l, sizeof l);
    *sums.unit = (real)ldexp(1, c.shrinks_V ? SHRINK_BITS : 0);
    if (call->splits == 1)
        finish_panel(call, &panel, c.batch, sums, (real *)s.rows);
}
