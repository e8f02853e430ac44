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

struct decode_scratch {
    packed *rows, *Q, *K, *V;
    real *S, *O, *sums, *mask, *mask_rows, *mask_tile;
};

static uint64_t decode_arena(const struct mfa_cpu_call *call, char *base, struct decode_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim);
    int64_t wide = padded(a->head_dim > a->value_dim ? a->head_dim : a->value_dim);
    int has_mask = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = arena_alloc(base, &used, PANEL * d); /* this and the next as in forward_carve, for merge */
    s->rows = arena_alloc(base, &used, PANEL * wide);
    s->K = arena_alloc(base, &used, DECODE_ACCUMULATORS * d);
    s->V = arena_alloc(base, &used, DECODE_KEYS * e);
    s->S = arena_alloc(base, &used, DECODE_KEYS * LANES);
    s->O = arena_alloc(base, &used, LANES * e * K_PACK);
    s->sums = arena_alloc(base, &used, accumulator_reals(a));
    s->mask = arena_alloc(base, &used, has_mask ? DECODE_KEYS * LANES : 0);
    s->mask_rows = arena_alloc(base, &used, has_mask ? PANEL * DECODE_KEYS : 0);
    s->mask_tile = arena_alloc(base, &used, has_mask ? PANEL * DECODE_KEYS : 0);
    return used;
}

static uint64_t decode_scratch(const struct mfa_cpu_call *call)
{
    struct decode_scratch s;
    return decode_arena(call, NULL, &s);
}

/* The panel's rows of a tensor of queries, R of them, terms across; zeros for those that there are not. */
static void load_small_q(const struct mfa_cpu_call *call, const struct panel *panel, int R, int64_t batch,
                         const void *data, const struct mfa_strides *s, int64_t columns, packed *rows)
{
    int64_t stride = row_packs(columns);
    for (int64_t i = 0; i < panel->lanes; i++)
        load_packs(rows + i * stride, row_at(data, bytes_of(call->dtype), s, batch, panel->head[i], panel->row[i]),
                   call->dtype, s->column, columns);
    fill(rows + panel->lanes * stride, (R - panel->lanes) * stride, 0);
}

/* Softcap, mask, band, and the end of the keys, on the raw scores of n keys; slope, if wanted, gets 1 - tanh^2. mask is
 * room for as many. */
static void decode_score(const struct mfa_cpu_call *call, const struct panel *panel, int R, enum block_mask seen,
                         int64_t key, int64_t n, real *S, real *mask, const real *mask_tile, real *dtanh)
{
    int64_t whole = round_up_decode_keys(n, R), vectors = whole * R / LANES;
    if (call->softcap > 0)
        softcap_scores((int)vectors, S, 0, 1, call->softcap, dtanh);
    if (seen == BLOCK_MASKED) {
        for (int64_t k = 0; k < n; k++)
            memcpy(mask + k * R, mask_tile + k * PANEL, (size_t)R * sizeof(real));
        fill(mask + n * R, (whole - n) * R, 0);
        for (int64_t i = 0; i < vectors * LANES; i += LANES)
            vec_store(S + i, add_mask(vec_load(S + i), vec_load(mask + i)));
    }
    for (int r = 0; r < R && seen != BLOCK_FULL; r++)
        for (int64_t k = 0; k < n; k++)
            if (key + k < panel->low[r] || key + k > panel->high[r])
                S[k * R + r] = -(real)INFINITY;
    fill(S + n * R, (whole - n) * R, -(real)INFINITY);
}

/* Makes m the maximum `top` of each query that exceeds it by more than SLACK. */
static void decode_rescale(int R, vec top, real *m, real *l, real *O, int64_t columns)
{
    real most[LANES], alpha[LANES];
    vec_store(most, top);
    for (int i = R; i < LANES; i++)
        most[i % R] = most[i] > most[i % R] ? most[i] : most[i % R];
    for (int i = 0; i < LANES; i++)
        most[i] = most[i % R] > m[i] + RESCALE_THRESHOLD ? most[i % R] : m[i];
    vec factor = exp_of(vec_sub(vec_load(m), vec_load(most)));
    vec_store(alpha, factor);
    vec_store(l, vec_mul(vec_load(l), factor));
    memcpy(m, most, sizeof most);
    for (int r = 0; r < R; r++)
        scale_vectors(O + r * columns, columns, alpha[r]);
}

