/* Backward for few queries, as few.h is forward: all queries of a KV head together, lanes along keys for S, P, dP and
 * dS, along columns for the rest. Each task owns the dK and dV of one block of keys, which no other query adds to:
 *
 *     for each part of the block:
 *         P = exp(S - L), S = Q K^T                           (softcap, mask, band)
 *         dS = P * (dP - D), dP = dO V^T                      (times 1 - tanh^2 with softcap)
 *         dV = P^T dO, dK = scale * dS^T Q, written at once;  dQ += dS K
 *     when the block after has added its part: dQ of the run += dQ */

struct decode_backward_scratch {
    real *Q, *dO, *dQ;              /* [FEW_ROWS][padded(dim)] */
    packed *Q_pack, *dO_pack, *terms; /* for scores; of dS, down */
    real *S, *dP, *dtanh;           /* [FEW_KEYS][R]; P and dS in their places */
    packed *rows, *K, *K_lines;
    real *row, *mask, *mask_rows, *mask_tile;
};

static uint64_t decode_backward_arena(const struct mfa_cpu_call *call, char *base, struct decode_backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim), wide = d > e ? d : e;
    int has_mask = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = arena_alloc(base, &used, DECODE_ROWS * padded(a->head_dim));
    s->dO = arena_alloc(base, &used, DECODE_ROWS * padded(a->value_dim));
    s->dQ = arena_alloc(base, &used, DECODE_ROWS * d * K_PACK);
    s->Q_pack = arena_alloc(base, &used, LANES * d);
    s->dO_pack = arena_alloc(base, &used, LANES * e);
    s->terms = arena_alloc(base, &used, K_PACK > 1 ? DECODE_KEYS * LANES / K_PACK : 0);
    s->S = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->dP = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->dtanh = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->rows = arena_alloc(base, &used, LANES * wide);
    s->K = arena_alloc(base, &used, DECODE_ACCUMULATORS * wide);
    s->K_lines = arena_alloc(base, &used, DECODE_KEYS * d);
    s->row = arena_alloc(base, &used, wide * K_PACK);
    s->mask = arena_alloc(base, &used, has_mask ? DECODE_KEYS * LANES : 0);
    s->mask_rows = arena_alloc(base, &used, has_mask ? PANEL * DECODE_KEYS : 0);
    s->mask_tile = arena_alloc(base, &used, has_mask ? PANEL * DECODE_KEYS : 0);
    return used;
}

static uint64_t decode_backward_scratch(const struct mfa_cpu_call *call)
{
    struct decode_backward_scratch s;
    return decode_backward_arena(call, NULL, &s);
}

/* The same as reals; none for those that there are not. */
static void load_reals(const struct mfa_cpu_call *call, const struct panel *panel, int64_t batch, const void *data,
                       const struct mfa_strides *s, int64_t columns, real *rows)
{
    for (int64_t i = 0; i < panel->lanes; i++)
        load_row(rows + i * padded(columns),
                 row_at(data, bytes_of(call->dtype), s, batch, panel->head[i], panel->row[i]), call->dtype, s->column,
                 columns);
}

/* P and dS in the places of S and dP, and dS as terms down. slope may be NULL. */
static void decode_gradients(int64_t vectors, real *S, real *dP, const real *dtanh, vec L, vec D, packed *terms)
{
    for (int64_t v = 0; v < vectors; v++) {
        int64_t at = v * LANES;
        vec P = probabilities(S + at, 1, L);
        vec_store(dP + at, score_gradients(P, vec_load(dP + at), D, dtanh ? dtanh + at : NULL));
        vec_store(S + at, P);
    }
    for (int64_t v = 0; K_PACK > 1 && v < vectors; v += K_PACK)
        store_b_pair(terms, LANES, v, vec_load(dP + v * LANES), vec_load(dP + (v + 1) * LANES));
}

