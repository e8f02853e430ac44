/* O = softmax(S) V and L, by blocks of keys, with the softmax kept up to date:
 *
 *     for each block of keys that the chunk's queries see:
 *         for each panel of the chunk that sees it:
 *             S = K Q^T                                   (softcap, mask, band)
 *             if any max(S) > m + SLACK: m' = max(m, max(S)); l, O *= exp(m - m'); m = m'
 *             P = exp(S - m), l += sum(P), O^T += V^T P
 *     O = O / l, L = m + log(l)
 *
 * m is a reference, not the maximum itself (softmax.h). Scores to which at most a mask is added become P as they are
 * computed, as long as m holds. O before it is divided may overflow where V is near the largest number: then the chunk
 * is computed once more, with V times 2^-SHRINK_BITS. */

#define RESCALE_KEYS (USE_AMX ? KEY_UNIT : 48) /* where m does not hold, so many keys give another one */

struct accumulators { /* of one panel: real O[padded(value_dim)][PANEL], m[PANEL], l[PANEL] */
    real *O, *m, *l;
    real *unit; /* what O is still to be multiplied by: a power of two */
};

static inline int64_t accumulator_reals(const struct mfa_args *a)
{
    return (padded(a->value_dim) + 2) * PANEL + LANES;
}

static struct accumulators accumulators_at(real *memory, const struct mfa_args *a, int64_t panel)
{
    real *O = memory + panel * accumulator_reals(a), *m = O + padded(a->value_dim) * PANEL;
    return (struct accumulators){O, m, m + PANEL, m + 2 * PANEL};
}

struct forward_scratch {
    packed *Q, *K, *V, *packed_V, *P; /* K and V: as copied; P may be S */
    real *rows, *S, *sums, *mask_rows, *mask_tile;
};

static uint64_t forward_arena(const struct mfa_cpu_call *call, char *base, struct forward_scratch *s)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), e = row_packs(a->value_dim), n = whole_keys(call->block_kv);
    int64_t wide = padded(a->head_dim > a->value_dim ? a->head_dim : a->value_dim);
    int has_mask = call->mask_kind != CPU_MASK_NONE;
    uint64_t used = 0;
    s->Q = arena_alloc(base, &used, call->panels * d * PANEL);
    s->rows = arena_alloc(base, &used, PANEL * wide);
    s->S = arena_alloc(base, &used, n * PANEL);
    s->K = arena_alloc(base, &used, n * d);
    s->V = arena_alloc(base, &used, n * e);
    s->packed_V = arena_alloc(base, &used, K_PACK > 1 ? n * e : 0);
    s->P = USE_AMX ? arena_alloc(base, &used, n / K_PACK * PANEL) : s->S;
    s->sums = arena_alloc(base, &used, call->panels * accumulator_reals(a));
    s->mask_rows = arena_alloc(base, &used, has_mask ? n * PANEL : 0);
    s->mask_tile = arena_alloc(base, &used, has_mask ? n * PANEL : 0);
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

/* A chunk: up to `panels` panels of one KV head's folded rows. */
struct chunk {
    int64_t batch, kv_head, first, rows, panels;
    int shrinks_V;
};

static struct chunk chunk_of(const struct mfa_cpu_call *call, int64_t task)
{
    const struct mfa_args *a = &call->args;
    int64_t rows = a->group * a->q_len, size = (int64_t)call->panels * PANEL, chunks = mfa_cpu_ceil(rows, size);
    int64_t index = chunks - 1 - task % chunks; /* last first: under a causal band it has the most to do */
    struct chunk c = {.batch = task / chunks / a->kv_heads, .kv_head = task / chunks % a->kv_heads};
    c.first = index * size;
    c.rows = rows - c.first < size ? rows - c.first : size;
    c.panels = mfa_cpu_ceil(c.rows, PANEL);
    return c;
}

static void chunk_panel(const struct chunk *c, const struct mfa_args *a, int64_t p, struct panel *panel)
{
    int64_t left = c->rows - p * PANEL;
    panel_init(panel, a, c->kv_head, c->first + p * PANEL, left < PANEL ? left : PANEL);
}

