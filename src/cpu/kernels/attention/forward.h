/* O = softmax(S) V and L, by blocks of keys:
 *
 *     for each block of keys that the chunk's queries see:
 *         for each panel of the chunk, and keys of the block that it sees:
 *             S = score(K Q^T)
 *             m, l, O, P = softmax_step(S)                (with dropout, some P become 0)
 *             O^T += V^T P^T
 *     O, L = softmax_epilogue(m, l, O)
 *
 * Scores to which at most a bias is added become P as they are computed (gemm_exp2), as long as m holds. O before it is
 * divided may overflow where V is near the largest number: then the chunk is computed once more, with V times
 * 2^-SHRINK_BITS. */

struct forward_scratch {
    packed *Q, *K, *V, *packed_K, *packed_V, *P; /* K and V: as copied; P may be S */
    real *rows, *S, *acc, *mask_rows, *bias;
#if INT8_PRODUCTS
    struct int8_operands int8; /* in the place of the first line */
#endif
};

static uint64_t forward_arena(const struct mfa_cpu_call *call, char *base, struct forward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim), n = round_up_keys(call->block_kv);
    int64_t wide = padded(a->head_dim > a->value_dim ? a->head_dim : a->value_dim);
    const int biased = has_bias(call);
    uint64_t used = 0;
#if INT8_PRODUCTS
    if (call->int8) {
        s->rows = arena_alloc(base, &used, PANEL * wide);
        s->S = arena_alloc(base, &used, n * PANEL);
        s->acc = arena_alloc(base, &used, call->panels * accumulator_reals(a));
        s->mask_rows = arena_alloc(base, &used, biased ? n * PANEL : 0);
        s->bias = arena_alloc(base, &used, biased ? n * PANEL : 0);
        int8_arena(call, base, &used, n, &s->int8);
        return used;
    }
#endif
    s->Q = arena_alloc(base, &used, call->panels * d * PANEL);
    s->rows = arena_alloc(base, &used, PANEL * wide);
    s->S = arena_alloc(base, &used, n * PANEL);
    s->K = arena_alloc(base, &used, n * d);
    s->V = arena_alloc(base, &used, n * e);
    s->packed_K = arena_alloc(base, &used, KV_IN_PLACE ? 0 : n * d);
    s->packed_V = arena_alloc(base, &used, INTERLEAVED_IN_PLACE ? 0 : n * e);
    s->P = P_IN_PLACE ? s->S : arena_alloc(base, &used, k_packs(n) * PANEL);
    s->acc = arena_alloc(base, &used, call->panels * accumulator_reals(a));
    s->mask_rows = arena_alloc(base, &used, biased ? n * PANEL : 0);
    s->bias = arena_alloc(base, &used, biased ? n * PANEL : 0);
    return used;
}

static uint64_t forward_scratch(const struct mfa_cpu_call *call)
{
    struct forward_scratch s;
    return forward_arena(call, NULL, &s);
}

static uint64_t partial_bytes(const struct mfa_cpu_call *call)
{
    return (uint64_t)(call->panels * accumulator_reals(&call->args)) * sizeof(real);
}

/* A chunk: up to `panels` panels of one KV head's rows. */
struct chunk {
    struct mfa_cpu_sequence seq;
    int64_t kv_head, first_panel, panels;
    int64_t split, splits; /* the part of its keys that is visited, and how many there are */
    char *partials;        /* if these are more than one: their accumulators */
    int shrinks_V;
};

/* Chunk number `place`.index / `parts` of a head. The last comes first: under a causal band it has the most to do. */
static struct chunk chunk_of(const struct mfa_cpu_call *call, const struct mfa_cpu_place *place, int64_t parts)
{
    const struct mfa_cpu_sequence *seq = &place->seq;
    const int64_t panels = mfa_cpu_panels(call, seq->q_len, PANEL), number = place->index / parts;
    struct chunk c = {.seq = *seq, .kv_head = place->head};
    c.first_panel = (mfa_cpu_ceil(panels, call->panels) - 1 - number) * call->panels;
    c.panels = panels - c.first_panel < call->panels ? panels - c.first_panel : call->panels;
    c.splits = seq->splits, c.split = place->index % parts;
    c.partials = (char *)call->partials +
                 (uint64_t)(seq->before[CPU_PARTIALS] + place->head * seq->of_head[CPU_PARTIALS] + number * c.splits) *
                     partial_bytes(call);
    return c;
}

