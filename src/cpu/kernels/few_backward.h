/* Backward for few queries, as few.h is forward: all queries of a KV head together, lanes along keys for S, P, dP and
 * dS, along columns for the rest. Each task owns the dK and dV of one block of keys, which no other query adds to:
 *
 *     for each part of the block:
 *         P = exp(S - L), S = Q K^T                           (softcap, mask, band)
 *         dS = P * (dP - D), dP = dO V^T                      (times 1 - tanh^2 with softcap)
 *         dV = P^T dO, dK = scale * dS^T Q, written at once;  dQ += dS K
 *     when the block after has added its part: dQ of the run += dQ */

struct few_backward_scratch {
    real *Q, *scaled_Q, *dO, *dQ; /* [FEW_ROWS][padded(dim)] */
    real *S, *dP, *slope;         /* [FEW_ROWS][FEW_KEYS]; P and dS in their places */
    real *dots, *K, *V, *row, *mask_rows, *mask_tile;
};

static uint64_t few_backward_carve(const struct mfa_cpu_call *call, char *base, struct few_backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim);
    int masked = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = carve(base, &used, FEW_ROWS * d);
    s->scaled_Q = carve(base, &used, FEW_ROWS * d);
    s->dO = carve(base, &used, FEW_ROWS * e);
    s->dQ = carve(base, &used, FEW_ROWS * d);
    s->S = carve(base, &used, FEW_ROWS * FEW_KEYS);
    s->dP = carve(base, &used, FEW_ROWS * FEW_KEYS);
    s->slope = carve(base, &used, FEW_ROWS * FEW_KEYS);
    s->dots = carve(base, &used, FEW_ROWS * LANES * LANES);
    s->K = carve(base, &used, FEW_KEYS * d);
    s->V = carve(base, &used, FEW_KEYS * e);
    s->row = carve(base, &used, d > e ? d : e);
    s->mask_rows = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    s->mask_tile = carve(base, &used, masked ? PANEL * FEW_KEYS : 0);
    return used;
}

static uint64_t few_backward_scratch(const struct mfa_cpu_call *call)
{
    struct few_backward_scratch s;
    return few_backward_carve(call, NULL, &s);
}

/* The panel's rows of Q or dO as reals, zeros beyond its lanes. */
static void few_load(const struct mfa_cpu_call *call, const struct panel *panel, int64_t batch, const void *data,
                     const struct mfa_strides *strides, int64_t columns, real *rows)
{
    int64_t stride = padded(columns);
    fill(rows, FEW_ROWS * stride, 0);
    for (int64_t i = 0; i < panel->lanes; i++)
        load_row(rows + i * stride, row_at(data, bytes_of(call->dtype), strides, batch, panel->head[i], panel->row[i]),
                 call->dtype, strides->column, columns);
}

/* P and dS of one query in the places of S and dP, n of them, in whole vectors. slope may be NULL. */
static void gradients_row(real *S, real *dP, const real *slope, int64_t n, real L, real D)
{
    for (int64_t k = 0; k < n; k += LANES) {
        vec P = probabilities(S + k, 1, vec_set1(L));
        vec dS = score_gradients(P, vec_load(dP + k), vec_set1(D), slope ? slope + k : NULL);
        vec_store(S + k, P);
        vec_store(dP + k, dS);
    }
}

#define WEIGH_START(n, R) vec sum_##n = vec_set1(0);
#define WEIGH(n, R) sum_##n = vec_fma(weight, vec_load(X + i * columns + c + (n) * LANES), sum_##n);
#define WEIGH_STORE(n, R) vec_store(to + c + (n) * LANES, vec_mul(sum_##n, vec_set1(factor)));

/* to = factor * the sum over i < rows of P[i] X[i]: P down a column of [FEW_ROWS][FEW_KEYS], X of whole vectors. */
static void weigh_rows(int64_t rows, const real *P, const real *X, int64_t columns, real factor, real *to)
{
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) {
        EACH_4(WEIGH_START, 1)
        for (int64_t i = 0; i < rows; i++) {
            vec weight = vec_set1(P[i * FEW_KEYS]);
            EACH_4(WEIGH, 1)
        }
        EACH_4(WEIGH_STORE, 1)
    }
    for (; c < columns; c += LANES) {
        EACH_1(WEIGH_START, 1)
        for (int64_t i = 0; i < rows; i++) {
            vec weight = vec_set1(P[i * FEW_KEYS]);
            EACH_1(WEIGH, 1)
        }
        EACH_1(WEIGH_STORE, 1)
    }
}

/* Row `key` of dK or dV. */
static void store_key(const struct mfa_cpu_call *call, void *to, const struct mfa_strides *strides, int64_t batch,
                      int64_t kv_head, int64_t key, const real *row, int64_t columns)
{
    store_row((char *)row_at(to, bytes_of(call->dtype), strides, batch, kv_head, key), call->dtype, strides->column,
              row, columns);
}