/* Blocks [from, to) of `size` keys: a split's share of those that hold keys low..high. */
static struct range split_of(const struct mfa_cpu_call *call, int64_t split, int64_t low, int64_t high, int64_t size)
{
    int64_t first = low / size, blocks = high < low ? 0 : high / size - first + 1;
    return (struct range){first + blocks * split / call->splits, first + blocks * (split + 1) / call->splits};
}

/* Those of block j among keys low..high, in whole units: a chunk loads no others. */
static struct range keys_of_block(const struct mfa_cpu_call *call, int64_t j, int64_t low, int64_t high)
{
    struct range keys = {j * call->block_kv, (j + 1) * call->block_kv};
    int64_t end = mfa_cpu_ceil(high + 1, KEY_UNIT) * KEY_UNIT;
    if (end > call->args.kv_len)
        end = call->args.kv_len;
    keys.from = low > keys.from ? low / KEY_UNIT * KEY_UNIT : keys.from;
    keys.to = end < keys.to ? end : keys.to;
    return keys;
}

/* Of Q^T, of P^T. */
static inline int64_t Q_stride(const struct mfa_cpu_call *call)
{
    return packed_b_stride(row_packs(call->args.head_dim), PANEL);
}

static inline int64_t P_stride(const struct mfa_cpu_call *call)
{
    return packed_b_stride(whole_keys(call->block_kv) / K_PACK, PANEL);
}

/* Q^T[d][lane]. */
static void pack_queries(const struct mfa_cpu_call *call, const struct panel *panel, int64_t batch, packed *rows,
                         packed *Q)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim);
    panel_load(panel, rows, d, call->q, call->dtype, &a->q, batch, a->head_dim);
    scale_queries(call, rows, panel->vectors * LANES * d);
    pack_b_transposed(rows, d, Q, Q_stride(call), panel->vectors * LANES, d);
}

/* P of a column of n vectors of S; l, and O[value_dim][PANEL] and m if m does not hold, are those of its lanes. */
static void softmax_step(real *m, real *l, real *O, int64_t value_dim, const real *S, int64_t n, packed *P,
                         int64_t stride)
{
    vec reference = vec_load(m), top = column_max(S, n);
    if (vec_any_less(vec_add(reference, vec_set1(RESCALE_THRESHOLD)), top)) {
        vec raised = vec_max(top, reference), alpha = exp_of(vec_sub(reference, raised));
        int64_t rows = vec_any_less(vec_set1(0), vec_load(l)) ? value_dim : 0; /* else O is 0 */
        vec_store(m, raised);
        vec_store(l, vec_mul(vec_load(l), alpha));
        for (int64_t d = 0; d < rows; d++)
            vec_store(O + d * PANEL, vec_mul(vec_load(O + d * PANEL), alpha));
        reference = raised;
    }
    vec_store(l, vec_add(vec_load(l), column_exp(S, n, reference, P, stride)));
}

/* Divides by l and writes the panel's rows of O and L, and of what rounding takes off O if that is wanted. */
static void epilogue(const struct mfa_cpu_call *call, const struct panel *panel, int64_t batch,
                     struct accumulators sums, real *rows)
{
    const struct mfa_args *a = &call->args;
    int64_t e = padded(a->value_dim), bytes = bytes_of(call->dtype);
    for (int64_t i = 0; i < panel->lanes; i++) {
        real *row = rows + i % LANES * e;
        if (i % LANES == 0)
            transpose(sums.O + i, PANEL, rows, e, e, LANES);
        scale_vectors(row, e, sums.l[i] == 0 ? 0 : *sums.unit / sums.l[i]);
        char *to = (char *)row_at(call->o, bytes, &a->o, batch, panel->head[i], panel->row[i]);
        if (call->o_low)
            store_row_and_rest(to, (char *)row_at(call->o_low, bytes, &a->o, batch, panel->head[i], panel->row[i]),
                               call->dtype, a->o.column, row, a->value_dim);
        else
            store_row(to, call->dtype, a->o.column, row, a->value_dim);
    }
    if (!call->lse)
        return;
    for (int64_t i = 0; i < panel->lanes; i++) {
        real *at = (real *)row_at(call->lse, sizeof(real), &a->lse, batch, panel->head[i], panel->row[i]);
        *at = sums.l[i] == 0 ? -(real)INFINITY : (real)((double)sums.m[i] / S_UNIT + log((double)sums.l[i]));
    }
}

