/* dQ, dK, dV by blocks of keys; each task owns the dK and dV of one block, over all queries that see it:
 *
 *     for each group of queries (of each query head of the KV head) that sees the block:
 *         for each panel of the group:
 *             P = exp(S - L), S = K Q^T                   (softcap, mask, band)
 *             dS = P * (dP - D), dP = V dO^T              (times 1 - tanh^2 with softcap)
 *         dV += P dO, dK += dS Q
 *         when the block after has added its part: dQ += dS^T K
 *     dK *= scale; and the last block to add to a group's dQ: dQ *= scale
 *
 * A group's dQ is added to in one order of the blocks, so sums do not depend on who computes them. Tasks are numbered
 * in that order and each waits only for a lower one. It is from the last block to the first: under a causal band, a
 * block's first group is then one that no other has to add to before. */

#ifndef MASK_GRANULE
#define MASK_GRANULE 24 /* keys of a block that are left out together where a group does not see them */
#endif
#define MASK_GRANULES_MAX 16 /* of a block: 384 keys (src/cpu/tiles.c) */

struct backward_scratch {
    packed *rows;           /* of a panel of Q or dO, terms across */
    packed *Qt, *dOt;       /* their transposes: [terms(dim)][PANEL] */
    packed *Q, *dO;         /* of the group, terms down */
    packed *K, *V;          /* terms across */
    packed *packed_K;
    real *dK, *dV;
    real *S, *dP;         /* [key][PANEL]; if P and dS are reals, in their places instead */
    packed *P, *dS;         /* of the group, terms across: [key][group / TERM] */
    packed *dS_b;        /* [terms(key)][group] */
    real *dtanh;          /* [key][PANEL]: 1 - tanh^2 */
    real *mask_rows, *mask_tile;
    real *row;            /* one of O and one of dO; LANES rows of sums and their transpose */
    real *dQ;             /* LANES rows, where dQ is summed up transposed */
    real *dbias;          /* [key][PANEL] */
};

/* Rows of P and dS: a line more than the group has, lest a column of them lie in few sets of the cache. */
static inline int64_t q_block_stride(const struct mfa_cpu_call *call)
{
    return (int64_t)call->panels * PANEL + K_PACK * LANES;
}

/* Of P and dS across. */
static inline int64_t P_stride_a(const struct mfa_cpu_call *call)
{
    return packed_a_stride(q_block_stride(call) / K_PACK);
}

/* Of dS down. */
static inline int64_t dS_stride_b(const struct mfa_cpu_call *call)
{
    return packed_b_stride(whole_keys(call->block_kv) / K_PACK, q_block_stride(call));
}

/* Of a group's Q or dO down. */
static inline int64_t q_block_stride_b(const struct mfa_cpu_call *call, int64_t columns)
{
    return packed_b_stride((int64_t)call->panels * PANEL / K_PACK, vnni_stride(columns));
}

static uint64_t backward_arena(const struct mfa_cpu_call *call, char *base, struct backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), n = whole_keys(call->block_kv),
            group = call->panels * PANEL;
    int64_t d_terms = row_packs(a->head_dim), e_terms = row_packs(a->value_dim);
    int has_mask = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->rows = arena_alloc(base, &used, K_PACK > 1 ? PANEL * (d_terms > e_terms ? d_terms : e_terms) : 0);
    s->Qt = arena_alloc(base, &used, d_terms * PANEL);
    s->dOt = arena_alloc(base, &used, e_terms * PANEL);
    s->Q = arena_alloc(base, &used, group * d_terms);
    s->dO = arena_alloc(base, &used, group * e_terms);
    s->K = arena_alloc(base, &used, n * d_terms);
    s->V = arena_alloc(base, &used, n * e_terms);
    s->packed_K = arena_alloc(base, &used, K_PACK > 1 ? n * d_terms : 0);
    s->dK = arena_alloc(base, &used, n * d);
    s->dV = arena_alloc(base, &used, n * e);
    s->S = arena_alloc(base, &used, K_PACK > 1 ? n * PANEL : 0);
    s->dP = arena_alloc(base, &used, K_PACK > 1 ? n * PANEL : 0);
    s->P = arena_alloc(base, &used, n * q_block_stride(call) / K_PACK);
    s->dS = arena_alloc(base, &used, n * q_block_stride(call) / K_PACK);
    s->dS_b = K_PACK > 1 ? arena_alloc(base, &used, n * q_block_stride(call) / K_PACK) : s->dS;
    s->dtanh = arena_alloc(base, &used, call->softcap > 0 ? n * PANEL : 0);
    s->mask_rows = arena_alloc(base, &used, has_mask ? n * PANEL : 0);
    s->mask_tile = arena_alloc(base, &used, has_mask ? n * PANEL : 0);
    s->row = arena_alloc(base, &used, 2 * e + 2 * LANES * LANES);
    s->dQ = arena_alloc(base, &used, LANES * d);
    s->dbias = arena_alloc(base, &used, call->mask_kind == CPU_MASK_ADDITIVE ? n * PANEL : 0);
    return used;
}

