/* Backward for few queries, as decode.h is forward: all queries of a KV head together, lanes along keys for S, P, dP
 * and dS, along columns for the rest. Each task owns the dK and dV of one block of keys, which no other query adds to:
 *
 *     for each part of the block:
 *         P = exp(S - L), S = score(Q K^T)
 *         dS = P * (dP - D), dP = dO V^T                      (times 1 - tanh^2 with softcap)
 *         dV = P^T dO, dK = scale * dS^T Q, written at once;  dQ += dS K
 *     when the block after has added its part: dQ of the run += dQ */

struct decode_backward_scratch {
    real *Q, *dO, *dQ;        /* [DECODE_ROWS][padded(dim)] */
    packed *Q_pack, *dO_pack; /* for scores */
    packed *dS_pack;          /* for dQ; or it lies in the place of dS */
    real *S, *dP, *dtanh;     /* [DECODE_KEYS][R]; P and dS in their places */
    packed *rows, *K, *K_rows;
    real *row, *bias_rows, *mask_rows, *bias;
};

static uint64_t decode_backward_arena(const struct mfa_cpu_call *call, char *base, struct decode_backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim), wide = d > e ? d : e;
    const int biased = has_bias(call);
    uint64_t used = 0;
    s->Q = arena_alloc(base, &used, DECODE_ROWS * padded(a->head_dim));
    s->dO = arena_alloc(base, &used, DECODE_ROWS * padded(a->value_dim));
    s->dQ = arena_alloc(base, &used, DECODE_ROWS * interleaved_columns(a->head_dim));
    s->Q_pack = arena_alloc(base, &used, LANES * d);
    s->dO_pack = arena_alloc(base, &used, LANES * e);
    s->dS_pack = arena_alloc(base, &used, INTERLEAVED_IN_PLACE ? 0 : k_packs(DECODE_KEYS) * LANES);
    s->S = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->dP = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->dtanh = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->rows = arena_alloc(base, &used, LANES * wide);
    s->K = arena_alloc(base, &used, DECODE_ACCUMULATORS * wide);
    s->K_rows = arena_alloc(base, &used, DECODE_KEYS * d);
    s->row = arena_alloc(base, &used, wide * PACK_ELEMENTS);
    s->bias_rows = arena_alloc(base, &used, biased ? DECODE_KEYS * LANES : 0);
    s->mask_rows = arena_alloc(base, &used, biased ? PANEL * DECODE_KEYS : 0);
    s->bias = arena_alloc(base, &used, biased ? PANEL * DECODE_KEYS : 0);
    return used;
}

static uint64_t decode_backward_scratch(const struct mfa_cpu_call *call)
{
    struct decode_backward_scratch s;
    return decode_backward_arena(call, NULL, &s);
}

/* The panel's rows of a tensor of queries as reals. */
static void load_reals(const struct mfa_cpu_call *call, const struct panel *panel, const void *data,
                       const struct mfa_strides *s, int64_t columns, real *rows)
{
    for (int64_t i = 0; i < panel->lanes; i++)
        load_row(rows + i * padded(columns), panel_row(panel, data, bytes_of(call->dtype), s, i), call->dtype,
                 s->column, columns);
}

/* P and dS in the places of S and dP. dtanh may be NULL. */
static void decode_gradients(int64_t vectors, real *S, real *dP, const real *dtanh, vec L, vec D)
{
    for (int64_t at = 0; at < vectors * LANES; at += LANES) {
        vec P = probabilities(vec_load(S + at), 1, L);
        vec_store(dP + at, score_gradient(P, vec_load(dP + at), D, dtanh ? dtanh + at : NULL));
        vec_store(S + at, P);
    }
}