/* S = K Q^T for keys r of a block, as far as vectors see them. */
static void multiply_keys(const struct mfa_cpu_call *call, const struct panel *panel, int64_t key, struct range r,
                          struct kv_block K, const packed *Q, real *S)
{
    for (struct part part; r.from < r.to; S += (part.keys.to - r.from) * PANEL, r.from = part.keys.to) {
        part = band_part(panel, key, r);
        gemm_nn(part.keys.to - r.from, part.vectors, K.rows + r.from * K.stride, K.stride,
                Q + packed_b_index(Q_stride(call), 0, part.vector * LANES), Q_stride(call), S + part.vector * LANES,
                PANEL, k_packs(call->args.head_dim), (real)score_factor(call), K.next);
    }
}

/* O^T += V^T P^T, likewise. */
static void add_values(const struct mfa_cpu_call *call, const struct panel *panel, int64_t key, struct range r,
                       struct kv_block V, const packed *P, real *O)
{
    int64_t stride = P_stride(call), n;
    for (struct part part; r.from < r.to; P += packed_b_index(stride, n / K_PACK, 0), r.from = part.keys.to) {
        part = band_part(panel, key, r);
        n = part.keys.to - r.from;
        gemm_tn_acc(call->args.value_dim, part.vectors, packed_a_row(V, r.from), V.stride,
                    P + packed_b_index(stride, 0, part.vector * LANES), stride, O + part.vector * LANES, PANEL,
                    k_packs(n), V.next);
    }
}

/* P of keys r of a block, from its S, in whose place it may come. */
static void normalize(const struct mfa_cpu_call *call, const struct panel *panel, struct accumulators sums, int64_t key,
                      struct range r, real *S, const real *mask, packed *P)
{
    int64_t stride = P_stride(call);
    for (int v = 0; v < panel->vectors; v++) {
        struct range keys = vector_band_range(panel, v, key, r);
        int64_t lane = v * LANES, k = keys.from - r.from, at = k * PANEL + lane, n = keys.to - keys.from;
        panel_score(panel, call, v, key + keys.from, n, S + at, PANEL, mask ? mask + at : NULL, NULL);
        softmax_step(sums.m + lane, sums.l + lane, sums.O + lane, call->args.value_dim, S + at, n,
                     P + packed_b_index(stride, k / K_PACK, lane), stride);
    }
    pad_b(P, stride, r.to - r.from, panel->vectors * LANES);
}

/* Rows of K or V from `key` on, one of their terms for each that is read. */
static struct prefetch_cursor kv_cursor(const struct mfa_cpu_call *call, const struct chunk *c, int64_t key,
                                        const void *data, const struct mfa_strides *s, int64_t columns)
{
    int64_t each = bytes_of(call->dtype), bytes = columns * each;
    const char *at = row_at(data, each, s, c->batch, c->kv_head, key);
    return (struct prefetch_cursor){at, at + bytes, bytes, s->row * each - bytes, K_PACK * each};
}

/* A panel's rows of Q or O, evenly while n keys are multiplied with as many columns. */
static struct prefetch_cursor q_cursor(const struct mfa_cpu_call *call, const struct chunk *c,
                                       const struct panel *panel, int64_t n, const void *data,
                                       const struct mfa_strides *s, int64_t columns)
{
    int64_t each = bytes_of(call->dtype), bytes = columns * each;
    const char *at = row_at(data, each, s, c->batch, panel->head[0], panel->row[0]);
    int64_t a_term = mfa_cpu_ceil(panel->lanes * bytes, n * k_packs(columns));
    return (struct prefetch_cursor){at, at + bytes, bytes, s->row * each - bytes, a_term};
}