static uint64_t backward_scratch(const struct mfa_cpu_call *call)
{
    struct backward_scratch s;
    return backward_arena(call, NULL, &s);
}

/* Queries [first, first + rows) of one query head, and the kv blocks that they see: none if from > to. */
struct q_block {
    int64_t batch, head, index, first, rows;
    int64_t from, to;
};

static struct q_block q_block_of(const struct mfa_cpu_call *call, int64_t batch, int64_t head, int64_t index)
{
    const struct mfa_args *a = &call->args;
    int64_t size = (int64_t)call->panels * PANEL;
    struct q_block g = {.batch = batch, .head = head, .index = index, .first = index * size};
    g.rows = a->q_len - g.first < size ? a->q_len - g.first : size;
    int64_t low = g.first + a->lower, high = g.first + g.rows - 1 + a->upper;
    low = low < 0 ? 0 : low;
    high = high < a->kv_len - 1 ? high : a->kv_len - 1;
    g.from = low / call->block_kv;
    g.to = high < low ? g.from - 1 : high / call->block_kv;
    return g;
}

static inline int64_t q_blocks(const struct mfa_cpu_call *call)
{
    return mfa_cpu_ceil(call->args.q_len, (int64_t)call->panels * PANEL);
}

static inline int64_t q_block_index(const struct mfa_cpu_call *call, const struct q_block *g)
{
    return (g->batch * call->args.q_heads + g->head) * q_blocks(call) + g->index;
}

/* Where D of row `row` of the group lies. */
static inline real *q_block_D(const struct mfa_cpu_call *call, const struct q_block *g, int64_t row)
{
    return (real *)call->D + q_block_index(call, g) * call->panels * PANEL + row;
}

/* L, in the unit of S; +inf if the query saw nothing, so that its P is 0. */
static inline real *q_block_L(const struct mfa_cpu_call *call, const struct q_block *g, int64_t row)
{
    return (real *)call->L + q_block_index(call, g) * call->panels * PANEL + row;
}

/* Tile registers sum up dQ^T[d][row]. So do others where half a vector of each row of dQ would be empty, but rows of
 * dQ^T are whole tiles. The kernels for few queries sum up dQ[row][d] always. */
static inline int dQ_is_transposed(const struct mfa_cpu_call *call)
{
    return !call->decode && (USE_AMX || call->args.head_dim % LANES == TILE_ROWS_3);
}

/* Where the group's dQ is summed up: rows, of dQ or of dQ^T, *stride apart. */
static real *q_block_dQ(const struct mfa_cpu_call *call, const struct q_block *g, int64_t *stride)
{
    const struct mfa_args *a = &call->args;
    if (!call->dq_sums) {
        *stride = a->dq.row;
        return (real *)row_at(call->dq, sizeof(real), &a->dq, g->batch, g->head, g->first);
    }
    int64_t d = padded(a->head_dim), rows = mfa_cpu_ceil(a->q_len, PANEL) * PANEL;
    *stride = dQ_is_transposed(call) ? mfa_cpu_ceil(g->rows, PANEL) * PANEL : d;
    return (real *)call->dq_sums + ((g->batch * a->q_heads + g->head) * rows + g->first) * d;
}

