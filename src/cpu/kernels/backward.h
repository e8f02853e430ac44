/* dQ, dK, dV by blocks of keys; each task owns the dK and dV of one block, over all queries that see it:
 *
 *     for each group of queries (of each query head of the KV head) that sees the block:
 *         for each panel of the group:
 *             P = exp2(S - L), S = K Q^T                  (softcap, mask, band)
 *             dS = P * (dP - D), dP = V dO^T              (times 1 - tanh^2 with softcap)
 *         dV += P dO, dK += dS Q
 *         when the block before has added its part: dQ += dS^T K
 *     dK *= scale; and the last block to add to a group's dQ: dQ *= scale
 *
 * A group's dQ is added to in the order of the blocks, so sums do not depend on who computes them. Tasks are
 * numbered in that order and each waits only for a lower one. */

#define STRIP 48 /* keys of a block that are left out together where a group does not see them */
#define STRIPS_MAX 8 /* of a block */

struct backward_scratch {
    real *Q, *dO;         /* rows [group][padded(dim)] */
    real *Qt, *dOt;       /* [padded(dim)][PANEL] of one panel */
    real *K, *V, *dK, *dV;
    real *P, *dS;         /* [key][group] */
    real *slope;          /* [key][PANEL]: 1 - tanh^2 */
    real *mask_rows, *mask_tile;
    real *row;            /* one of O and one of dO */
    real *dbias;          /* [key][PANEL] */
};

static uint64_t backward_carve(const struct mfa_cpu_call *call, char *base, struct backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), n = padded(call->block_kv), group = call->panels * PANEL;
    int masked = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = carve(base, &used, group * d);
    s->dO = carve(base, &used, group * e);
    s->Qt = carve(base, &used, d * PANEL);
    s->dOt = carve(base, &used, e * PANEL);
    s->K = carve(base, &used, n * d);
    s->V = carve(base, &used, n * e);
    s->dK = carve(base, &used, n * d);
    s->dV = carve(base, &used, n * e);
    s->P = carve(base, &used, n * group);
    s->dS = carve(base, &used, n * group);
    s->slope = carve(base, &used, call->softcap > 0 ? n * PANEL : 0);
    s->mask_rows = carve(base, &used, masked ? n * PANEL : 0);
    s->mask_tile = carve(base, &used, masked ? n * PANEL : 0);
    s->row = carve(base, &used, 2 * e);
    s->dbias = carve(base, &used, call->mask_kind == CPU_MASK_ADDITIVE ? n * PANEL : 0);
    return used;
}

static uint64_t backward_scratch(const struct mfa_cpu_call *call)
{
    struct backward_scratch s;
    return backward_carve(call, NULL, &s);
}

/* Queries [first, first + rows) of one query head, and the kv blocks that they see: none if from > to. */
struct group {
    int64_t batch, head, index, first, rows;
    int64_t from, to;
};

static struct group group_of(const struct mfa_cpu_call *call, int64_t batch, int64_t head, int64_t index)
{
    const struct mfa_args *a = &call->args;
    int64_t size = (int64_t)call->panels * PANEL;
    struct group g = {.batch = batch, .head = head, .index = index, .first = index * size};
    g.rows = a->q_len - g.first < size ? a->q_len - g.first : size;
    int64_t low = g.first + a->lower, high = g.first + g.rows - 1 + a->upper;
    low = low < 0 ? 0 : low;
    high = high < a->kv_len - 1 ? high : a->kv_len - 1;
    g.from = low / call->block_kv;
    g.to = high < low ? g.from - 1 : high / call->block_kv;
    return g;
}

static inline int64_t groups_of(const struct mfa_cpu_call *call)
{
    return mfa_cpu_ceil(call->args.q_len, (int64_t)call->panels * PANEL);
}

static inline int64_t group_number(const struct mfa_cpu_call *call, const struct group *g)
{
    return (g->batch * call->args.q_heads + g->head) * groups_of(call) + g->index;
}

/* Where the group's D or L begin. */
static inline real *group_rows(const struct mfa_cpu_call *call, const struct group *g, void *all)
{
    return (real *)all + group_number(call, g) * call->panels * PANEL;
}

/* Where the group's dQ is summed up: rows *stride apart. */
static real *group_dQ(const struct mfa_cpu_call *call, const struct group *g, int64_t *stride)
{
    const struct mfa_args *a = &call->args;
    if (!call->dq_sums) {
        *stride = a->dq.row;
        return (real *)row_at(call->dq, sizeof(real), &a->dq, g->batch, g->head, g->first);
    }
    *stride = padded(a->head_dim);
    return (real *)call->dq_sums + ((g->batch * a->q_heads + g->head) * a->q_len + g->first) * *stride;
}