/* P in place of the scores: terms down, in vectors. */
static void decode_softmax_step(int R, real *S, int64_t vectors, real *m, real *l, real *O, int64_t columns)
{
    vec top = vec_load(S), sum = vec_load(l);
    for (int64_t v = 1; v < vectors; v++)
        top = vec_max(top, vec_load(S + v * LANES));
    if (vec_any_less(vec_add(vec_load(m), vec_set1(RESCALE_THRESHOLD)), top)) {
        decode_rescale(R, top, m, l, O, columns);
        sum = vec_load(l);
    }
    vec reference = vec_load(m);
    for (int64_t v = 0; v < vectors; v += K_PACK) {
        vec even = exp_of(vec_sub(vec_load(S + v * LANES), reference));
        sum = vec_add(sum, even);
#if K_PACK == 1
        vec_store(S + v * LANES, even);
#else
        vec odd = exp_of(vec_sub(vec_load(S + (v + 1) * LANES), reference));
        sum = vec_add(sum, odd);
        store_b_pair(S, LANES, v, even, odd);
#endif
    }
    vec_store(l, sum);
}

/* The rows of K or of V. */
struct decode_rows {
    const void *data;
    const struct mfa_strides *strides;
    int64_t columns;
};

/* Keys of a strip, a part of a block: about FEW_STRIP bytes; or all, where tiles take terms from many rows in turn. */
static int64_t kv_chunk_keys(const struct mfa_cpu_call *call, int R, const struct decode_rows *rows)
{
    int64_t n = DECODE_KEYS;
    while (decode_has_whole_vectors(R) && n > decode_key_unit(R) &&
           n * rows->columns * bytes_of(call->dtype) > DECODE_CHUNK_BYTES)
        n /= 2;
    return n;
}

/* What to ask for while keys [k, k + n) of the block of `block` keys from `key` on are read: as many rows a strip
 * further on, and past the block those of `after` from key `then` on. If nothing follows, a row that there is, again
 * and again. */
static struct prefetch_cursor decode_cursor(const struct mfa_cpu_call *call, const struct chunk *c, int R, int64_t key,
                                            int64_t block, int64_t k, int64_t n, const struct decode_rows *rows,
                                            const struct decode_rows *after, int64_t then)
{
    k += kv_chunk_keys(call, R, rows);
    const struct decode_rows *next = k < block ? rows : after;
    int64_t from = k < block ? key + k : then + k - block;
    int last = from + mfa_cpu_ceil(n * rows->columns, next->columns) > call->args.kv_len || next->strides->column != 1;
    struct prefetch_cursor cursor = kv_cursor(call, c, last ? key : from, next->data, next->strides, next->columns);
    if (last)
        cursor.gap = -cursor.bytes;
    return cursor;
}

/* S = factor * Q K^T for n keys, by tiles. The last one's missing keys are zeros. */
static void decode_scores(const struct mfa_cpu_call *call, const struct chunk *c, int64_t key, int64_t n, int R,
                          const packed *Q, const struct decode_rows *rows, const struct decode_rows *after,
                          int64_t then, real factor, packed *copy, real *S)
{
    int must_copy = !reads_in_place(R, rows->data, call->dtype, rows->strides);
    for (int64_t k = 0; k < n; k += DECODE_ACCUMULATORS) {
        int64_t some = n - k < DECODE_ACCUMULATORS ? n - k : DECODE_ACCUMULATORS;
        struct prefetch_cursor next = decode_cursor(call, c, R, key, n, k, DECODE_ACCUMULATORS, rows, after, then);
        struct kv_rows K = kv_rows_of(copy, rows->data, call->dtype, rows->strides, c->batch, c->kv_head, key + k, some,
                                      DECODE_ACCUMULATORS, rows->columns, must_copy);
        gemm_qk_small(R, Q, K, row_packs(rows->columns), factor, S + k * R, &next);
    }
}