static void clear_dQ(const struct mfa_cpu_call *call, const struct q_block *g)
{
    int64_t stride, d = padded(call->args.head_dim);
    real *dQ = q_block_dQ(call, g, &stride);
    if (dQ_is_transposed(call))
        fill(dQ, d * stride, 0);
    else
        for (int64_t i = 0; i < g->rows; i++)
            fill(dQ + i * stride, d, 0);
}

/* turned: room for LANES rows, if dQ is transposed. */
static void epilogue_dQ(const struct mfa_cpu_call *call, const struct q_block *g, real *turned)
{
    const struct mfa_args *a = &call->args;
    int64_t stride, d = padded(a->head_dim), bytes = bytes_of(call->dtype);
    real *dQ = q_block_dQ(call, g, &stride);
    const double scale = call->scale / call->dS_factor;
    for (int64_t i = 0; i < g->rows; i++) {
        real *row = dQ + i * stride;
        if (dQ_is_transposed(call)) {
            if (i % LANES == 0)
                transpose(dQ + i, stride, turned, d, d, LANES);
            row = turned + i % LANES * d;
        }
        scale_vectors(row, d, scale);
        if (call->dq_sums)
            store_row((char *)row_at(call->dq, bytes, &a->dq, g->batch, g->head, g->first + i), call->dtype,
                      a->dq.column, row, a->head_dim);
    }
}

/* D, or dO where dP is made of it: dS is what both are multiplied by. Pairs are not for scales that need it. */
static void scale_gradients(const struct mfa_cpu_call *call, real *x, int64_t n)
{
    if (K_PACK == 1 && call->dS_factor != 1)
        scale_vectors(x, n, call->dS_factor);
}

/* rowsum(dO * O) of `rows` rows, at most LANES, from `row` on; zeros after them. O is o + o_low, if that is there. */
static vec sum_rows(const struct mfa_cpu_call *call, const struct q_block *g, int64_t row, int64_t rows, real *room)
{
    const struct mfa_args *a = &call->args;
    int64_t bytes = bytes_of(call->dtype), e = padded(a->value_dim);
    real *sums = room + 2 * e, *turned = sums + LANES * LANES;
    fill(sums, LANES * LANES, 0);
    for (int64_t i = 0; i < rows; i++) {
        const char *dO_row = row_at(call->d_o, bytes, &a->d_o, g->batch, g->head, row + i);
        const real *dO = row_of_reals(room + e, dO_row, call->dtype, a->d_o.column, a->value_dim);
        const void *parts[] = {call->o, call->o_low};
        vec sum = vec_set1(0);
        for (int part = 0; part < 2 && parts[part]; part++) {
            const char *O_row = row_at(parts[part], bytes, &a->o, g->batch, g->head, row + i);
            const real *O = row_of_reals(room, O_row, call->dtype, a->o.column, a->value_dim);
            for (int64_t d = 0; d < e; d += LANES)
                sum = vec_fma(vec_load(O + d), vec_load(dO + d), sum);
        }
        vec_store(sums + i * LANES, sum);
    }
    vec_transpose(sums, LANES, turned, LANES);
    vec total = vec_load(turned);
    for (int64_t i = 1; i < LANES; i++)
        total = vec_add(total, vec_load(turned + i * LANES));
    return total;
}

/* D = rowsum(dO * O) - dL and L for one group. Sets the group's turn, and writes the dQ of a group that no block will
 * visit. */
static void backward_preprocess(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t groups = q_blocks(call);
    struct q_block g = q_block_of(call, task / groups / a->q_heads, task / groups % a->q_heads, task % groups);
    int64_t lanes = mfa_cpu_ceil(g.rows, PANEL) * PANEL;
    real *D = q_block_D(call, &g, 0), *L = q_block_L(call, &g, 0);
    fill(D, lanes, 0);
    fill(L, lanes, (real)INFINITY);
    for (int64_t i = 0; i < g.rows; i += LANES)
        vec_store(D + i, sum_rows(call, &g, g.first + i, g.rows - i < LANES ? g.rows - i : LANES, s.row));
    for (int64_t i = 0; i < g.rows; i++) {
        int64_t row = g.first + i;
        real l = *(const real *)row_at(call->lse, sizeof(real), &a->lse, g.batch, g.head, row);
        if (call->dlse)
            D[i] -= *(const real *)row_at(call->dlse, sizeof(real), &a->dlse, g.batch, g.head, row);
        L[i] = l == -(real)INFINITY ? (real)INFINITY : (real)((double)l * S_UNIT);
    }
    scale_gradients(call, D, lanes);
    quiet_nans(D, lanes);
    quiet_nans(L, lanes);
    atomic_store_explicit(&call->dq_semaphore[q_block_index(call, &g)], g.to, memory_order_relaxed);
    if (call->dq && g.from > g.to) {
        clear_dQ(call, &g);
        epilogue_dQ(call, &g, s.dQ);
    }
}