/* For tile registers, whose exponentials ask for a line for each key: a share of the next block's rows, of K with the
 * first half of the panels, of V with the others. */
static struct prefetch_cursor kv_cursor_share(const struct mfa_cpu_call *call, const struct chunk *c, int64_t p,
                                              int64_t keys, int64_t next_block)
{
    const struct mfa_args *a = &call->args;
    int64_t first = p, panels = mfa_cpu_ceil(c->panels, 2), n = a->kv_len - next_block;
    n = n < call->block_kv ? n : call->block_kv;
    int of_K = p < panels;
    if (!of_K)
        first -= panels, panels = c->panels - panels;
    struct prefetch_cursor rows = kv_cursor(call, c, next_block + n * first / panels, of_K ? call->k : call->v,
                                            of_K ? &a->k : &a->v, of_K ? a->head_dim : a->value_dim);
    int64_t each = mfa_cpu_ceil(mfa_cpu_ceil(n, panels) * rows.bytes, keys);
    each = each < 64 ? 64 : each;
    rows.each = each < rows.bytes ? each : rows.bytes;
    return rows;
}

/* What is asked for while a panel visits keys of a block. */
struct visit {
    int first_of_block, first_of_panel, last_of_panel;
    int64_t keys, next_block; /* its first key; or -1: there is none */
};

/* The next block, once for all panels, or by and by with each; else Q of the next panel. O of this one, before it is
 * written; with pairs of terms the asking costs more than it gains there. */
static void prefetch_ahead(const struct mfa_cpu_call *call, const struct chunk *c, const struct panel *panels,
                           int64_t p, struct visit visit, struct prefetch_cursor next[2], struct kv_block *K,
                           struct kv_block *V)
{
    const struct mfa_args *a = &call->args;
    int dense = a->k.column == 1 && a->v.column == 1;
    K->next = V->next = NULL;
    if (USE_AMX && visit.next_block >= 0 && dense) {
        next[0] = kv_cursor_share(call, c, p, visit.keys, visit.next_block);
        K->next = &next[0];
    } else if (USE_AMX) {
        return;
    } else if (visit.first_of_block && visit.next_block >= 0 && dense) {
        next[0] = kv_cursor(call, c, visit.next_block, call->k, &a->k, a->head_dim);
        next[1] = kv_cursor(call, c, visit.next_block, call->v, &a->v, a->value_dim);
        K->next = &next[0], V->next = &next[1];
    } else if (visit.first_of_panel && p + 1 < c->panels && a->q.column == 1) {
        next[0] = q_cursor(call, c, &panels[p + 1], visit.keys, call->q, &a->q, a->head_dim);
        K->next = &next[0];
    }
    if (visit.last_of_panel && K_PACK == 1 && call->splits == 1 && a->o.column == 1) {
        next[1] = q_cursor(call, c, &panels[p], visit.keys, call->o, &a->o, a->value_dim);
        V->next = &next[1];
    }
}

/* What the panel gets from keys r of a block: S, P and l by pieces. Where a piece may raise m, P of those before it
 * goes into O first. */