/* The accumulators of a part of the chunk's keys. */
static real *chunk_partial(const struct mfa_cpu_call *call, const struct chunk *c, int64_t split)
{
    return (real *)(void *)(c->partials + (uint64_t)split * partial_bytes(call));
}

static void chunk_panel(const struct mfa_cpu_call *call, const struct chunk *c, int64_t p, struct panel *panel)
{
    panel_of_kv_head(panel, call, &c->seq, c->kv_head, c->first_panel + p);
}

/* The packed operands of a panel: Q^T[d][lane], and P^T[key][lane]. */
static struct packed_b panel_Q(const struct mfa_cpu_call *call, const struct forward_scratch *s, int64_t p)
{
    const int64_t d = row_packs(call->args.head_dim);
    return (struct packed_b){s->Q + p * d * PANEL, packed_b_stride(d, PANEL)};
}

static struct packed_b panel_P(const struct mfa_cpu_call *call, const struct forward_scratch *s)
{
    return (struct packed_b){s->P, packed_b_stride(k_packs(round_up_keys(call->block_kv)), PANEL)};
}

static void pack_queries(const struct mfa_cpu_call *call, const struct panel *panel, packed *rows, struct packed_b Q)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = row_packs(a->head_dim), lanes = panel->vectors * LANES;
    panel_load(panel, lanes, call->q, call->dtype, &a->q, a->head_dim, rows);
    scale_queries(call, rows, lanes * d);
    pack_b_transposed(rows, d, Q, lanes, d);
}

/* A panel and the block that it visits. */
struct forward_step {
    const struct panel *panel;
    int64_t key; /* the block's first */
    struct kv_block K;
    struct packed_at V;
    struct packed_b Q;
    const real *bias;              /* of the first key visited; or NULL */
    const struct dropout *dropout; /* or NULL */
    struct accumulators acc;
};

/* S = K Q^T for keys r of the block, as far as vectors see them. */
static void multiply_keys(const struct mfa_cpu_call *call, const struct forward_step *step, struct range r,
                          struct matrix S)
{
    for (struct band_part part; r.from < r.to; S.data += (part.keys.to - r.from) * PANEL, r.from = part.keys.to) {
        part = band_part(step->panel, step->key, r);
        gemm_nn(part.keys.to - r.from, part.vectors, block_from(step->K, r.from),
                b_from(step->Q, 0, part.vector * LANES), matrix_from(S, 0, part.vector * LANES),
                k_packs(call->args.head_dim), (real)score_factor(call));
    }
}

/* Zeros for the P of a part that are dropped. Inlined it would take registers of the product after it, which AVX2 has
 * few of: forward without dropout then took 6 % more time. */
static __attribute__((noinline)) void drop_part(const struct forward_step *step, struct band_part part,
                                                struct packed_b P)
{
    for (int v = part.vector; v < part.vector + part.vectors; v++)
        drop_b(step->dropout, v, step->key + part.keys.from, part.keys.to - part.keys.from, b_from(P, 0, v * LANES));
}

/* O^T += V^T P^T, likewise, of the P that are kept; P begins with key r.from. */
static void add_values(const struct mfa_cpu_call *call, const struct forward_step *step, struct range r,
                       struct packed_b P)
{
    for (struct band_part part; r.from < r.to; P = b_from(P, part.keys.to - r.from, 0), r.from = part.keys.to) {
        part = band_part(step->panel, step->key, r);
        if (step->dropout)
            drop_part(step, part, P);
        gemm_tn_acc(call->args.value_dim, part.vectors, at_from(step->V, r.from), b_from(P, 0, part.vector * LANES),
                    (struct matrix){step->acc.O + part.vector * LANES, PANEL}, k_packs(part.keys.to - r.from));
    }
}