/* One block of keys: where it begins and how many. K and V are loaded when the first panel sees it. */
struct keys {
    int64_t batch, kv_head, first, n;
    struct kv_block K, V, packed_K;
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
    keys->packed_K = pack_a(keys->K, keys->n, a->head_dim, s->packed_K);
}

/* The panel's rows of Q or dO: down, as the rows of a group from `first` on, and transposed. */
static void load_panel(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct panel *panel,
                       int64_t first, const void *data, const struct mfa_strides *strides, int64_t batch,
                       int64_t columns, packed *down, packed *transposed)
{
    int64_t lanes = panel->vectors * LANES, across = row_packs(columns), stride = q_block_stride_b(call, columns);
    down += packed_b_index(stride, first / K_PACK, 0);
    packed *rows = K_PACK > 1 ? s->rows : down;
    panel_load(panel, rows, across, data, call->dtype, strides, batch, columns);
    pack_vnni((struct kv_block){rows, across, NULL}, lanes, columns, down, stride);
    pack_b_transposed(rows, across, transposed, packed_b_stride(across, PANEL), lanes, across);
}

/* Loads Q and dO of a panel, the rows from `first` on of its group, and the keys if that is not done. How the panel
 * sees keys r. */
static enum block_mask panel_meets(const struct mfa_cpu_call *call, struct backward_scratch *s,
                                   const struct panel *panel, int64_t first, struct keys *keys, struct range r)
{
    const struct mfa_args *a = &call->args;
    load_panel(call, s, panel, first, call->q, &a->q, keys->batch, a->head_dim, s->Q, s->Qt);
    load_panel(call, s, panel, first, call->d_o, &a->d_o, keys->batch, a->value_dim, s->dO, s->dOt);
    enum block_mask seen =
        panel_block_mask(panel, call, keys->batch, keys->first + r.from, r.to - r.from, s->mask_rows, s->mask_tile);
    if (seen != BLOCK_EMPTY && !keys->K.rows)
        load_keys(call, s, keys);
    scale_queries(call, s->Qt, row_packs(a->head_dim) * PANEL);
    scale_gradients(call, s->dOt, row_packs(a->value_dim) * PANEL);
    return seen;
}

/* S and dP of a part of the panel, columns of PANEL lanes from the part's first key on. mask and slope, which is for
 * softcap, may be NULL. */
static void panel_scores(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct panel *panel,
                         const struct keys *keys, struct part part, real *S, real *dP, int64_t stride, const real *mask,
                         real *dtanh)
{
    const struct mfa_args *a = &call->args;
    int64_t from = part.keys.from, n = part.keys.to - from, first = part.vector * LANES;
    int64_t q_stride = packed_b_stride(row_packs(a->head_dim), PANEL);
    int64_t d_stride = packed_b_stride(row_packs(a->value_dim), PANEL);
    gemm_nn(n, part.vectors, keys->K.rows + from * keys->K.stride, keys->K.stride,
            s->Qt + packed_b_index(q_stride, 0, first), q_stride, S + first, stride, k_packs(a->head_dim),
            (real)score_factor(call), NULL);
    for (int v = part.vector; v < part.vector + part.vectors; v++) {
        int64_t lane = v * LANES;
        panel_score(panel, call, v, keys->first + from, n, S + lane, stride, mask ? mask + lane : NULL,
                    dtanh ? dtanh + lane : NULL);
    }
    gemm_nn(n, part.vectors, keys->V.rows + from * keys->V.stride, keys->V.stride,
            s->dOt + packed_b_index(d_stride, 0, first), d_stride, dP + first, stride, k_packs(a->value_dim), 1, NULL);
}