static void clear_dQ(const struct mfa_cpu_call *call, const struct group *g)
{
    int64_t stride, columns = call->dq_sums ? padded(call->args.head_dim) : call->args.head_dim;
    real *dQ = group_dQ(call, g, &stride);
    for (int64_t i = 0; i < g->rows; i++)
        fill(dQ + i * stride, columns, 0);
}

static void finish_dQ(const struct mfa_cpu_call *call, const struct group *g)
{
    const struct mfa_args *a = &call->args;
    int64_t stride, bytes = bytes_of(call->dtype);
    real *dQ = group_dQ(call, g, &stride);
    for (int64_t i = 0; i < g->rows; i++) {
        scale_vectors(dQ + i * stride, padded(a->head_dim), (real)call->scale);
        if (call->dq_sums)
            store_row((char *)row_at(call->dq, bytes, &a->dq, g->batch, g->head, g->first + i), call->dtype,
                      a->dq.column, dQ + i * stride, a->head_dim);
    }
}

/* D = rowsum(dO * O) - dL and L for one group; L is +inf for a query that saw nothing, so that its P
 * is 0. Sets the group's turn, and writes the dQ of a group that no block will visit. */
static void prepare(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_carve(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t groups = groups_of(call), bytes = bytes_of(call->dtype), e = padded(a->value_dim);
    struct group g = group_of(call, task / groups / a->q_heads, task / groups % a->q_heads, task % groups);
    real *D = group_rows(call, &g, call->D), *L = group_rows(call, &g, call->L), *O = s.row, *dO = s.row + e;
    fill(D, call->panels * PANEL, 0);
    fill(L, call->panels * PANEL, (real)INFINITY);
    for (int64_t i = 0; i < g.rows; i++) {
        int64_t row = g.first + i;
        load_row(O, row_at(call->o, bytes, &a->o, g.batch, g.head, row), call->dtype, a->o.column, a->value_dim);
        load_row(dO, row_at(call->d_o, bytes, &a->d_o, g.batch, g.head, row), call->dtype, a->d_o.column, a->value_dim);
        vec sum = vec_set1(0);
        for (int64_t d = 0; d < e; d += LANES)
            sum = vec_fma(vec_load(O + d), vec_load(dO + d), sum);
        real l = *(const real *)row_at(call->lse, sizeof(real), &a->lse, g.batch, g.head, row);
        D[i] = horizontal_sum(sum);
        if (call->dlse)
            D[i] -= *(const real *)row_at(call->dlse, sizeof(real), &a->dlse, g.batch, g.head, row);
        L[i] = l == -(real)INFINITY ? (real)INFINITY : l;
    }
    atomic_store_explicit(&call->progress[group_number(call, &g)], g.from, memory_order_relaxed);
    if (call->dq && g.from > g.to) {
        clear_dQ(call, &g);
        finish_dQ(call, &g);
    }
}

/* P and dS of one panel for the n keys of a block. S and dP come in their places; slope may be NULL. */
static void gradients(const struct panel *panel, int64_t n, real *P, real *dS, int64_t stride, const real *L,
                      const real *D, const real *slope)
{
    for (int v = 0; v < panel->vectors; v++) {
        int64_t at = v * LANES;
        vec l = vec_load(L + at), delta = vec_load(D + at);
        for (int64_t k = 0; k < n; k++, at += stride) {
            vec p = vec_exp(vec_sub(vec_load(P + at), l));
            vec ds = vec_mul(p, vec_sub(vec_load(dS + at), delta));
            if (slope)
                ds = vec_mul(ds, vec_load(slope + k * PANEL + v * LANES));
            vec_store(P + at, p);
            vec_store(dS + at, ds);
        }
    }
}

/* One block of keys: where it begins and how many. K and V are loaded when the first panel sees it. */
struct keys {
    int64_t batch, kv_head, first, n;
    struct block K, V;
};

static struct keys keys_of(const struct mfa_cpu_call *call, int64_t batch, int64_t kv_head, int64_t block)
{
    struct keys keys = {.batch = batch, .kv_head = kv_head, .first = block * call->block_kv};
    keys.n = call->args.kv_len - keys.first < call->block_kv ? call->args.kv_len - keys.first : call->block_kv;
    return keys;
}

static void load_keys(const struct mfa_cpu_call *call, struct backward_scratch *s, struct keys *keys)
{
    const struct mfa_args *a = &call->args;
    keys->K =
        load_block(s->K, call->k, call->dtype, &a->k, keys->batch, keys->kv_head, keys->first, keys->n, a->head_dim, 1);
    keys->V = load_block(s->V, call->v, call->dtype, &a->v, keys->batch, keys->kv_head, keys->first, keys->n,
                         a->value_dim, 1);
}

/* P and dS, `stride` apart, of a panel for keys r of the block; the panel's rows of Q, dO, L and D are given. 0 if
 * it sees none of them. `chain`: dS is for Q and K, behind the softcap; else for the bias, before it. */
static int panel_gradients(const struct mfa_cpu_call *call, struct backward_scratch *s, const struct panel *panel,
                           struct keys *keys, struct range r, const real *Q, const real *dO, const real *L,
                           const real *D, real *P, real *dS, int64_t stride, int chain)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), lanes = panel->vectors * LANES;
    int64_t key = keys->first + r.from, n = r.to - r.from;
    enum visibility seen = panel_sees(panel, call, keys->batch, key, n, s->mask_rows, s->mask_tile);
    if (seen == HIDDEN)
        return 0;
    if (!keys->K.rows)
        load_keys(call, s, keys);
    real *slope = chain && call->softcap > 0 ? s->slope : NULL;
    P += r.from * stride, dS += r.from * stride;
    transpose(Q, d, s->Qt, PANEL, lanes, d);
    scale_vectors(s->Qt, d * PANEL, query_factor(call));
    multiply_rows(n, panel->vectors, keys->K.rows + r.from * keys->K.stride, keys->K.stride, s->Qt, PANEL, P, stride,
                  a->head_dim);
    panel_adjust(panel, call, seen, key, n, P, stride, s->mask_tile, slope);
    transpose(dO, e, s->dOt, PANEL, lanes, e);
    multiply_rows(n, panel->vectors, keys->V.rows + r.from * keys->V.stride, keys->V.stride, s->dOt, PANEL, dS, stride,
                  a->value_dim);
    gradients(panel, n, P, dS, stride, L, D, slope);
    return 1;
}