/* P of keys r of the block, from their S, in whose place it may come. */
static void score_and_softmax(const struct mfa_cpu_call *call, const struct forward_step *step, struct range r,
                              struct matrix S, const real *bias, struct packed_b P)
{
    const struct panel *panel = step->panel;
    for (int v = 0; v < panel->vectors; v++) {
        struct range keys = vector_band_range(panel, v, step->key, r);
        const int64_t lane = v * LANES, k = keys.from - r.from, n = keys.to - keys.from;
        const struct matrix column = matrix_from(S, k, lane);
        panel_score(call, panel, v, step->key + keys.from, n, column, bias ? bias + k * PANEL + lane : NULL, NULL);
        softmax_step(accumulators_from(step->acc, lane), call->args.value_dim, column.data, n, b_from(P, k, lane));
    }
    pad_b(P, r.to - r.from, panel->vectors * LANES);
}

/* What the panel gets from keys r of a block: S, P and l by pieces. Where a piece may raise m, P of those before it is
 * added to O first. */
static void attend(const struct mfa_cpu_call *call, const struct forward_scratch *s, const struct forward_step *step,
                   struct range r)
{
    const struct panel *panel = step->panel;
    const struct range full = full_range(call, panel, step->key, r);
    const struct packed_b P = panel_P(call, s);
    int64_t from = r.from, added = r.from;
    while (from < r.to) {
        const real *bias = step->bias ? step->bias + (from - r.from) * PANEL : NULL;
        if (full.from <= from && from < full.to && all_have_max(step->acc.l)) {
            const struct exp2_epilogue e = {(real)score_factor(call), bias, step->acc.m, step->acc.l,
                                            b_from(P, from - r.from, 0)};
            const int64_t done =
                gemm_exp2(full.to - from, block_from(step->K, from), step->Q, k_packs(call->args.head_dim), e);
            from += done, bias = bias ? bias + done * PANEL : NULL;
        }
        if (from == r.to)
            break;
        add_values(call, step, (struct range){added, from}, b_from(P, added - r.from, 0));
        added = from;
        struct range piece = {from, r.to};
        if (from < full.from)
            piece.to = full.from + KEY_UNIT < r.to ? full.from + KEY_UNIT : r.to; /* each lane gets an m */
        else if (from < full.to)
            piece.to = from + RESCALE_KEYS < full.to ? from + RESCALE_KEYS : full.to;
        const struct packed_b piece_P = b_from(P, from - r.from, 0);
        const struct matrix S = {P_IN_PLACE ? piece_P.data : s->S, PANEL};
        multiply_keys(call, step, piece, S);
        score_and_softmax(call, step, piece, S, bias, piece_P);
        from = piece.to;
    }
    add_values(call, step, (struct range){added, r.to}, b_from(P, added - r.from, 0));
}

/* The keys that some panel of the chunk sees, and the start of its softmax. */
static struct bounds chunk_start(const struct mfa_cpu_call *call, const struct chunk *c,
                                 const struct forward_scratch *s, struct panel *panels)
{
    const struct mfa_args *a = &call->args;
    struct bounds seen = {c->seq.kv_len, -1};
    for (int64_t p = 0; p < c->panels; p++) {
        chunk_panel(call, c, p, &panels[p]);
        softmax_start(a, accumulators_at(s->acc, a, p), c->shrinks_V);
        seen.first = panels[p].any_low < seen.first ? panels[p].any_low : seen.first;
        seen.last = panels[p].any_high > seen.last ? panels[p].any_high : seen.last;
    }
    return seen;
}

