/* dQ, dK, dV by blocks of keys; each task owns the dK and dV of one block, over all queries that see it:
 *
 *     for each block of queries (of each query head of the KV head), and keys of the block that it sees:
 *         for each panel of the block of queries:
 *             P = exp(S - L), S = score(K Q^T)
 *             dS = P * (dP - D), dP = V dO^T              (times 1 - tanh^2 with softcap)
 *             with dropout, some P and dP become 0 (gradients.h)
 *         dV += P^T dO, dK += dS^T Q
 *         when the block of keys after this one has added its part: dQ += dS K
 *     dK *= scale; and the last block of keys to add to a dQ: dQ *= scale
 *
 * Like S^T, P^T and dS^T are what is stored, [key][query]; the code calls them P and dS.
 *
 * A dQ is added to in one order of the blocks of keys, so sums do not depend on who computes them. Tasks are numbered
 * in that order and each waits only for a lower one. It is from the last block to the first: under a causal band, the
 * first queries that see a block of keys are then some that no other block has to add to before. */

#ifndef MASK_GRANULE
#define MASK_GRANULE 24 /* keys of a block that are skipped together where a block of queries does not see them */
#endif
#define MASK_GRANULES_MAX 16                         /* of a block: 384 keys (src/cpu/tiles.c) */
#define RUN_UNIT (USE_AMX ? MASK_GRANULE : KEY_UNIT) /* in which keys that the map shows are visited */

struct backward_scratch {
    packed *rows;     /* of a panel of Q or dO, or of the keys where KV_IN_PLACE is 0 */
    packed *Qt, *dOt; /* their transposes, right operands: [packs of dim][PANEL] */
    packed *Q, *dO;   /* of the block of queries, right operands: [packs of query][dim] */
    packed *K, *V;    /* left operands */
    packed *packed_K; /* K as the left operand of K^T dS^T */
    real *dK, *dV;
    real *S, *dP;   /* [key][PANEL]; or they lie in the places of P and dS */
    packed *P, *dS; /* of the block of queries, left operands: [key][packs of query] */
    packed *dS_b;   /* dS as a right operand: [packs of key][query] */
    real *dtanh;    /* [key][PANEL]: 1 - tanh^2 */
    real *mask_rows, *bias;
    real *row;   /* one of O and one of dO; LANES rows of sums and their transpose */
    real *dQ;    /* LANES rows, where dQ is summed up transposed */
    real *dbias; /* [key][PANEL] */
};

/* Rows of P and dS: a line more than the block of queries has, lest a column of them lie in few sets of the cache. */
static inline int64_t q_block_stride(const struct mfa_cpu_call *call)
{
    return (int64_t)call->panels * PANEL + PACK_ELEMENTS * LANES;
}

static uint64_t backward_arena(const struct mfa_cpu_call *call, char *base, struct backward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = padded(a->head_dim), e = padded(a->value_dim), n = round_up_keys(call->block_kv);
    int64_t q_block = call->panels * PANEL;
    int64_t d_packs = row_packs(a->head_dim), e_packs = row_packs(a->value_dim);
    const int64_t rows = INTERLEAVED_IN_PLACE ? 0 : KV_IN_PLACE || n < PANEL ? PANEL : n;
    const int biased = has_bias(call);
    uint64_t used = 0;
    s->rows = arena_alloc(base, &used, rows * (d_packs > e_packs ? d_packs : e_packs));
    s->Qt = arena_alloc(base, &used, d_packs * PANEL);
    s->dOt = arena_alloc(base, &used, e_packs * PANEL);
    s->Q = arena_alloc(base, &used, q_block * d_packs);
    s->dO = arena_alloc(base, &used, q_block * e_packs);
    s->K = arena_alloc(base, &used, n * d_packs);
    s->V = arena_alloc(base, &used, n * e_packs);
    s->packed_K = arena_alloc(base, &used, INTERLEAVED_IN_PLACE ? 0 : n * d_packs);
    s->dK = arena_alloc(base, &used, n * d);
    s->dV = arena_alloc(base, &used, n * e);
    s->S = arena_alloc(base, &used, GRADIENTS_IN_PLACE ? 0 : n * PANEL);
    s->dP = arena_alloc(base, &used, GRADIENTS_IN_PLACE ? 0 : n * PANEL);
    s->P = arena_alloc(base, &used, n * k_packs(q_block_stride(call)));
    s->dS = arena_alloc(base, &used, n * k_packs(q_block_stride(call)));
    s->dS_b = GRADIENTS_IN_PLACE ? s->dS : arena_alloc(base, &used, n * k_packs(q_block_stride(call)));
    s->dtanh = arena_alloc(base, &used, call->softcap > 0 ? n * PANEL : 0);
    s->mask_rows = arena_alloc(base, &used, biased ? n * PANEL : 0);
    s->bias = arena_alloc(base, &used, biased ? n * PANEL : 0);
    s->row = arena_alloc(base, &used, 2 * e + 2 * LANES * LANES);
    s->dQ = arena_alloc(base, &used, LANES * d);
    s->dbias = arena_alloc(base, &used, call->features & CPU_MASK_ADDITIVE ? n * PANEL : 0);
    return used;
}

