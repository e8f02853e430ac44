/* Forward where a KV head has few queries, as in a decode step, by blocks of keys:
 *
 *     for each block of keys, or part of one, that the queries see:
 *         S = score(Q K^T)
 *         m, l, O, P = softmax_step(S)
 *         O += P V
 *
 * Reading memory is what takes the time: K and V are read once for all query heads of a group, where they lie if they
 * can be (gemm/decode.h). S is [key][R]. Leaves its accumulators as forward does, for merge and epilogue. */

struct decode_scratch {
    packed *rows, *Q, *K, *V;
    real *S, *O, *acc, *bias_rows, *mask_rows, *bias;
    struct int16_queries int16;
};

static uint64_t decode_arena(const struct mfa_cpu_call *call, char *base, struct decode_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim);
    int64_t wide = padded(a->head_dim > a->value_dim ? a->head_dim : a->value_dim);
    const int biased = has_bias(call);
    uint64_t used = 0;
    s->Q = arena_alloc(base, &used, PANEL * d); /* this and the next as in forward_arena, for merge */
    s->rows = arena_alloc(base, &used, PANEL * wide);
    s->K = arena_alloc(base, &used, DECODE_ACCUMULATORS * d);
    s->V = arena_alloc(base, &used, DECODE_KEYS * e);
    s->S = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->O = arena_alloc(base, &used, LANES * interleaved_columns(a->value_dim));
    s->acc = arena_alloc(base, &used, accumulator_reals(a));
    s->bias_rows = arena_alloc(base, &used, biased ? DECODE_KEYS * LANES : 0);
    s->mask_rows = arena_alloc(base, &used, biased ? PANEL * DECODE_KEYS : 0);
    s->bias = arena_alloc(base, &used, biased ? PANEL * DECODE_KEYS : 0);
    s->int16.rows = (int32_t *)(void *)arena_alloc(base, &used, INT16_PRODUCTS ? LANES * d / 2 : 0);
    s->int16.units = arena_alloc(base, &used, INT16_PRODUCTS ? LANES : 0);
    return used;
}

static uint64_t decode_scratch(const struct mfa_cpu_call *call)
{
    struct decode_scratch s;
    return decode_arena(call, NULL, &s);
}

/* Whether Q K^T, or P V, may be products of integers: results of 16 bits hide their errors. L has 32 bits. */
static int decode_has_int16_values(const struct mfa_cpu_call *call)
{
    return INT16_PRODUCTS && is_half(call->out_dtype) && !call->o_low;
}

static int decode_has_int16_scores(const struct mfa_cpu_call *call)
{
    const int64_t d = call->args.head_dim;
    return decode_has_int16_values(call) && !call->lse && call->k_dtype == CPU_INT8 && d % INT16_COLUMNS == 0 &&
           d <= MAX_INT16_COLUMNS;
}

/* S of n keys from `key` on by products of integers; returns whether they lie so that it can be, and are exact
 * enough. */
static int decode_scores_int16(const struct decode_walk *w, int64_t key, int64_t n, real factor, real *S,
                               struct prefetch_cursor *next)
{
    const struct kv_source *K = w->source;
    if (!w->int16 || n < DECODE_ACCUMULATORS || !widens_codes(K) || kv_run(K, key, n) < n)
        return 0;
    const struct kv_rows rows = kv_code_rows(K, key);
    return rows.scaled_by_row && gemm_qk_int16(w->R, w->int16, rows, K->columns, factor, S, next);
}

/* S = factor * Q K^T for n keys of a block, by tiles; also dP = dO V^T. The last tile's missing keys are zeros. */
static void decode_scores(const struct decode_walk *w, const packed *Q, real factor, packed *copy, real *S)
{
    const struct kv_source *K = w->source;
    const int must_copy = !decode_reads_in_place(w->R, K->data, K->dtype, K->strides);
    for (int64_t k = 0; k < w->block; k += DECODE_ACCUMULATORS) {
        const int64_t rest = w->block - k, n = rest < DECODE_ACCUMULATORS ? rest : DECODE_ACCUMULATORS;
        struct prefetch_cursor next = decode_cursor(w, k, DECODE_ACCUMULATORS);
        if (decode_scores_int16(w, w->key + k, n, factor, S + k * w->R, &next))
            continue;
        const struct kv_rows rows = kv_load_rows(K, w->key + k, n, DECODE_ACCUMULATORS, must_copy, copy);
        gemm_qk_decode(w->R, Q, rows, row_packs(K->columns), factor, S + k * w->R, &next);
    }
}

/* O += P V, by chunks, which end where pages do, unless these are small or cut packs of keys: then rows are copied.
 * P is used up: rows' scales are multiplied into it. Also dQ += dS K. */
static void decode_outputs(const struct decode_walk *w, packed *P, packed *copy, real *O)
{
    const struct kv_source *V = w->source;
    const int64_t chunk = kv_chunk_keys(V, w->R);
    for (int64_t k = 0, n; k < w->block; k += n) {
        n = w->block - k < chunk ? w->block - k : chunk;
        const int64_t run = kv_run(V, w->key + k, n);
        n = run >= DECODE_ACCUMULATORS / 2 && decode_pv_keys(run, w->R) == run ? run : n;
        const int64_t whole = decode_pv_keys(n, w->R);
        struct prefetch_cursor next = decode_cursor(w, k, n);
        const struct kv_rows rows = kv_load_rows(V, w->key + k, n, whole, 0, copy);
        packed *these = P + k_packs(k * w->R);
        if (w->int16_values && gemm_pv_int16(w->R, these, rows, n, V->columns, O, &next))
            continue;
        if (is_codes(rows.dtype) && rows.scaled_by_row)
            scale_probabilities(w->R, rows, n, these);
        gemm_pv_decode(w->R, these, rows, whole, interleaved_columns(V->columns), O, &next);
    }
}