/* Where P and dS of a panel and keys from `key` of the block on go. */
static struct gradients gradients_at(const struct mfa_cpu_call *call, const struct backward_scratch *s, int64_t first,
                                     int64_t key)
{
    int64_t across = P_stride_a(call), down = dS_stride_b(call), at = packed_a_index(across, key, first / K_PACK);
    return (struct gradients){s->P + at, s->dS + at, across, s->dS_b + packed_b_index(down, key / K_PACK, first), down};
}

/* P = dS = 0 for `lanes` of the group from `first` on, which do not see keys r: others may. */
static void clear_gradients(const struct mfa_cpu_call *call, const struct backward_scratch *s, int64_t first,
                            int64_t lanes, struct range r)
{
    struct gradients to = gradients_at(call, s, first, r.from);
    int64_t n = r.to - r.from;
    clear_a(to.P, to.across, n, lanes / K_PACK);
    clear_a(to.dS, to.across, n, lanes / K_PACK);
    clear_b(to.dS_b, to.down, k_packs(n), lanes);
    pad_b(to.dS_b, to.down, n, lanes);
}

/* P and dS of the panel for keys r, by way of S and dP in memory, where S is capped and masked. */
static void adjusted_gradients(const struct mfa_cpu_call *call, const struct backward_scratch *s,
                               const struct panel *panel, int64_t first, const struct keys *keys, struct range r,
                               const real *mask, const real *L, const real *D)
{
    for (struct part part; r.from < r.to; r.from = part.keys.to) {
        part = band_part(panel, keys->first, r);
        int64_t n = part.keys.to - r.from, lane = part.vector * LANES, end = lane + part.vectors * LANES;
        struct gradients to = gradients_at(call, s, first, r.from);
        real *S = K_PACK > 1 ? s->S : to.P, *dP = K_PACK > 1 ? s->dP : to.dS;
        real *dtanh = call->softcap > 0 ? s->dtanh : NULL;
        int64_t stride = K_PACK > 1 ? PANEL : to.across;
        panel_scores(call, s, panel, keys, part, S, dP, stride, mask, dtanh);
        panel_gradients(part.vectors, n, S + lane, dP + lane, stride, L + lane, D + lane, dtanh ? dtanh + lane : NULL,
                        1, gradients_at(call, s, first + lane, r.from));
        clear_gradients(call, s, first, lane, part.keys);
        clear_gradients(call, s, first + end, panel->vectors * LANES - end, part.keys);
        mask = mask ? mask + n * PANEL : NULL;
    }
}

/* Rows of Q or dO after those of a panel, evenly while every other tile of n keys is visited. */
static struct prefetch_cursor next_panel_cursor(const struct mfa_cpu_call *call, const struct keys *keys,
                                                const struct panel *panel, int64_t n, const void *data,
                                                const struct mfa_strides *s, int64_t columns)
{
    int64_t each = bytes_of(call->dtype), bytes = columns * each;
    const char *at = row_at(data, each, s, keys->batch, panel->head[0], panel->row[0] + PANEL);
    int64_t a_term = mfa_cpu_ceil(2 * PANEL * bytes, n * k_packs(call->args.head_dim));
    return (struct prefetch_cursor){at, at + bytes, bytes, s->row * each - bytes, a_term};
}

/* P and dS of the panel for keys r: at once for those that all its lanes see. */
static void visit_panel(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct panel *panel,
                        enum block_mask seen, int64_t first, const struct keys *keys, struct range r, const real *L,
                        const real *D)
{
    const struct mfa_args *a = &call->args;
    int plain = panel->vectors == PANEL_VECTORS && !(call->softcap > 0);
    struct range shown = plain ? full_range(panel, keys->first, r, KEY_UNIT) : (struct range){r.to, r.to};
    const real *mask = seen == BLOCK_MASKED ? s->mask_tile : NULL;
    int64_t n = shown.to - shown.from;
    int asking = n > 0 && a->q.column == 1 && a->d_o.column == 1 && panel->row[0] + PANEL < a->q_len;
    struct prefetch_cursor next[2];
    if (asking) {
        next[0] = next_panel_cursor(call, keys, panel, n, call->q, &a->q, a->head_dim);
        next[1] = next_panel_cursor(call, keys, panel, n, call->d_o, &a->d_o, a->value_dim);
    }
    adjusted_gradients(call, s, panel, first, keys, (struct range){r.from, shown.from}, mask, L, D);
    mask = mask ? mask + (shown.from - r.from) * PANEL : NULL;
    int64_t done = gemm_gradients(
        shown.to - shown.from, keys->K.rows + shown.from * keys->K.stride, keys->K.stride, s->Qt, k_packs(a->head_dim),
        (real)score_factor(call), keys->V.rows + shown.from * keys->V.stride, keys->V.stride, s->dOt,
        k_packs(a->value_dim), mask, L, D, gradients_at(call, s, first, shown.from), asking ? next : NULL);
    mask = mask ? mask + done * PANEL : NULL;
    adjusted_gradients(call, s, panel, first, keys, (struct range){shown.from + done, r.to}, mask, L, D);
}