/* The first block from j on that the map shows to a panel of the chunk; `end`: there is none before that. */
static int64_t next_block(const struct mfa_cpu_call *call, const struct chunk *c, const struct panel *panels, int64_t j,
                          int64_t end)
{
    for (; j < end && has_block_map(call); j++)
        for (int64_t p = 0; p < c->panels; p++) {
            const int64_t key = j * call->block_kv, rest = c->seq.kv_len - key;
            const int64_t n = rest < call->block_kv ? rest : call->block_kv;
            const struct range keys = band_range(&panels[p], key, n, KEY_UNIT);
            const struct range r = map_range(call, panel_queries(&panels[p]), key, keys, KEY_UNIT);
            if (r.from < r.to)
                return j;
        }
    return j;
}

/* A chunk's walk over the blocks of keys: the block where it is, which is loaded when the first panel visits it. */
struct walk {
    struct kv_source sources[2];
    int64_t key, n, next_block; /* its first key and its keys; the first key of the next block, or -1: there is none */
    struct kv_block K;
    struct packed_at V;
    int64_t packed_panels; /* whose queries have been packed */
};

#if INT8_PRODUCTS
/* Panel p visits keys r of the block by products of int8; bias: of key r.from, or NULL. */
static void int8_visit(const struct mfa_cpu_call *call, const struct chunk *c, const struct forward_scratch *s,
                       const struct panel *panels, struct walk *w, int64_t p, struct range r, const real *bias)
{
    struct dropout dropout;
    if (!w->K.rows) {
        int8_keys(&w->sources[0], &w->sources[1], w->key, w->n, &s->int8);
        w->K.rows = s->int8.K;
    }
    for (; w->packed_panels <= p; w->packed_panels++)
        int8_queries(call, &panels[w->packed_panels], w->packed_panels, &s->int8, s->rows);
    if (has_dropout(call))
        dropout_start(&dropout, call, &panels[p]);
    const struct int8_step step = {&panels[p],
                                   p,
                                   w->key,
                                   bias,
                                   has_dropout(call) ? &dropout : NULL,
                                   c->shrinks_V,
                                   accumulators_at(s->acc, &call->args, p)};
    int8_attend(call, &s->int8, &step, r, s->S);
}
#endif

/* Panel p visits keys r of the block. */
static void visit_keys(const struct mfa_cpu_call *call, const struct chunk *c, const struct forward_scratch *s,
                       const struct panel *panels, struct walk *w, int64_t p, struct range r)
{
    const struct mfa_args *a = &call->args;
    const struct panel *panel = &panels[p];
    const int64_t count = r.to - r.from;
    const enum block_mask seen = panel_bias(panel, call, w->key + r.from, count, s->mask_rows, s->bias);
    if (seen == BLOCK_EMPTY)
        return;
#if INT8_PRODUCTS
    if (call->int8) {
        int8_visit(call, c, s, panels, w, p, r, seen == BLOCK_PARTIAL_BIAS ? s->bias : NULL);
        return;
    }
#endif
    const struct visit visit = {
        !w->K.rows, w->packed_panels <= p, panel->any_high < w->key + w->n, c->splits == 1, p, c->panels,
        count,      w->next_block};
    if (!w->K.rows) {
        w->K = pack_a(kv_load(&w->sources[0], w->key, w->n, !a_fits_tiles(w->n, &a->k, a->head_dim), s->K), w->n,
                      a->head_dim, s->packed_K);
        w->V = pack_at(kv_load(&w->sources[1], w->key, w->n, !at_fits_vectors(a->value_dim), s->V), w->n, a->value_dim,
                       s->packed_V);
    }
    struct prefetch_cursor next[2], *by_product[2];
    visit_prefetch(call, panels, visit, w->sources, next, by_product);
    w->K.next = by_product[0], w->V.next = by_product[1];
    for (; w->packed_panels <= p; w->packed_panels++)
        pack_queries(call, &panels[w->packed_panels], s->rows, panel_Q(call, s, w->packed_panels));
    struct dropout dropout;
    if (has_dropout(call))
        dropout_start(&dropout, call, panel);
    const struct forward_step step = {panel,
                                      w->key,
                                      w->K,
                                      w->V,
                                      panel_Q(call, s, p),
                                      seen == BLOCK_PARTIAL_BIAS ? s->bias : NULL,
                                      has_dropout(call) ? &dropout : NULL,
                                      accumulators_at(s->acc, a, p)};
    attend(call, s, &step, r);
}