#define WEIGH_START(n, R) vec sum_##n = vec_set1(0);
#define WEIGH(n, R) sum_##n = vec_fma(weight, vec_load(X + i * columns + c + (n) * LANES), sum_##n);
#define WEIGH_STORE(n, R) vec_store(to + c + (n) * LANES, vec_mul(sum_##n, vec_set1(factor)));

/* to = scale * the sum over i < rows of P[i] X[i]: X of whole vectors. */
static void weigh_rows(int64_t rows, const real *P, const real *X, int64_t columns, double scale, real *to)
{
    const struct factors f = factors_of(scale);
    const real factor = f.first;
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) {
        UNROLL_4(WEIGH_START, 1)
        for (int64_t i = 0; i < rows; i++) {
            vec weight = vec_set1(P[i]);
            UNROLL_4(WEIGH, 1)
        }
        UNROLL_4(WEIGH_STORE, 1)
    }
    for (; c < columns; c += LANES) {
        UNROLL_1(WEIGH_START, 1)
        for (int64_t i = 0; i < rows; i++) {
            vec weight = vec_set1(P[i]);
            UNROLL_1(WEIGH, 1)
        }
        UNROLL_1(WEIGH_STORE, 1)
    }
    if (f.second != 1)
        scale_vectors(to, columns, (double)f.second);
}

/* Row `key` of dK or dV. */
static void store_key(const struct mfa_cpu_call *call, void *to, const struct mfa_strides *strides, int64_t batch,
                      int64_t kv_head, int64_t key, const real *row, int64_t columns)
{
    store_row((char *)row_at(to, bytes_of(call->dtype), strides, batch, kv_head, key), call->dtype, strides->column,
              row, columns);
}

/* dK and dV of keys [key, key + n), from P and dS in s; zeros if the queries see none of them. */
static void decode_keys(const struct mfa_cpu_call *call, const struct decode_backward_scratch *s, int64_t rows,
                        int64_t batch, int64_t kv_head, int64_t key, int64_t n, int R, int shown)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim);
    if (!shown)
        fill(s->row, d > e ? d : e, 0);
    for (int64_t k = 0; k < n && call->dv; k++) {
        if (shown)
            weigh_rows(rows, s->S + k * R, s->dO, e, 1, s->row);
        store_key(call, call->dv, &a->dv, batch, kv_head, key + k, s->row, a->value_dim);
    }
    for (int64_t k = 0; k < n && call->dk; k++) {
        if (shown)
            weigh_rows(rows, s->dP + k * R, s->Q, d, call->scale / call->dS_factor, s->row);
        store_key(call, call->dk, &a->dk, batch, kv_head, key + k, s->row, a->head_dim);
    }
}

/* P and dS for keys [key, key + n), and their part of dQ. 0 if the queries see none of them. */
static int decode_backward_keys(const struct mfa_cpu_call *call, struct decode_backward_scratch *s,
                                const struct panel *panel, int R, const struct keys *keys, int64_t key, int64_t n,
                                const real *L, const real *D)
{
    const struct mfa_args *a = &call->args;
    const struct chunk c = {.batch = keys->batch, .kv_head = keys->kv_head};
    enum block_mask seen = panel_block_mask(panel, call, keys->batch, key, n, s->mask_rows, s->mask_tile);
    if (seen == BLOCK_EMPTY)
        return 0;
    real *dtanh = call->softcap > 0 ? s->dtanh : NULL;
    const struct decode_rows K = {call->k, &a->k, a->head_dim}, V = {call->v, &a->v, a->value_dim};
    decode_scores(call, &c, key, n, R, s->Q_pack, &K, &V, key, (real)score_factor(call), s->K, s->S);
    decode_scores(call, &c, key, n, R, s->dO_pack, &V, &K, key + n, 1, s->K, s->dP);
    decode_score(call, panel, R, seen, key, n, s->S, s->mask, s->mask_tile, dtanh);
    decode_gradients(round_up_decode_keys(n, R) * R / LANES, s->S, s->dP, dtanh, vec_load(L), vec_load(D), s->terms);
    decode_outputs(call, &c, key, n, R, K_PACK > 1 ? s->terms : s->dP, &K, &V, key, s->K_lines, s->dQ);
    return 1;
}