/* Which keys of a block the panels of a group see, in whole strips, and their vectors; and which vectors, counted from
 * the group's first, see each strip. Under a band these are neighbours. */
struct visible {
    struct range panels[MFA_CPU_PANELS_MAX]; /* keys of each; empty: sees none */
    struct range vectors[MFA_CPU_PANELS_MAX][PANEL_VECTORS];
    struct range strips[MASK_GRANULES_MAX];
    int64_t count; /* of strips */
};

static void visible_granules(struct visible *visible, int64_t panels, int64_t n)
{
    visible->count = mfa_cpu_ceil(n, MASK_GRANULE);
    for (int64_t i = 0; i < visible->count; i++) {
        struct range *r = &visible->strips[i];
        *r = (struct range){panels * PANEL_VECTORS, 0};
        for (int64_t v = 0; v < panels * PANEL_VECTORS; v++) {
            struct range keys = visible->vectors[v / PANEL_VECTORS][v % PANEL_VECTORS];
            if (keys.from < keys.to && keys.from < (i + 1) * MASK_GRANULE && i * MASK_GRANULE < keys.to) {
                r->from = v < r->from ? v : r->from;
                r->to = v + 1;
            }
        }
    }
}

static void dq_wait_order(_Atomic int64_t *turn, int64_t block)
{
    for (unsigned spins = 0; atomic_load_explicit(turn, memory_order_acquire) != block; spins++)
        if (spins % 1024 == 1023)
            sched_yield();
}

/* Waits until the blocks after this one have added to the group's dQ, then adds this block's. Panels that see the
 * same keys are taken together. */
static void add_dQ(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *g,
                   const struct keys *keys, int64_t block, const struct visible *visible)
{
    int64_t stride, panels = mfa_cpu_ceil(g->rows, PANEL), size = dS_stride_b(call), d = call->args.head_dim;
    _Atomic int64_t *turn = &call->dq_semaphore[q_block_index(call, g)];
    dq_wait_order(turn, block);
    real *dQ = q_block_dQ(call, g, &stride);
    if (block == g->to)
        clear_dQ(call, g);
    for (int64_t p = 0, next; p < panels; p = next) {
        struct range r = visible->panels[p];
        for (next = p + 1; next < panels && visible->panels[next].from == r.from && visible->panels[next].to == r.to;)
            next++;
        int64_t first = p * PANEL, rows = (next * PANEL < g->rows ? next * PANEL : g->rows) - first;
        if (r.from >= r.to)
            continue;
        const packed *dS = s->dS_b + packed_b_index(size, r.from / K_PACK, first),
                     *K = packed_a_row(keys->packed_K, r.from);
        if (dQ_is_transposed(call))
            gemm_tn_acc(USE_AMX ? padded(d) : d, (int)(round_up_queries(rows) / LANES), K, keys->packed_K.stride, dS,
                        size, dQ + first, stride, k_packs(r.to - r.from), NULL);
        else
            gemm_tn_acc(rows, (int)(padded(d) / LANES), dS, size, K, keys->packed_K.stride, dQ + first * stride, stride,
                        k_packs(r.to - r.from), NULL);
    }
    if (block == g->from)
        epilogue_dQ(call, g, s->dQ);
    atomic_store_explicit(turn, block - 1, memory_order_release);
}