/* Which panels of a group see which keys of a block: by panel, whole strips; by strip, the panels of it. Under a band
 * the panels that see a strip are neighbours. */
struct sight {
    struct range keys[MFA_CPU_PANELS_MAX]; /* of each panel; empty: sees none */
    struct range panels[STRIPS_MAX];       /* of each strip */
    int64_t strips;
};

static void see_strips(struct sight *sight, int64_t panels, int64_t n)
{
    sight->strips = mfa_cpu_ceil(n, STRIP);
    for (int64_t i = 0; i < sight->strips; i++) {
        struct range *r = &sight->panels[i];
        *r = (struct range){panels, 0};
        for (int64_t p = 0; p < panels; p++)
            if (sight->keys[p].from <= i * STRIP && i * STRIP < sight->keys[p].to) {
                r->from = p < r->from ? p : r->from;
                r->to = p + 1;
            }
    }
}

/* Waits until the blocks before this one have added to the group's dQ, then adds this block's. Panels that see the
 * same keys are taken together. */
static void add_dQ(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct group *g,
                   const struct keys *keys, int64_t block, const struct sight *sight)
{
    int64_t stride, panels = mfa_cpu_ceil(g->rows, PANEL), size = (int64_t)call->panels * PANEL;
    int vectors = (int)(padded(call->args.head_dim) / LANES);
    _Atomic int64_t *turn = &call->progress[group_number(call, g)];
    for (unsigned spins = 0; atomic_load_explicit(turn, memory_order_acquire) != block; spins++)
        if (spins % 1024 == 1023)
            sched_yield();
    real *dQ = group_dQ(call, g, &stride);
    if (block == g->from)
        clear_dQ(call, g);
    for (int64_t p = 0, next; p < panels; p = next) {
        struct range r = sight->keys[p];
        for (next = p + 1; next < panels && sight->keys[next].from == r.from && sight->keys[next].to == r.to;)
            next++;
        int64_t first = p * PANEL, rows = (next * PANEL < g->rows ? next * PANEL : g->rows) - first;
        if (r.from < r.to)
            add_columns(rows, vectors, s->dS + r.from * size + first, size, keys->K.rows + r.from * keys->K.stride,
                        keys->K.stride, dQ + first * stride, stride, r.to - r.from);
    }
    if (block == g->to)
        finish_dQ(call, g);
    atomic_store_explicit(turn, block + 1, memory_order_release);
}