static uint64_t backward_scratch(const struct mfa_cpu_call *call)
{
    struct backward_scratch s;
    return backward_arena(call, NULL, &s);
}

static void backward_preprocess(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    struct backward_scratch s;
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_Q_BLOCKS, task);
    const struct q_block q = q_block_of(call, &place.seq, place.head, place.index);
    preprocess_q_block(call, &q, s.row, s.dQ);
}

/* --- Operands ---------------------------------------------------------------------------------- */

/* One block of keys: where it begins and how many. K and V are loaded when the first panel sees it. */
struct keys {
    const struct mfa_cpu_sequence *seq;
    int64_t kv_head, first, n;
    struct kv_block K, V;
    struct packed_at packed_K;
};

static struct keys keys_of(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t kv_head,
                           int64_t block)
{
    struct keys keys = {.seq = seq, .kv_head = kv_head, .first = block * call->block_kv};
    keys.n = seq->kv_len - keys.first < call->block_kv ? seq->kv_len - keys.first : call->block_kv;
    return keys;
}

static void load_keys(const struct mfa_cpu_call *call, const struct backward_scratch *s, struct keys *keys)
{
    const struct kv_source K = k_source(call, keys->seq, keys->kv_head);
    const struct kv_source V = v_source(call, keys->seq, keys->kv_head, 0);
    const struct kv_block rows = kv_load(&K, keys->first, keys->n, 1, KV_IN_PLACE ? s->K : s->rows);
    keys->packed_K = pack_at(rows, keys->n, K.columns, s->packed_K);
    keys->K = pack_a(rows, keys->n, K.columns, s->K);
    keys->V = pack_a(kv_load(&V, keys->first, keys->n, 1, KV_IN_PLACE ? s->V : s->rows), keys->n, V.columns, s->V);
}

/* Q or dO of the block of queries as a right operand of dK += dS^T Q, dV += P^T dO; rows of the block. */
static inline struct packed_b rows_b(const struct mfa_cpu_call *call, packed *rows, int64_t columns)
{
    return (struct packed_b){rows,
                             packed_b_stride(k_packs((int64_t)call->panels * PANEL), interleaved_columns(columns))};
}

/* Q^T or dO^T of a panel as a right operand of K Q^T, V dO^T. */
static inline struct packed_b columns_b(packed *transposed, int64_t columns)
{
    return (struct packed_b){transposed, packed_b_stride(row_packs(columns), PANEL)};
}

/* The panel's rows of Q or dO, from `first` on of its block of queries: as both operands. */
static void load_panel(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct panel *panel,
                       const void *data, const struct mfa_strides *strides, int64_t columns, struct packed_b rows_to,
                       struct packed_b columns_to)
{
    const int64_t lanes = panel->vectors * LANES, stride = row_packs(columns);
    packed *rows = INTERLEAVED_IN_PLACE ? rows_to.data : s->rows;
    panel_load(panel, lanes, data, call->dtype, strides, columns, rows);
    pack_vnni((struct kv_block){rows, stride, NULL}, lanes, columns, rows_to);
    pack_b_transposed(rows, stride, columns_to, lanes, stride);
}

/* A panel of a block of queries, from row `first` of it on, and keys r of a block of keys that it visits. */
struct backward_step {
    const struct panel *panel;
    int64_t first;
    struct keys *keys;
    struct range r;
    const real *bias, *L, *D;      /* bias: of the first key of r; or NULL */
    const struct dropout *dropout; /* or NULL */
};