static void attend(const struct mfa_cpu_call *call, const struct panel *panel, const struct forward_scratch *s,
                   struct accumulators sums, enum block_mask seen, int64_t key, struct range r, struct kv_block K,
                   struct kv_block V, const packed *Q)
{
    const struct mfa_args *a = &call->args;
    int plain = panel->vectors == PANEL_VECTORS && !(call->softcap > 0);
    struct range shown = plain ? full_range(panel, key, r, KEY_UNIT) : (struct range){r.to, r.to};
    int64_t from = r.from, added = r.from, stride = P_stride(call);
    while (from < r.to) {
        packed *P = s->P + packed_b_index(stride, (from - r.from) / K_PACK, 0);
        const real *mask = seen == BLOCK_MASKED ? s->mask_tile + (from - r.from) * PANEL : NULL;
        if (shown.from <= from && from < shown.to && all_have_max(sums.l)) {
            int64_t done = gemm_exp2(shown.to - from, K.rows + from * K.stride, K.stride, Q, k_packs(a->head_dim),
                                     (real)score_factor(call), mask, sums.m, sums.l, P, stride, K.next);
            from += done, P += packed_b_index(stride, done / K_PACK, 0), mask = mask ? mask + done * PANEL : NULL;
        }
        if (from == r.to)
            break;
        add_values(call, panel, key, (struct range){added, from}, V,
                   s->P + packed_b_index(stride, (added - r.from) / K_PACK, 0), sums.O);
        added = from;
        struct range piece = {from, r.to};
        if (from < shown.from)
            piece.to = shown.from + KEY_UNIT < r.to ? shown.from + KEY_UNIT : r.to; /* each lane gets an m */
        else if (from < shown.to)
            piece.to = from + RESCALE_KEYS < shown.to ? from + RESCALE_KEYS : shown.to;
        real *S = USE_AMX ? s->S : P;
        multiply_keys(call, panel, key, piece, K, Q, S);
        normalize(call, panel, sums, key, piece, S, mask, P);
        from = piece.to;
    }
    add_values(call, panel, key, (struct range){added, r.to}, V,
               s->P + packed_b_index(stride, (added - r.from) / K_PACK, 0), sums.O);
}

/* m, l and O of the chunk's panels from their part `split` of the keys. 0 if an O is not finite. */
static int attend_chunk(const struct mfa_cpu_call *call, const struct chunk *c, const struct forward_scratch *s,
                        int64_t split, struct panel *panels)
{
    const struct mfa_args *a = &call->args;
    int64_t d = row_packs(a->head_dim), low = a->kv_len, high = -1;
    for (int64_t p = 0; p < c->panels; p++) {
        struct accumulators sums = accumulators_at(s->sums, a, p);
        chunk_panel(c, a, p, &panels[p]);
        fill(sums.O, padded(a->value_dim) * PANEL, 0);
        fill(sums.m, PANEL, -REAL_MAX);
        fill(sums.l, PANEL, 0);
        *sums.unit = (real)ldexp(1, c->shrinks_V ? SHRINK_BITS : 0);
        low = panels[p].any_low < low ? panels[p].any_low : low;
        high = panels[p].any_high > high ? panels[p].any_high : high;
    }

    int64_t size = call->block_kv, packed_panels = 0;
    struct range blocks = split_of(call, split, low, high, size);
    for (int64_t j = blocks.from; j < blocks.to; j++) {
        struct range keys = keys_of_block(call, j, low, high);
        int64_t key = keys.from, n = keys.to - key;
        struct kv_block K = {0}, V = {0};
        for (int64_t p = 0; p < c->panels; p++) {
            struct range r = band_range(&panels[p], key, n, KEY_UNIT);
            if (r.from >= r.to)
                continue;
            int64_t count = r.to - r.from;
            enum block_mask seen =
                panel_block_mask(&panels[p], call, c->batch, key + r.from, count, s->mask_rows, s->mask_tile);
            if (seen == BLOCK_EMPTY)
                continue;
            struct visit visit = {!K.rows, packed_panels <= p, panels[p].any_high < key + n, count,
                                  j + 1 < blocks.to ? (j + 1) * size : -1};
            if (!K.rows) {
                K = load_block(s->K, call->k, call->dtype, &a->k, c->batch, c->kv_head, key, n, a->head_dim,
                               USE_AMX && (n % KEY_UNIT != 0 || a->k.row != a->head_dim));
                V = load_block(s->V, call->v, call->dtype, &a->v, c->batch, c->kv_head, key, n, a->value_dim,
                               c->shrinks_V || (a->value_dim % (K_PACK * LANES) != 0 && K_PACK > 1));
                if (c->shrinks_V)
                    shrink_packs(s->V, n * V.stride);
                V = pack_a(V, n, a->value_dim, s->packed_V);
            }
            struct prefetch_cursor next[2];
            prefetch_ahead(call, c, panels, p, visit, next, &K, &V);
            for (; packed_panels <= p; packed_panels++)
                pack_queries(call, &panels[packed_panels], c->batch, s->rows, s->Q + packed_panels * d * PANEL);
            attend(call, &panels[p], s, accumulators_at(s->sums, a, p), seen, key, r, K, V, s->Q + p * d * PANEL);
        }
    }
    int finite = 1;
    for (int64_t p = 0; p < c->panels; p++)
        finite &= all_finite(accumulators_at(s->sums, a, p).O, a->value_dim * PANEL);
    return finite;
}