/* O += P V, by strips. */
static void decode_outputs(const struct mfa_cpu_call *call, const struct chunk *c, int64_t key, int64_t n, int R,
                           const packed *P, const struct decode_rows *rows, const struct decode_rows *after,
                           int64_t then, packed *copy, real *O)
{
    int64_t strip = kv_chunk_keys(call, R, rows);
    for (int64_t k = 0; k < n; k += strip) {
        int64_t some = n - k < strip ? n - k : strip, whole = K_PACK > 1 ? round_up_decode_keys(some, R) : some;
        struct prefetch_cursor next = decode_cursor(call, c, R, key, n, k, strip, rows, after, then);
        struct kv_rows V = kv_rows_of(copy, rows->data, call->dtype, rows->strides, c->batch, c->kv_head, key + k, some,
                                      whole, rows->columns, c->shrinks_V);
        if (c->shrinks_V)
            shrink_packs(copy, some * row_packs(rows->columns));
        gemm_pv_small(R, P + k * R / K_PACK, V, whole, row_packs(rows->columns) * K_PACK, O, &next);
    }
}

/* m, l and O of the queries from their part `split` of the keys. */
static void decode_split(const struct mfa_cpu_call *call, const struct chunk *c, const struct decode_scratch *s,
                         const struct panel *panel, int R, int64_t split, real *m, real *l)
{
    const struct mfa_args *a = &call->args;
    const int64_t e = row_packs(a->value_dim) * K_PACK;
    fill(s->S, DECODE_KEYS * LANES, 0);
    fill(s->O, LANES * e, 0);
    fill(m, LANES, -REAL_MAX);
    fill(l, LANES, 0);

    const struct decode_rows K = {call->k, &a->k, a->head_dim}, V = {call->v, &a->v, a->value_dim};
    struct range blocks = split_of(call, split, panel->any_low, panel->any_high, DECODE_KEYS);
    for (int64_t j = blocks.from; j < blocks.to; j++) {
        int64_t key = j * DECODE_KEYS, n = a->kv_len - key < DECODE_KEYS ? a->kv_len - key : DECODE_KEYS;
        enum block_mask seen = panel_block_mask(panel, call, c->batch, key, n, s->mask_rows, s->mask_tile);
        if (seen == BLOCK_EMPTY)
            continue;
        decode_scores(call, c, key, n, R, s->Q, &K, &V, key, (real)score_factor(call), s->K, s->S);
        decode_score(call, panel, R, seen, key, n, s->S, s->mask, s->mask_tile, NULL);
        decode_softmax_step(R, s->S, round_up_decode_keys(n, R) * R / LANES, m, l, s->O, e);
        decode_outputs(call, c, key, n, R, s->S, &V, &K, key + n, s->V, s->O);
    }
}

static void decode(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct decode_scratch s;
    decode_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    struct chunk c = chunk_of(call, task / call->splits);
    struct panel panel;
    chunk_panel(&c, a, 0, &panel);
    int R = decode_width(panel.lanes);
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim) * K_PACK;
    real m[LANES], l[LANES];
    load_small_q(call, &panel, R, c.batch, call->q, &a->q, a->head_dim, s.rows);
    scale_queries(call, s.rows, R * d);
    pack_q_small(s.rows, d, R, s.Q);
    decode_split(call, &c, &s, &panel, R, task % call->splits, m, l);
    if (!all_finite(s.O, LANES * e)) { /* as in forward.h */
        c.shrinks_V = 1;
        decode_split(call, &c, &s, &panel, R, task % call->splits, m, l);
    }

    if (call->splits > 1)
        s.sums = (real *)(void *)((char *)call->partials + (uint64_t)task * partial_bytes(call));
    struct accumulators sums = accumulators_at(s.sums, a, 0);
    for (int i = R; i < LANES; i++)
        l[i % R] += l[i];
    transpose(s.O, e, sums.O, PANEL, LANES, padded(a->value_dim));
    memcpy(sums.m, m, sizeof m);
    memcpy(sums.l, l, sizeof l);
    *sums.unit = (real)ldexp(1, c.shrinks_V ? SHRINK_BITS : 0);
    if (call->splits == 1)
        epilogue(call, &panel, c.batch, sums, (real *)s.rows);
}