/* Loads Q and dO of the panel, and the keys if that is not done; makes the bias. How the panel sees the keys. */
static enum block_mask step_start(const struct mfa_cpu_call *call, const struct backward_scratch *s,
                                  struct backward_step *step)
{
    const struct mfa_args *a = &call->args;
    const struct range r = step->r;
    const struct packed_b Qt = columns_b(s->Qt, a->head_dim), dOt = columns_b(s->dOt, a->value_dim);
    load_panel(call, s, step->panel, call->q, &a->q, a->head_dim,
               b_from(rows_b(call, s->Q, a->head_dim), step->first, 0), Qt);
    load_panel(call, s, step->panel, call->d_o, &a->d_o, a->value_dim,
               b_from(rows_b(call, s->dO, a->value_dim), step->first, 0), dOt);
    const enum block_mask seen =
        panel_bias(step->panel, call, step->keys->first + r.from, r.to - r.from, s->mask_rows, s->bias);
    step->bias = seen == BLOCK_PARTIAL_BIAS ? s->bias : NULL;
    if (seen != BLOCK_EMPTY && !step->keys->K.rows)
        load_keys(call, s, step->keys);
    scale_queries(call, s->Qt, row_packs(a->head_dim) * PANEL);
    scale_gradients(call, s->dOt, row_packs(a->value_dim) * PANEL);
    return seen;
}

/* --- P and dS ---------------------------------------------------------------------------------- */

/* S and dP of a part of the panel: matrices whose first row is the part's first key and whose columns are the panel's
 * lanes. dtanh, which is for softcap, may be NULL. */
static void panel_scores(const struct mfa_cpu_call *call, const struct backward_scratch *s,
                         const struct backward_step *step, struct band_part part, struct matrix S, struct matrix dP,
                         const real *bias, real *dtanh)
{
    const struct mfa_args *a = &call->args;
    const struct keys *keys = step->keys;
    const int64_t from = part.keys.from, n = part.keys.to - from, first = part.vector * LANES;
    gemm_nn(n, part.vectors, block_from(keys->K, from), b_from(columns_b(s->Qt, a->head_dim), 0, first),
            matrix_from(S, 0, first), k_packs(a->head_dim), (real)score_factor(call));
    for (int v = part.vector; v < part.vector + part.vectors; v++) {
        const int64_t lane = v * LANES;
        panel_score(call, step->panel, v, keys->first + from, n, matrix_from(S, 0, lane), bias ? bias + lane : NULL,
                    dtanh ? dtanh + lane : NULL);
    }
    gemm_nn(n, part.vectors, block_from(keys->V, from), b_from(columns_b(s->dOt, a->value_dim), 0, first),
            matrix_from(dP, 0, first), k_packs(a->value_dim), 1);
}

static inline struct packed_b dS_right(const struct mfa_cpu_call *call, const struct backward_scratch *s)
{
    return (struct packed_b){s->dS_b, packed_b_stride(k_packs(round_up_keys(call->block_kv)), q_block_stride(call))};
}

/* Where P and dS of the block of queries go. */
static struct gradients gradients_of(const struct mfa_cpu_call *call, const struct backward_scratch *s)
{
    const int64_t stride = packed_a_stride(k_packs(q_block_stride(call)));
    return (struct gradients){{s->P, stride}, {s->dS, stride}, dS_right(call, s)};
}

/* P = dS = 0 for `lanes` of the block of queries from `first` on, which do not see keys r: others may. */
static void clear_gradients(const struct mfa_cpu_call *call, const struct backward_scratch *s, int64_t first,
                            int64_t lanes, struct range r)
{
    const struct gradients to = gradients_from(gradients_of(call, s), r.from, first);
    const int64_t n = r.to - r.from;
    clear_a(to.P, n, lanes / PACK_ELEMENTS);
    clear_a(to.dS, n, lanes / PACK_ELEMENTS);
    clear_b(to.dS_b, k_packs(n), lanes);
    pad_b(to.dS_b, n, lanes);
}

/* P and dS of the panel for keys r, by way of S and dP in memory, where softcap, bias and band are applied. bias is of
 * the first of these keys, or NULL. */