/* Waits until the blocks after this one have added to dQ of these queries, then adds this block's. */
static void decode_add_dQ(const struct mfa_cpu_call *call, const struct decode_backward_scratch *s,
                          const struct panel *panel, int64_t batch, int64_t block)
{
    int64_t columns = padded(call->args.head_dim), width = row_packs(call->args.head_dim) * K_PACK, stride;
    struct q_block g = q_block_of(call, batch, panel->head[0], 0);
    _Atomic int64_t *turn = &call->dq_semaphore[q_block_index(call, &g)];
    dq_wait_order(turn, block);
    for (int64_t i = 0; i < panel->lanes; i++) {
        g = q_block_of(call, batch, panel->head[i], 0);
        real *dQ = q_block_dQ(call, &g, &stride) + panel->row[i] * stride;
        if (block == g.to && panel->row[i] == 0)
            clear_dQ(call, &g);
        for (int64_t c = 0; c < columns; c += LANES)
            vec_store(dQ + c, vec_add(vec_load(dQ + c), vec_load(s->dQ + i * width + c)));
        if (block == g.from && panel->row[i] + 1 == g.rows)
            epilogue_dQ(call, &g, NULL);
    }
    atomic_store_explicit(turn, block - 1, memory_order_release);
}

static void decode_backward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct decode_backward_scratch s;
    decode_backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t blocks = mfa_cpu_ceil(a->kv_len, call->block_kv), block = blocks - 1 - task % blocks, head = task / blocks;
    struct keys keys = keys_of(call, head / a->kv_heads, head % a->kv_heads, block);
    struct panel panel;
    panel_init(&panel, a, keys.kv_head, 0, a->group * a->q_len);
    int R = decode_width(panel.lanes);
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim);
    load_reals(call, &panel, keys.batch, call->q, &a->q, a->head_dim, s.Q);
    load_reals(call, &panel, keys.batch, call->d_o, &a->d_o, a->value_dim, s.dO);
    load_small_q(call, &panel, R, keys.batch, call->q, &a->q, a->head_dim, s.rows);
    scale_queries(call, s.rows, R * d);
    pack_q_small(s.rows, d, R, s.Q_pack);
    load_small_q(call, &panel, R, keys.batch, call->d_o, &a->d_o, a->value_dim, s.rows);
    scale_gradients(call, s.rows, R * e);
    pack_q_small(s.rows, e, R, s.dO_pack);
    real L[LANES] = {0}, D[LANES] = {0};
    for (int i = 0; i < LANES; i++)
        if (i % R < panel.lanes) {
            struct q_block g = q_block_of(call, keys.batch, panel.head[i % R], 0);
            L[i] = *q_block_L(call, &g, panel.row[i % R]);
            D[i] = *q_block_D(call, &g, panel.row[i % R]);
        }
    fill(s.S, DECODE_KEYS * LANES, 0);
    fill(s.dP, DECODE_KEYS * LANES, 0);
    fill(s.dQ, DECODE_ROWS * d * K_PACK, 0);
    for (int64_t key = keys.first, end = keys.first + keys.n; key < end; key += DECODE_KEYS) {
        int64_t n = end - key < DECODE_KEYS ? end - key : DECODE_KEYS;
        int shown = decode_backward_keys(call, &s, &panel, R, &keys, key, n, L, D);
        decode_keys(call, &s, panel.lanes, keys.batch, keys.kv_head, key, n, R, shown);
    }
    struct q_block g = q_block_of(call, keys.batch, panel.head[0], 0);
    if (call->dq && g.from <= block && block <= g.to)
        decode_add_dQ(call, &s, &panel, keys.batch, block);
}
