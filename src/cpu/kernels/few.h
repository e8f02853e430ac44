/* Forward for few queries, as in a decode step: so few that a vector of them would be mostly empty. Lanes run along the
 * columns of Q, K, V and O:
 *
 *     for each block of keys that the queries see:
 *         S = Q K^T, each a dot product                       (softcap, mask, band)
 *         if max(S) > m + SLACK: rescale; P = exp2(S - m), l += sum(P), O += P V
 *
 * Reading memory is what takes the time. K and V are read once for all query heads of a group, where they lie, and
 * converted in registers; what comes some rows later is asked for in time. Leaves its sums as forward does, for merge
 * and finish. */

struct few_scratch {
    real *Q, *S, *O, *m, *l;
    real *dots; /* [query][LANES keys]: a vector of partial sums each */
    real *K, *V, *sums, *rows, *mask_rows, *mask_tile;
};

static uint64_t few_carve(const struct mfa_cpu_call *call, char *base, struct few_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), wide = d > e ? d : e;
    int masked = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = carve(base, &used, LANES * d);
    s->S = carve(base, &used, LANES * FEW_KEYS);
    s->O = carve(base, &used, LANES * e);
    s->m = carve(base, &used, LANES);
    s->l = carve(base, &used, LANES);
    s->dots = carve(base, &used, FEW_ROWS * LANES * LANES);
    s->K = carve(base, &used, FEW_KEYS * d);
    s->V = carve(base, &used, FEW_KEYS * e);
    s->sums = carve(base, &used, sums_reals(a));
    s->rows = carve(base, &used, PANEL * wide);
    s->mask_rows = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    s->mask_tile = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    return used;
}

static uint64_t few_scratch(const struct mfa_cpu_call *call)
{
    struct few_scratch s;
    return few_carve(call, NULL, &s);
}

/* Softcap, mask, band, and the end of the keys, on the raw scores of one query; slope, if wanted, gets 1 - tanh^2. */
static void adjust_row(const struct mfa_cpu_call *call, const struct panel *panel, int64_t i, enum visibility seen,
                       int64_t key, int64_t n, real *S, const real *mask, real *slope)
{
    int vectors = (int)(padded(n) / LANES);
    if (call->softcap > 0)
        cap_scores(vectors, S, 0, 1, call->softcap * call->unit, slope);
    if (seen == MASKED)
        for (int64_t k = 0; k < vectors * LANES; k += LANES)
            vec_store(S + k, masked(vec_load(S + k), vec_load(mask + k)));
    int64_t from = panel->low[i] - key, to = panel->high[i] + 1 - key;
    from = from < 0 ? 0 : from < n ? from : n;
    to = to < from ? from : to < n ? to : n;
    fill(S, from, -(real)INFINITY);
    fill(S + to, vectors * LANES - to, -(real)INFINITY);
}

/* P in place of one query's scores, n of them, in whole vectors. */
static void softmax_row(real *S, int64_t n, real *m, real *l, real *O, int64_t columns)
{
    vec top = vec_load(S), sum = vec_set1(0);
    for (int64_t k = LANES; k < n; k += LANES)
        top = vec_max(top, vec_load(S + k));
    real most = horizontal_max(top);
    if (most > *m + SLACK) {
        vec alpha = vec_exp2(vec_set1(*m - most));
        for (int64_t d = 0; d < columns; d += LANES)
            vec_store(O + d, vec_mul(vec_load(O + d), alpha));
        sum = vec_mul(vec_set1(*l / LANES), alpha);
        *l = 0;
        *m = most;
    }
    for (int64_t k = 0; k < n; k += LANES) {
        vec p = vec_exp2(vec_sub(vec_load(S + k), vec_set1(*m)));
        sum = vec_add(sum, p);
        vec_store(S + k, p);
    }
    *l += horizontal_sum(sum);
}

/* What a block of keys adds to the sums of all queries. */
static void visit_keys(const struct mfa_cpu_call *call, struct few_scratch *s, const struct panel *panel,
                       const struct chunk *c, int64_t key, int64_t n, enum visibility seen)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), rows = panel->lanes;
    struct lines K = lines_of(s->K, call->k, call->dtype, &a->k, c->batch, c->kv_head, key, n, a->head_dim);
    struct lines V = lines_of(s->V, call->v, call->dtype, &a->v, c->batch, c->kv_head, key, n, a->value_dim);
    for (int64_t k = 0; k < n; k += LANES) {
        struct ahead ahead = {line(K, k + FEW_AHEAD), line(V, k + FEW_AHEAD), a->kv_len - key - k - FEW_AHEAD, d, e};
        few_scores(rows, s->Q, line(K, k), n - k < LANES ? n - k : LANES, d, s->dots, s->S + k, &ahead);
    }
    for (int64_t i = 0; i < rows; i++) {
        real *S = s->S + i * FEW_KEYS;
        adjust_row(call, panel, i, seen, key, n, S, s->mask_rows + i * padded(n), NULL);
        softmax_row(S, padded(n), &s->m[i], &s->l[i], s->O + i * e, e);
    }
    few_outputs(rows, s->S, V, n, e, s->O);
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
    int64_t d = padded(a->head_dim), e = padded(a->value_dim);
    fill(s.Q, LANES * d, 0);
    for (int64_t i = 0; i < panel.lanes; i++)
        load_row(s.Q + i * d, row_at(call->q, bytes_of(call->dtype), &a->q, c.batch, panel.head[i], panel.row[i]),
                 call->dtype, a->q.column, a->head_dim);
    scale_vectors(s.Q, LANES * d, score_factor(call));
    fill(s.S, LANES * FEW_KEYS, 0);
    fill(s.O, LANES * e, 0);
    fill(s.m, LANES, -REAL_MAX);
    fill(s.l, LANES, 0);

    struct range blocks = split_of(call, task % call->splits, panel.any_low, panel.any_high, FEW_KEYS);
    for (int64_t j = blocks.from; j < blocks.to; j++) {
        int64_t key = j * FEW_KEYS, n = a->kv_len - key < FEW_KEYS ? a->kv_len - key : FEW_KEYS;
        enum visibility seen = rows_see(&panel, call, c.batch, key, n, s.mask_tile, s.mask_rows);
        if (seen != HIDDEN)
            visit_keys(call, &s, &panel, &c, key, n, seen);
    }

    if (call->splits > 1)
        s.sums = (real *)(void *)((char *)call->partials + (uint64_t)task * partial_bytes(call));
    struct sums sums = sums_at(s.sums, a, 0);
    transpose(s.O, e, sums.O, PANEL, LANES, e);
    memcpy(sums.m, s.m, LANES * sizeof(real));
    memcpy(sums.l, s.l, LANES * sizeof(real));
    if (call->splits == 1)
        finish_panel(call, &panel, c.batch, sums, s.rows);
}