static void step_gradients(const struct mfa_cpu_call *call, const struct backward_scratch *s,
                           const struct backward_step *step, struct range r, const real *bias)
{
    const struct panel *panel = step->panel;
    for (struct band_part part; r.from < r.to; r.from = part.keys.to) {
        part = band_part(panel, step->keys->first, r);
        const int64_t n = part.keys.to - r.from, lane = part.vector * LANES, end = lane + part.vectors * LANES;
        const struct gradients to = gradients_from(gradients_of(call, s), r.from, step->first);
        const struct matrix S =
            GRADIENTS_IN_PLACE ? (struct matrix){to.P.data, to.P.stride} : (struct matrix){s->S, PANEL};
        const struct matrix dP =
            GRADIENTS_IN_PLACE ? (struct matrix){to.dS.data, to.dS.stride} : (struct matrix){s->dP, PANEL};
        real *dtanh = call->softcap > 0 ? s->dtanh : NULL;
        panel_scores(call, s, step, part, S, dP, bias, dtanh);
        panel_dS(part.vectors, n,
                 (struct scores){S.data + lane, dP.data + lane, S.stride, dtanh ? dtanh + lane : NULL, 1, step->dropout,
                                 part.vector, step->keys->first + r.from},
                 step->L + lane, step->D + lane, gradients_from(to, 0, lane));
        clear_gradients(call, s, step->first, lane, part.keys);
        clear_gradients(call, s, step->first + end, panel->vectors * LANES - end, part.keys);
        bias = bias ? bias + n * PANEL : NULL;
    }
}

/* Rows of Q or dO after those of a panel, evenly while every other tile of n keys is visited. */
static struct prefetch_cursor next_panel_cursor(const struct mfa_cpu_call *call, const struct panel *panel, int64_t n,
                                                const void *data, const struct mfa_strides *s, int64_t columns)
{
    const int64_t each = bytes_of(call->dtype), bytes = columns * each;
    const char *at = q_row_of(panel->seq, data, each, s, panel->head[0], panel->row[0] + PANEL);
    const int64_t per_pack = mfa_cpu_ceil(2 * PANEL * bytes, n * k_packs(call->args.head_dim));
    return (struct prefetch_cursor){at, at + bytes, bytes, s->row * each - bytes, per_pack};
}

/* P and dS of the panel: at once for the keys that all its lanes see, but with dropout. */
static void step_run(const struct mfa_cpu_call *call, const struct backward_scratch *s,
                     const struct backward_step *step)
{
    const struct mfa_args *a = &call->args;
    const struct panel *panel = step->panel;
    const struct keys *keys = step->keys;
    const struct range r = step->r;
    const struct range none = {r.to, r.to}, full = step->dropout ? none : full_range(call, panel, keys->first, r);
    const int64_t n = full.to - full.from;
    const int prefetching =
        n > 0 && a->q.column == 1 && a->d_o.column == 1 && panel->row[0] + PANEL < panel->seq->q_len;
    const real *bias = step->bias;
    struct prefetch_cursor next[2];
    if (prefetching) {
        next[0] = next_panel_cursor(call, panel, n, call->q, &a->q, a->head_dim);
        next[1] = next_panel_cursor(call, panel, n, call->d_o, &a->d_o, a->value_dim);
    }
    step_gradients(call, s, step, (struct range){r.from, full.from}, bias);
    bias = bias ? bias + (full.from - r.from) * PANEL : NULL;
    const struct dS_epilogue e = {
        (real)score_factor(call), bias, step->L, step->D, gradients_from(gradients_of(call, s), full.from, step->first),
        prefetching ? next : NULL};
    const int64_t done =
        gemm_dS(n, block_from(keys->K, full.from), columns_b(s->Qt, a->head_dim), k_packs(a->head_dim),
                block_from(keys->V, full.from), columns_b(s->dOt, a->value_dim), k_packs(a->value_dim), e);
    bias = bias ? bias + done * PANEL : NULL;
    step_gradients(call, s, step, (struct range){full.from + done, r.to}, bias);
}

/* --- dQ, dK, dV --------------------------------------------------------------------------------- */

/* Which of keys `keys` of a block the panels of a block of queries see, in whole granules of them, and their vectors;
 * and which vectors, counted from the block's first, see each granule. Under a band these are neighbours. */
struct visible {
    struct range keys;
    struct range panels[MFA_CPU_PANELS_MAX]; /* keys of each; empty: sees none */
    struct range vectors[MFA_CPU_PANELS_MAX][PANEL_VECTORS];
    struct range granules[MASK_GRANULES_MAX];
    int64_t count; /* of granules */
};