static void forward(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct forward_scratch s;
    forward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    struct chunk c = chunk_of(call, task / call->splits);
    if (call->splits > 1)
        s.sums = (real *)(void *)((char *)call->partials + (uint64_t)task * partial_bytes(call));

    gemm_begin();
    struct panel panels[MFA_CPU_PANELS_MAX];
    if (!attend_chunk(call, &c, &s, task % call->splits, panels)) {
        c.shrinks_V = 1;
        attend_chunk(call, &c, &s, task % call->splits, panels);
    }
    for (int64_t p = 0; p < c.panels && call->splits == 1; p++)
        epilogue(call, &panels[p], c.batch, accumulators_at(s.sums, a, p), s.rows);
    gemm_end();
}

/* The largest unit of a panel's parts, times 2^SPLITS_BITS, which leaves room for the sum of their O. */
#define SPLITS_BITS 6

static real merged_unit(const struct mfa_cpu_call *call, char *parts, int64_t panel)
{
    real unit = 1;
    for (int64_t i = 0; i < call->splits; i++) {
        real *part = (real *)(void *)(parts + (uint64_t)i * partial_bytes(call));
        const real own = *accumulators_at(part, &call->args, panel).unit;
        unit = own > unit ? own : unit;
    }
    return (real)ldexp((double)unit, SPLITS_BITS);
}

/* Joins the parts of a chunk, in order: m = max(m_s), l and O = sum of exp(m_s - m) times theirs. */
static void merge(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct forward_scratch s;
    forward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    struct chunk c = chunk_of(call, task);
    char *parts = (char *)call->partials + (uint64_t)(task * call->splits) * partial_bytes(call);
    for (int64_t p = 0; p < c.panels; p++) {
        struct panel panel;
        chunk_panel(&c, a, p, &panel);
        struct accumulators whole = accumulators_at((real *)(void *)parts, a, p);
        const real unit = merged_unit(call, parts, p);
        scale_vectors(whole.O, a->value_dim * PANEL, (double)(*whole.unit / unit));
        *whole.unit = unit;
        for (int64_t i = 1; i < call->splits; i++) {
            struct accumulators part =
                accumulators_at((real *)(void *)(parts + (uint64_t)i * partial_bytes(call)), a, p);
            const vec shrink = vec_set1(*part.unit / unit);
            for (int v = 0; v < panel.vectors; v++) {
                int64_t at = v * LANES;
                vec m0 = vec_load(whole.m + at), m1 = vec_load(part.m + at), m = vec_max(m0, m1);
                vec w0 = exp_of(vec_sub(m0, m)), w1 = exp_of(vec_sub(m1, m));
                vec_store(whole.m + at, m);
                vec l = vec_mul(vec_load(whole.l + at), w0);
                vec_store(whole.l + at, vec_fma(vec_load(part.l + at), w1, l));
                w1 = vec_mul(w1, shrink);
                for (int64_t r = 0; r < a->value_dim; r++) {
                    real *O = whole.O + r * PANEL + at;
                    vec_store(O, vec_fma(vec_load(part.O + r * PANEL + at), w1, vec_mul(vec_load(O), w0)));
                }
            }
        }
        epilogue(call, &panel, c.batch, whole, s.rows);
    }
}