/* dK and dV of keys [key, key + n), from P and dS in s; zeros if the queries see none of them. */
static void few_keys(const struct mfa_cpu_call *call, const struct few_backward_scratch *s, int64_t rows, int64_t batch,
                     int64_t kv_head, int64_t key, int64_t n, int shown)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim);
    if (!shown)
        fill(s->row, d > e ? d : e, 0);
    for (int64_t k = 0; k < n && call->dv; k++) {
        if (shown)
            weigh_rows(rows, s->S + k, s->dO, e, 1, s->row);
        store_key(call, call->dv, &a->dv, batch, kv_head, key + k, s->row, a->value_dim);
    }
    for (int64_t k = 0; k < n && call->dk; k++) {
        if (shown)
            weigh_rows(rows, s->dP + k, s->Q, d, (real)call->scale, s->row);
        store_key(call, call->dk, &a->dk, batch, kv_head, key + k, s->row, a->head_dim);
    }
}

/* P and dS for keys [key, key + n), and their part of dQ. 0 if the queries see none of them. */
static int few_gradients(const struct mfa_cpu_call *call, struct few_backward_scratch *s, const struct panel *panel,
                         const struct keys *keys, int64_t key, int64_t n)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), rows = panel->lanes;
    enum visibility seen = rows_see(panel, call, keys->batch, key, n, s->mask_tile, s->mask_rows);
    if (seen == HIDDEN)
        return 0;
    struct lines K = lines_of(s->K, call->k, call->dtype, &a->k, keys->batch, keys->kv_head, key, n, a->head_dim);
    struct lines V = lines_of(s->V, call->v, call->dtype, &a->v, keys->batch, keys->kv_head, key, n, a->value_dim);
    for (int64_t k = 0; k < n; k += LANES) {
        int64_t some = n - k < LANES ? n - k : LANES;
        struct ahead none = {.left = 0};
        few_scores(rows, s->scaled_Q, line(K, k), some, d, s->dots, s->S + k, &none);
        few_scores(rows, s->dO, line(V, k), some, e, s->dots, s->dP + k, &none);
    }
    for (int64_t i = 0; i < rows; i++) {
        struct group g = group_of(call, keys->batch, panel->head[i], 0);
        real *S = s->S + i * FEW_KEYS, *slope = call->softcap > 0 ? s->slope : NULL;
        adjust_row(call, panel, i, seen, key, n, S, s->mask_rows + i * padded(n), slope);
        gradients_row(S, s->dP + i * FEW_KEYS, slope, padded(n), group_rows(call, &g, call->L)[panel->row[i]],
                      group_rows(call, &g, call->D)[panel->row[i]]);
    }
    few_outputs(rows, s->dP, K, n, d, s->dQ);
    return 1;
}

/* Waits until the blocks after this one have added to dQ of these queries, then adds this block's. */
static void few_add_dQ(const struct mfa_cpu_call *call, const struct few_backward_scratch *s, const struct panel *panel,
                       int64_t batch, int64_t block)
{
    int64_t columns = padded(call->args.head_dim), stride;
    struct group g = group_of(call, batch, panel->head[0], 0);
    _Atomic int64_t *turn = &call->progress[group_number(call, &g)];
    wait_for_turn(turn, block);
    for (int64_t i = 0; i < panel->lanes; i++) {
        g = group_of(call, batch, panel->head[i], 0);
        real *dQ = group_dQ(call, &g, &stride) + panel->row[i] * stride;
        if (block == g.to && panel->row[i] == 0)
            clear_dQ(call, &g);
        for (int64_t c = 0; c < columns; c += LANES)
            vec_store(dQ + c, vec_add(vec_load(dQ + c), vec_load(s->dQ + i * columns + c)));
        if (block == g.from && panel->row[i] + 1 == g.rows)
            finish_dQ(call, &g, NULL);
    }
    atomic_store_explicit(turn, block - 1, memory_order_release);
}

static void few_backward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct few_backward_scratch s;
    few_backward_carve(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t blocks = mfa_cpu_ceil(a->kv_len, call->block_kv), block = blocks - 1 - task % blocks, head = task / blocks;
    int64_t d = padded(a->head_dim);
    struct keys keys = keys_of(call, head / a->kv_heads, head % a->kv_heads, block);
    struct panel panel;
    panel_init(&panel, a, keys.kv_head, 0, a->group * a->q_len);
    few_load(call, &panel, keys.batch, call->q, &a->q, a->head_dim, s.Q);
    few_load(call, &panel, keys.batch, call->d_o, &a->d_o, a->value_dim, s.dO);
    memcpy(s.scaled_Q, s.Q, (size_t)(FEW_ROWS * d) * sizeof(real));
    scale_vectors(s.scaled_Q, FEW_ROWS * d, score_factor(call));
    fill(s.S, FEW_ROWS * FEW_KEYS, 0);
    fill(s.dP, FEW_ROWS * FEW_KEYS, 0);
    fill(s.dQ, FEW_ROWS * d, 0);
    for (int64_t key = keys.first, end = keys.first + keys.n; key < end; key += FEW_KEYS) {
        int64_t n = end - key < FEW_KEYS ? end - key : FEW_KEYS;
        int shown = few_gradients(call, &s, &panel, &keys, key, n);
        few_keys(call, &s, panel.lanes, keys.batch, keys.kv_head, key, n, shown);
    }
    struct group g = group_of(call, keys.batch, panel.head[0], 0);
    if (call->dq && g.from <= block && block <= g.to)
        few_add_dQ(call, &s, &panel, keys.batch, block);
}