/* What the queries get from n keys from `key` on. */
static void decode_attend_keys(const struct mfa_cpu_call *call, const struct decode_scratch *s,
                               const struct panel *panel, const struct kv_source sources[2], int64_t key, int64_t n,
                               struct accumulators acc)
{
    const int R = decode_width(panel->lanes);
    const int64_t whole = round_up_decode_keys(n, R), vectors = whole * R / LANES;
    const enum block_mask seen = panel_bias(panel, call, key, n, s->mask_rows, s->bias);
    if (seen == BLOCK_EMPTY)
        return;
    const struct kv_source *K = &sources[0], *V = &sources[1];
    const struct int16_queries *int16 = decode_has_int16_scores(call) ? &s->int16 : NULL;
    const struct decode_walk of_K = {K, V, key, n, key, R, int16, 0};
    const struct decode_walk of_V = {V, K, key, n, key + n, R, NULL, decode_has_int16_values(call)};
    decode_scores(&of_K, s->Q, (real)score_factor(call), s->K, s->S);
    decode_score(
        call, panel, seen,
        (struct decode_tile){R, key, n, whole, s->S, NULL, s->bias_rows, seen == BLOCK_PARTIAL_BIAS ? s->bias : NULL});
    decode_softmax_step(R, s->S, vectors, acc, interleaved_columns(call->args.value_dim));
    decode_outputs(&of_V, decode_pack(s->S, vectors, s->S), s->V, acc.O);
}

/* m, l and O of the queries from their part of the keys. */
static void decode_attend(const struct mfa_cpu_call *call, const struct chunk *c, const struct decode_scratch *s,
                          const struct panel *panel, struct accumulators acc)
{
    const int64_t e = interleaved_columns(call->args.value_dim);
    fill(s->S, DECODE_KEYS * LANES, 0);
    fill(acc.O, LANES * e, 0);
    fill(acc.m, LANES, -REAL_MAX);
    fill(acc.l, LANES, 0);

    const struct kv_source sources[2] = {k_source(call, &c->seq, c->kv_head),
                                         v_source(call, &c->seq, c->kv_head, c->shrinks_V)};
    const struct range blocks =
        split_blocks(c->split, c->splits, (struct bounds){panel->any_low, panel->any_high}, DECODE_KEYS);
    for (int64_t j = blocks.from; j < blocks.to; j++) {
        const int64_t key = j * DECODE_KEYS, left = c->seq.kv_len - key, n = left < DECODE_KEYS ? left : DECODE_KEYS;
        struct range r, rest = {0, n};
        for (; r = map_range(call, panel_queries(panel), key, rest, 1), r.from < r.to; rest.from = r.to)
            decode_attend_keys(call, s, panel, sources, key + r.from, r.to - r.from, acc);
    }
}

static void decode(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct decode_scratch s;
    decode_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_PARTS, task);
    struct chunk c = chunk_of(call, &place, place.seq.splits);
    struct panel panel;
    chunk_panel(call, &c, 0, &panel);
    if (c.seq.kv_len == 0 && c.splits == 1) { /* rows of no sequence may be more than DECODE_ROWS */
        const struct accumulators none = accumulators_at(s.acc, a, 0);
        softmax_start(a, none, 0);
        softmax_epilogue(call, &panel, none, (real *)s.rows);
        return;
    }
    const int R = decode_width(panel.lanes);
    const int64_t d = row_packs(a->head_dim), e = interleaved_columns(a->value_dim);
    real m[LANES], l[LANES];
    const struct accumulators own = {s.O, m, l, NULL};
    panel_load(&panel, R, call->q, call->dtype, &a->q, a->head_dim, s.rows);
    scale_queries(call, s.rows, R * d);
    if (decode_has_int16_scores(call))
        quantize_queries(R, s.rows, d, a->head_dim, score_factor(call), &s.int16);
    pack_q_decode(s.rows, d, R, s.Q);
    decode_attend(call, &c, &s, &panel, own);
    if (!all_finite(s.O, LANES * e)) { /* as in forward.h */
        c.shrinks_V = 1;
        decode_attend(call, &c, &s, &panel, own);
    }

    if (c.splits > 1)
        s.acc = chunk_partial(call, &c, c.split);
    const struct accumulators acc = accumulators_at(s.acc, a, 0);
    for (int i = R; i < LANES; i++)
        l[i % R] += l[i];
    transpose(s.O, e, acc.O, PANEL, LANES, padded(a->value_dim));
    memcpy(acc.m, m, sizeof m);
    memcpy(acc.l, l, sizeof l);
    *acc.unit = unit_of(c.shrinks_V);
    if (c.splits == 1)
        softmax_epilogue(call, &panel, acc, (real *)s.rows);
}