/* dV += P dO and dK += dS Q; strips that are seen by the same panels are taken together. */
static void add_dK_dV(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct group *g,
                      const struct keys *keys, const struct sight *sight)
{
    int64_t d = padded(call->args.head_dim), e = padded(call->args.value_dim), size = (int64_t)call->panels * PANEL;
    for (int64_t i = 0, next; i < sight->strips; i = next) {
        struct range r = sight->panels[i];
        for (next = i + 1;
             next < sight->strips && sight->panels[next].from == r.from && sight->panels[next].to == r.to;)
            next++;
        if (r.from >= r.to)
            continue;
        int64_t key = i * STRIP, rows = (next * STRIP < keys->n ? next * STRIP : keys->n) - key;
        int64_t first = r.from * PANEL, end = r.to * PANEL, at = key * size + first;
        int64_t n = (end < g->rows ? end : padded(g->rows)) - first;
        if (call->dv)
            add_rows(rows, (int)(e / LANES), s->P + at, size, s->dO + first * e, e, s->dV + key * e, e, n);
        if (call->dk)
            add_rows(rows, (int)(d / LANES), s->dS + at, size, s->Q + first * d, d, s->dK + key * d, d, n);
    }
}

static void clear_panel(real *P, int64_t stride, struct range r)
{
    for (int64_t k = r.from; k < r.to; k++)
        fill(P + k * stride, PANEL, 0);
}

/* What one group of queries adds to dK, dV of the block and gets from it as dQ. */
static void visit_group(const struct mfa_cpu_call *call, struct backward_scratch *s, const struct group *g,
                        struct keys *keys, int64_t block)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), size = (int64_t)call->panels * PANEL;
    int64_t panels = mfa_cpu_ceil(g->rows, PANEL);
    int any_shown = 0;
    struct sight sight;
    for (int64_t p = 0; p < panels; p++) {
        struct panel panel;
        int64_t first = p * PANEL;
        panel_of_head(&panel, a, g->head, g->first + first);
        struct range r = panel_range(&panel, keys->first, keys->n, STRIP);
        sight.keys[p] = r;
        if (r.from >= r.to)
            continue;
        panel_load(&panel, s->Q + first * d, d, call->q, call->dtype, &a->q, g->batch, a->head_dim);
        panel_load(&panel, s->dO + first * e, e, call->d_o, call->dtype, &a->d_o, g->batch, a->value_dim);
        int shown = panel_gradients(call, s, &panel, keys, r, s->Q + first * d, s->dO + first * e,
                                    group_rows(call, g, call->L) + first, group_rows(call, g, call->D) + first,
                                    s->P + first, s->dS + first, size, 1);
        any_shown |= shown;
        if (!shown) { /* by the mask: its neighbours may see the same strips */
            clear_panel(s->P + first, size, r);
            clear_panel(s->dS + first, size, r);
        }
    }
    if (any_shown)
        see_strips(&sight, panels, keys->n);
    else
        sight = (struct sight){.strips = 0};
    add_dK_dV(call, s, g, keys, &sight);
    if (call->dq)
        add_dQ(call, s, g, keys, block, &sight);
}

static void store_keys(const struct mfa_cpu_call *call, void *to, const struct mfa_strides *strides,
                       const struct keys *keys, const real *rows, int64_t columns)
{
    for (int64_t r = 0; to && r < keys->n; r++)
        store_row((char *)row_at(to, bytes_of(call->dtype), strides, keys->batch, keys->kv_head, keys->first + r),
                  call->dtype, strides->column, rows + r * padded(columns), columns);
}

static void backward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_carve(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t blocks = mfa_cpu_ceil(a->kv_len, call->block_kv), block = task % blocks, head = task / blocks;
    struct keys keys = keys_of(call, head / a->kv_heads, head % a->kv_heads, block);
    fill(s.dK, keys.n * padded(a->head_dim), 0);
    fill(s.dV, keys.n * padded(a->value_dim), 0);
    for (int64_t h = 0; h < a->group; h++)
        for (int64_t i = 0; i < groups_of(call); i++) {
            struct group g = group_of(call, keys.batch, keys.kv_head * a->group + h, i);
            if (g.from <= block && block <= g.to)
                visit_group(call, &s, &g, &keys, block);
        }
    scale_vectors(s.dK, keys.n * padded(a->head_dim), (real)call->scale);
    store_keys(call, call->dk, &a->dk, &keys, s.dK, a->head_dim);
    store_keys(call, call->dv, &a->dv, &keys, s.dV, a->value_dim);
}