static void visible_granules(struct visible *visible, int64_t panels)
{
    visible->count = mfa_cpu_ceil(visible->keys.to - visible->keys.from, MASK_GRANULE);
    for (int64_t i = 0; i < visible->count; i++) {
        const int64_t from = visible->keys.from + i * MASK_GRANULE, to = from + MASK_GRANULE;
        struct range *r = &visible->granules[i];
        *r = (struct range){panels * PANEL_VECTORS, 0};
        for (int64_t v = 0; v < panels * PANEL_VECTORS; v++) {
            const struct range keys = visible->vectors[v / PANEL_VECTORS][v % PANEL_VECTORS];
            if (keys.from < keys.to && keys.from < to && from < keys.to) {
                r->from = v < r->from ? v : r->from;
                r->to = v + 1;
            }
        }
    }
}

/* Waits until the blocks of keys after this one have added to dQ. The first to add begins with zeros. */
static void begin_dQ(const struct mfa_cpu_call *call, const struct q_block *q, int64_t block)
{
    dq_wait_order(&call->dq_semaphore[q_block_index(q)], block);
    if (next_kv_block(call, q, block, 1) > q->kv_blocks.last)
        clear_dQ(call, q);
}

/* The last to add writes dQ. */
static void end_dQ(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *q,
                   int64_t block)
{
    const int64_t next = next_kv_block(call, q, block, -1);
    if (next < q->kv_blocks.first)
        dQ_epilogue(call, q, s->dQ);
    dq_pass_order(&call->dq_semaphore[q_block_index(q)], next);
}

/* dQ += dS K. Panels that see the same keys are taken together. */
static void add_dQ(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *q,
                   const struct keys *keys, const struct visible *visible)
{
    const int64_t panels = mfa_cpu_ceil(q->rows, PANEL), d = call->args.head_dim;
    const struct matrix dQ = q_block_dQ(call, q);
    for (int64_t p = 0, next; p < panels; p = next) {
        const struct range r = visible->panels[p];
        for (next = p + 1; next < panels && visible->panels[next].from == r.from && visible->panels[next].to == r.to;)
            next++;
        const int64_t first = p * PANEL, rows = (next * PANEL < q->rows ? next * PANEL : q->rows) - first;
        if (r.from >= r.to)
            continue;
        const struct packed_b dS = b_from(dS_right(call, s), r.from, first);
        const struct packed_at K = at_from(keys->packed_K, r.from);
        if (dQ_is_transposed(call))
            gemm_tn_acc(TRANSPOSED_DQ ? padded(d) : d, (int)(round_up_queries(rows) / LANES), K, dS,
                        matrix_from(dQ, 0, first), k_packs(r.to - r.from));
        else
            gemm_tn_acc(rows, (int)(padded(d) / LANES), at_of_b(dS), b_of_at(K), matrix_from(dQ, first, 0),
                        k_packs(r.to - r.from));
    }
}

/* dV += P^T dO and dK += dS^T Q; granules that are seen by the same vectors are taken together. */
static void add_dK_dV(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *q,
                      const struct visible *visible)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = padded(a->head_dim), e = padded(a->value_dim);
    const struct gradients all = gradients_of(call, s);
    for (int64_t i = 0, next; i < visible->count; i = next) {
        const struct range r = visible->granules[i];
        for (next = i + 1;
             next < visible->count && visible->granules[next].from == r.from && visible->granules[next].to == r.to;)
            next++;
        if (r.from >= r.to)
            continue;
        const int64_t key = visible->keys.from + i * MASK_GRANULE, end_key = visible->keys.from + next * MASK_GRANULE;
        const int64_t rows = (end_key < visible->keys.to ? end_key : visible->keys.to) - key;
        const int64_t first = r.from * LANES, end = r.to * LANES < q->rows ? r.to * LANES : round_up_queries(q->rows);
        const int64_t k = (end - first) / PACK_ELEMENTS;
        if (call->dv)
            gemm_nn_acc(rows, (int)(e / LANES), a_from(all.P, key, first),
                        b_from(rows_b(call, s->dO, a->value_dim), first, 0), (struct matrix){s->dV + key * e, e}, k);
        if (call->dk)
            gemm_nn_acc(rows, (int)(d / LANES), a_from(all.dS, key, first),
                        b_from(rows_b(call, s->Q, a->head_dim), first, 0), (struct matrix){s->dK + key * d, d}, k);
    }
}