/* to = scale * the sum over i < rows of P[i] X[i]: X of whole vectors. */
static void weigh_rows(int64_t rows, const real *P, const real *X, int64_t columns, double scale, real *to)
{
    const struct factors f = factors_of(scale);
    const vec factor = vec_set1(f.first);
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) {
        vec acc_0 = vec_set1(0), acc_1 = acc_0, acc_2 = acc_0, acc_3 = acc_0;
        for (int64_t i = 0; i < rows; i++) {
            const real *x = X + i * columns + c;
            vec weight = vec_set1(P[i]);
            acc_0 = vec_fma(weight, vec_load(x), acc_0);
            acc_1 = vec_fma(weight, vec_load(x + LANES), acc_1);
            acc_2 = vec_fma(weight, vec_load(x + 2 * LANES), acc_2);
            acc_3 = vec_fma(weight, vec_load(x + 3 * LANES), acc_3);
        }
        vec_store(to + c, vec_mul(acc_0, factor));
        vec_store(to + c + LANES, vec_mul(acc_1, factor));
        vec_store(to + c + 2 * LANES, vec_mul(acc_2, factor));
        vec_store(to + c + 3 * LANES, vec_mul(acc_3, factor));
    }
    for (; c < columns; c += LANES) {
        vec acc = vec_set1(0);
        for (int64_t i = 0; i < rows; i++)
            acc = vec_fma(vec_set1(P[i]), vec_load(X + i * columns + c), acc);
        vec_store(to + c, vec_mul(acc, factor));
    }
    if (f.second != 1)
        scale_vectors(to, columns, (double)f.second);
}

/* Row `key` of dK or dV. */
static void store_key(const struct mfa_cpu_call *call, void *to, const struct mfa_strides *strides,
                      const struct keys *keys, int64_t key, const real *row, int64_t columns)
{
    store_row((char *)kv_row_of(keys->seq, to, bytes_of(call->out_dtype), strides, keys->kv_head, key), call->out_dtype,
              strides->column, row, columns);
}

/* Keys [key, key + n) of a block, and the queries that are all one panel. */
struct decode_step {
    const struct panel *panel;
    const struct keys *keys;
    int R;
    int64_t key, n;
};

/* dK and dV of the keys, from P and dS in s; zeros if the queries see none of them. */
static void store_dK_dV(const struct mfa_cpu_call *call, const struct decode_backward_scratch *s,
                        const struct decode_step *step, int seen)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = padded(a->head_dim), e = padded(a->value_dim), rows = step->panel->lanes;
    if (!seen)
        fill(s->row, d > e ? d : e, 0);
    for (int64_t k = 0; k < step->n && call->dv; k++) {
        if (seen)
            weigh_rows(rows, s->S + k * step->R, s->dO, e, 1, s->row);
        store_key(call, call->dv, &a->dv, step->keys, step->key + k, s->row, a->value_dim);
    }
    for (int64_t k = 0; k < step->n && call->dk; k++) {
        if (seen)
            weigh_rows(rows, s->dP + k * step->R, s->Q, d, call->scale / call->dS_factor, s->row);
        store_key(call, call->dk, &a->dk, step->keys, step->key + k, s->row, a->head_dim);
    }
}

/* P and dS for the keys, and their part of dQ. 0 if the queries see none of them. */
static int decode_backward_keys(const struct mfa_cpu_call *call, const struct decode_backward_scratch *s,
                                const struct decode_step *step, const real *L, const real *D)
{
    const int R = step->R;
    const int64_t key = step->key, n = step->n, whole = round_up_decode_keys(n, R), vectors = whole * R / LANES;
    const enum block_mask seen = panel_bias(step->panel, call, key, n, s->mask_rows, s->bias);
    if (seen == BLOCK_EMPTY)
        return 0;
    real *dtanh = call->softcap > 0 ? s->dtanh : NULL;
    const struct kv_source K = k_source(call, step->keys->seq, step->keys->kv_head);
    const struct kv_source V = v_source(call, step->keys->seq, step->keys->kv_head, 0);
    const struct decode_walk of_K = {&K, &V, key, n, key, R, NULL, 0}, of_V = {&V, &K, key, n, key + n, R, NULL, 0};
    decode_scores(&of_K, s->Q_pack, (real)score_factor(call), s->K, s->S);
    decode_scores(&of_V, s->dO_pack, 1, s->K, s->dP);
    decode_score(
        call, step->panel, seen,
        (struct decode_tile){R, key, n, whole, s->S, dtanh, s->bias_rows, seen == BLOCK_PARTIAL_BIAS ? s->bias : NULL});
    decode_gradients(vectors, s->S, s->dP, dtanh, vec_load(L), vec_load(D));
    decode_outputs(&of_K, decode_pack(s->dP, vectors, s->dS_pack), s->K_rows, s->dQ);
    return 1;
}