/* dV += P dO and dK += dS Q; strips that are seen by the same vectors are taken together. */
static void add_dK_dV(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *g,
                      const struct keys *keys, const struct visible *visible)
{
    int64_t d = padded(call->args.head_dim), e = padded(call->args.value_dim);
    int64_t d_stride = q_block_stride_b(call, call->args.head_dim),
            e_stride = q_block_stride_b(call, call->args.value_dim);
    int64_t across = P_stride_a(call);
    for (int64_t i = 0, next; i < visible->count; i = next) {
        struct range r = visible->strips[i];
        for (next = i + 1;
             next < visible->count && visible->strips[next].from == r.from && visible->strips[next].to == r.to;)
            next++;
        if (r.from >= r.to)
            continue;
        int64_t key = i * MASK_GRANULE, rows = (next * MASK_GRANULE < keys->n ? next * MASK_GRANULE : keys->n) - key;
        int64_t first = r.from * LANES / K_PACK, end = r.to * LANES, at = packed_a_index(across, key, first);
        int64_t n = (end < g->rows ? end : round_up_queries(g->rows)) / K_PACK - first;
        if (call->dv)
            gemm_nn_acc(rows, (int)(e / LANES), s->P + at, across, s->dO + packed_b_index(e_stride, first, 0), e_stride,
                        s->dV + key * e, e, n);
        if (call->dk)
            gemm_nn_acc(rows, (int)(d / LANES), s->dS + at, across, s->Q + packed_b_index(d_stride, first, 0), d_stride,
                        s->dK + key * d, d, n);
    }
}

/* What one group of queries adds to dK, dV of the block and gets from it as dQ. */
static void visit_q_block(const struct mfa_cpu_call *call, struct backward_scratch *s, const struct q_block *g,
                          struct keys *keys, int64_t block)
{
    int64_t panels = mfa_cpu_ceil(g->rows, PANEL);
    int any_shown = 0;
    struct visible visible;
    for (int64_t p = 0; p < panels; p++) {
        struct panel panel;
        int64_t first = p * PANEL;
        panel_of_head(&panel, &call->args, g->head, g->first + first);
        struct range r = band_range(&panel, keys->first, keys->n, MASK_GRANULE);
        visible.panels[p] = r;
        for (int v = 0; v < PANEL_VECTORS; v++)
            visible.vectors[p][v] =
                v < panel.vectors ? vector_band_range(&panel, v, keys->first, r) : (struct range){r.to, r.to};
        if (r.from >= r.to)
            continue;
        enum block_mask seen = panel_meets(call, s, &panel, first, keys, r);
        if (seen == BLOCK_EMPTY) {
            clear_gradients(call, s, first, panel.vectors * LANES, r);
            continue;
        }
        visit_panel(call, s, &panel, seen, first, keys, r, q_block_L(call, g, first), q_block_D(call, g, first));
        any_shown = 1;
    }
    if (any_shown)
        visible_granules(&visible, panels, keys->n);
    else
        visible = (struct visible){.count = 0};
    add_dK_dV(call, s, g, keys, &visible);
    if (call->dq)
        add_dQ(call, s, g, keys, block, &visible);
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
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    int64_t blocks = mfa_cpu_ceil(a->kv_len, call->block_kv), block = blocks - 1 - task % blocks, head = task / blocks;
    struct keys keys = keys_of(call, head / a->kv_heads, head % a->kv_heads, block);
    gemm_begin();
    fill(s.dK, padded(keys.n) * padded(a->head_dim), 0);
    fill(s.dV, padded(keys.n) * padded(a->value_dim), 0);
    for (int64_t h = 0; h < a->group; h++)
        for (int64_t i = 0; i < q_blocks(call); i++) {
            struct q_block g = q_block_of(call, keys.batch, keys.kv_head * a->group + h, i);
            if (g.from <= block && block <= g.to)
                visit_q_block(call, &s, &g, &keys, block);
        }
    scale_vectors(s.dK, keys.n * padded(a->head_dim), call->scale / call->dS_factor);
    store_keys(call, call->dk, &a->dk, &keys, s.dK, a->head_dim);
    store_keys(call, call->dv, &a->dv, &keys, s.dV, a->value_dim);
    gemm_end();
}