/* P and dS of the block of queries for keys visible->keys of the block of keys; and which of these the queries see. */
static void visit_panels(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *q,
                         struct keys *keys, struct visible *visible)
{
    const int64_t panels = mfa_cpu_ceil(q->rows, PANEL), from = visible->keys.from, n = visible->keys.to - from;
    int any = 0;
    for (int64_t p = 0; p < panels; p++) {
        struct panel panel;
        const int64_t first = p * PANEL;
        panel_of_head(&panel, q->seq, &call->args, q->head, q->first + first, q->first + q->rows);
        struct range r = band_range(&panel, keys->first + from, n, MASK_GRANULE);
        r.from += from, r.to += from;
        visible->panels[p] = r;
        for (int v = 0; v < PANEL_VECTORS; v++)
            visible->vectors[p][v] =
                v < panel.vectors ? vector_band_range(&panel, v, keys->first, r) : (struct range){r.to, r.to};
        if (r.from >= r.to)
            continue;
        struct backward_step step = {&panel, first, keys, r, NULL, q_block_L(call, q, first), q_block_D(call, q, first),
                                     NULL};
        struct dropout dropout;
        if (has_dropout(call))
            dropout_start(&dropout, call, &panel), step.dropout = &dropout;
        if (step_start(call, s, &step) == BLOCK_EMPTY) {
            clear_gradients(call, s, first, panel.vectors * LANES, r);
            continue;
        }
        step_run(call, s, &step);
        any = 1;
    }
    if (any)
        visible_granules(visible, panels);
    else
        *visible = (struct visible){.count = 0};
}

/* What one block of queries adds to dK, dV of the block of keys and gets from it as dQ. */
static void visit_q_block(const struct mfa_cpu_call *call, const struct backward_scratch *s, const struct q_block *q,
                          struct keys *keys, int64_t block)
{
    struct visible visible;
    struct range rest = {0, keys->n}, first = map_range(call, q_block_queries(q), keys->first, rest, RUN_UNIT), r;
    for (r = first; r.from < r.to; r = map_range(call, q_block_queries(q), keys->first, rest, RUN_UNIT)) {
        visible.keys = r;
        rest.from = r.to;
        visit_panels(call, s, q, keys, &visible);
        add_dK_dV(call, s, q, &visible);
        if (!call->dq)
            continue;
        if (r.from == first.from)
            begin_dQ(call, q, block);
        add_dQ(call, s, q, keys, &visible);
    }
    if (call->dq && first.from < first.to)
        end_dQ(call, s, q, block);
}

static void store_keys(const struct mfa_cpu_call *call, void *to, const struct mfa_strides *strides,
                       const struct keys *keys, const real *rows, int64_t columns)
{
    for (int64_t r = 0; to && r < keys->n; r++)
        store_row((char *)kv_row_of(keys->seq, to, bytes_of(call->out_dtype), strides, keys->kv_head, keys->first + r),
                  call->out_dtype, strides->column, rows + r * padded(columns), columns);
}

static void backward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_KV_BLOCKS, task);
    const struct mfa_cpu_sequence *seq = &place.seq;
    const int64_t block = seq->of_head[CPU_KV_BLOCKS] - 1 - place.index;
    struct keys keys = keys_of(call, seq, place.head, block);
    gemm_begin();
    fill(s.dK, padded(keys.n) * padded(a->head_dim), 0);
    fill(s.dV, padded(keys.n) * padded(a->value_dim), 0);
    for (int64_t h = 0; h < a->q_heads_per_kv; h++)
        for (int64_t i = 0; i < seq->of_head[CPU_Q_BLOCKS]; i++) {
            const struct q_block q = q_block_of(call, seq, keys.kv_head * a->q_heads_per_kv + h, i);
            if (q.kv_blocks.first <= block && block <= q.kv_blocks.last)
                visit_q_block(call, &s, &q, &keys, block);
        }
    scale_vectors(s.dK, keys.n * padded(a->head_dim), dS_scale(call));
    if (call->kept != 1)
        scale_vectors(s.dV, keys.n * padded(a->value_dim), 1 / call->kept);
    store_keys(call, call->dk, &a->dk, &keys, s.dK, a->head_dim);
    store_keys(call, call->dv, &a->dv, &keys, s.dV, a->value_dim);
    gemm_end();
}