/* m, l and O of the chunk's panels from their part of the keys. 0 if an O is not finite. */
static int attend_chunk(const struct mfa_cpu_call *call, const struct chunk *c, const struct forward_scratch *s,
                        struct panel *panels)
{
    const struct mfa_args *a = &call->args;
    struct walk w = {
        .sources = {k_source(call, &c->seq, c->kv_head), v_source(call, &c->seq, c->kv_head, c->shrinks_V)}};
    const struct bounds seen_keys = chunk_start(call, c, s, panels);
    const struct range blocks = split_blocks(c->split, c->splits, seen_keys, call->block_kv);
    for (int64_t j = next_block(call, c, panels, blocks.from, blocks.to), next; j < blocks.to; j = next) {
        next = next_block(call, c, panels, j + 1, blocks.to);
        const struct range keys = block_keys(call, &c->seq, j, seen_keys);
        w.key = keys.from, w.n = keys.to - keys.from;
        w.next_block = next < blocks.to ? next * (int64_t)call->block_kv : -1;
        w.K.rows = NULL;
        for (int64_t p = 0; p < c->panels; p++) {
            const struct queries queries = panel_queries(&panels[p]);
            struct range r, rest = band_range(&panels[p], w.key, w.n, KEY_UNIT);
            for (; r = map_range(call, queries, w.key, rest, KEY_UNIT), r.from < r.to; rest.from = r.to)
                visit_keys(call, c, s, panels, &w, p, r);
        }
    }
    int finite = 1;
    for (int64_t p = 0; p < c->panels; p++)
        finite &= all_finite(accumulators_at(s->acc, a, p).O, a->value_dim * PANEL);
    return finite;
}

static void forward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct forward_scratch s;
    forward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_PARTS, task);
    struct chunk c = chunk_of(call, &place, place.seq.splits);
    if (c.splits > 1)
        s.acc = chunk_partial(call, &c, c.split);

    gemm_begin();
    struct panel panels[MFA_CPU_PANELS_MAX];
    if (!attend_chunk(call, &c, &s, panels)) {
        c.shrinks_V = 1;
        attend_chunk(call, &c, &s, panels);
    }
    for (int64_t p = 0; p < c.panels && c.splits == 1; p++)
        softmax_epilogue(call, &panels[p], accumulators_at(s.acc, a, p), s.rows);
    gemm_end();
}

/* The largest unit of a panel's parts, times 2^SPLITS_BITS, which leaves room for the sum of their O. */
#define SPLITS_BITS 6

static real merged_unit(const struct mfa_cpu_call *call, const struct chunk *c, int64_t panel)
{
    real unit = 1;
    for (int64_t i = 0; i < c->splits; i++) {
        const real own = *accumulators_at(chunk_partial(call, c, i), &call->args, panel).unit;
        unit = own > unit ? own : unit;
    }
    return (real)ldexp((double)unit, SPLITS_BITS);
}

/* Joins the parts of a chunk, in order. */
static void merge(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct forward_scratch s;
    forward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    const struct mfa_cpu_place place = mfa_cpu_find(call, CPU_MERGES, task);
    const struct chunk c = chunk_of(call, &place, 1);
    for (int64_t p = 0; p < c.panels; p++) {
        struct panel panel;
        chunk_panel(call, &c, p, &panel);
        const struct accumulators whole = accumulators_at(chunk_partial(call, &c, 0), a, p);
        const real unit = merged_unit(call, &c, p);
        scale_vectors(whole.O, a->value_dim * PANEL, (double)(*whole.unit / unit));
        *whole.unit = unit;
        for (int64_t i = 1; i < c.splits; i++)
            softmax_merge(whole, accumulators_at(chunk_partial(call, &c, i), a, p), panel.vectors, a->value_dim);
        softmax_epilogue(call, &panel, whole, s.rows);
    }
}