/* Waits until the blocks after this one have added to dQ of these queries, then adds this block's. */
static void decode_add_dQ(const struct mfa_cpu_call *call, const struct decode_backward_scratch *s,
                          const struct panel *panel, int64_t block)
{
    const int64_t columns = padded(call->args.head_dim), width = interleaved_columns(call->args.head_dim);
    struct q_block q = q_block_of(call, panel->seq, panel->head[0], 0);
    _Atomic int64_t *semaphore = &call->dq_semaphore[q_block_index(&q)];
    dq_wait_order(semaphore, block);
    for (int64_t i = 0; i < panel->lanes; i++) {
        q = q_block_of(call, panel->seq, panel->head[i], 0);
        if (block == q.kv_blocks.last && panel->row[i] == 0)
            clear_dQ(call, &q);
        real *dQ = matrix_from(q_block_dQ(call, &q), panel->row[i], 0).data;
        for (int64_t c = 0; c < columns; c += LANES)
            vec_store(dQ + c, vec_add(vec_load(dQ + c), vec_load(s->dQ + i * width + c)));
        if (block == q.kv_blocks.first && panel->row[i] + 1 == q.rows)
            dQ_epilogue(call, &q, NULL);
    }
    dq_pass_order(semaphore, block - 1);
}

static void decode_backward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct decode_backward_scratch s;
    decode_backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_KV_BLOCKS, task);
    const struct mfa_cpu_sequence *seq = &place.seq;
    const int64_t block = seq->of_head[CPU_KV_BLOCKS] - 1 - place.index;
    const struct keys keys = keys_of(call, seq, place.head, block);
    struct panel panel;
    if (seq->q_len == 0) {
        const struct decode_step all = {&panel, &keys, 0, keys.first, keys.n};
        panel.lanes = 0;
        store_dK_dV(call, &s, &all, 0);
        return;
    }
    panel_init(&panel, seq, a, keys.kv_head, 0, a->q_heads_per_kv * seq->q_len);
    const int R = decode_width(panel.lanes);
    const int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim);
    load_reals(call, &panel, call->q, &a->q, a->head_dim, s.Q);
    load_reals(call, &panel, call->d_o, &a->d_o, a->value_dim, s.dO);
    panel_load(&panel, R, call->q, call->dtype, &a->q, a->head_dim, s.rows);
    scale_queries(call, s.rows, R * d);
    pack_q_decode(s.rows, d, R, s.Q_pack);
    panel_load(&panel, R, call->d_o, call->dtype, &a->d_o, a->value_dim, s.rows);
    scale_gradients(call, s.rows, R * e);
    pack_q_decode(s.rows, e, R, s.dO_pack);
    real L[LANES] = {0}, D[LANES] = {0};
    for (int i = 0; i < LANES; i++)
        if (i % R < panel.lanes) {
            const struct q_block q = q_block_of(call, seq, panel.head[i % R], 0);
            L[i] = *q_block_L(call, &q, panel.row[i % R]);
            D[i] = *q_block_D(call, &q, panel.row[i % R]);
        }
    fill(s.S, DECODE_KEYS * LANES, 0);
    fill(s.dP, DECODE_KEYS * LANES, 0);
    fill(s.dQ, DECODE_ROWS * interleaved_columns(a->head_dim), 0);
    for (int64_t key = keys.first, end = keys.first + keys.n; key < end; key += DECODE_KEYS) {
        struct range r, rest = {0, end - key < DECODE_KEYS ? end - key : DECODE_KEYS};
        for (; rest.from < rest.to; rest.from = r.to) {
            r = map_range(call, panel_queries(&panel), key, rest, 1);
            const struct decode_step hidden = {&panel, &keys, R, key + rest.from, r.from - rest.from};
            const struct decode_step step = {&panel, &keys, R, key + r.from, r.to - r.from};
            store_dK_dV(call, &s, &hidden, 0);
            if (r.from < r.to)
                store_dK_dV(call, &s, &step, decode_backward_keys(call, &s, &step, L, D));
        }
    }
    const struct q_block q = q_block_of(call, seq, panel.head[0], 0);
    if (call->dq && q.kv_blocks.first <= block && block <= q.kv_blocks.last)
        decode_add_dQ(call, &s, &panel, block);
}
