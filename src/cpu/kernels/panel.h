/* A panel: up to PANEL queries of one KV head, one a lane. Which keys they see, and their scores.
 *
 * Scores are kept transposed, S[key][lane], so that everything of the softmax is lane by lane, and times
 * call->unit. A hidden score is -inf. */

#define PANEL (MFA_CPU_PANEL_VECTORS * LANES)

struct panel {
    int64_t lanes;                /* queries in it; the lanes beyond repeat the last */
    int vectors;                  /* that hold them */
    int64_t head[PANEL], row[PANEL]; /* query head and query of each lane */
    int64_t low[PANEL], high[PANEL]; /* first and last key that the band shows a lane; none if low > high */
    int64_t any_low, any_high;    /* keys outside are hidden from all lanes */
    int64_t all_low, all_high;    /* keys inside are shown to all lanes */
    int64_t vector_high[MFA_CPU_PANEL_VECTORS]; /* keys after it are hidden from this vector and all before it */
};

/* The panel of `lanes` folded rows from `first` on: row r of a KV head is query r % q_len of the head
 * r / q_len of its group. So short queries of a whole group share one panel. */
static void panel_init(struct panel *panel, const struct mfa_args *a, int64_t kv_head, int64_t first, int64_t lanes)
{
    panel->lanes = lanes;
    panel->vectors = (int)mfa_cpu_ceil(lanes, LANES);
    panel->any_low = a->kv_len, panel->any_high = -1;
    panel->all_low = 0, panel->all_high = a->kv_len - 1;
    for (int v = 0; v < MFA_CPU_PANEL_VECTORS; v++)
        panel->vector_high[v] = -1;
    int64_t head = first / a->q_len, row = first % a->q_len;
    for (int64_t i = 0; i < PANEL; i++) {
        panel->head[i] = kv_head * a->group + head;
        panel->row[i] = row;
        int64_t low = row + a->lower > 0 ? row + a->lower : 0;
        int64_t high = row + a->upper < a->kv_len - 1 ? row + a->upper : a->kv_len - 1;
        panel->low[i] = low, panel->high[i] = high;
        if (low <= high) {
            panel->any_low = low < panel->any_low ? low : panel->any_low;
            panel->any_high = high > panel->any_high ? high : panel->any_high;
        }
        panel->vector_high[i / LANES] = panel->any_high;
        panel->all_low = low > panel->all_low ? low : panel->all_low;
        panel->all_high = high < panel->all_high ? high : panel->all_high;
        if (i + 1 < lanes && ++row == a->q_len)
            row = 0, head++;
    }
}

/* The panel of one query head's queries from `first` on. */
static void panel_of_head(struct panel *panel, const struct mfa_args *a, int64_t head, int64_t first)
{
    int64_t left = a->q_len - first;
    panel_init(panel, a, head / a->group, head % a->group * a->q_len + first, left < PANEL ? left : PANEL);
}

/* rows[lane] = the panel's rows of a tensor of queries, terms across, `stride` apart; zeros beyond its lanes. */
static void panel_load(const struct panel *panel, term *rows, int64_t stride, const void *data, int dtype,
                       const struct mfa_strides *s, int64_t batch, int64_t columns)
{
    for (int64_t i = 0; i < panel->vectors * LANES; i++)
        if (i < panel->lanes)
            load_terms(rows + i * stride, row_at(data, bytes_of(dtype), s, batch, panel->head[i], panel->row[i]), dtype,
                       s->column, columns);
        else
            fill(rows + i * stride, across_stride(columns), 0);
}

/* Keys [from, to) of a block, counted from its first. */
struct range {
    int64_t from, to;
};

/* Which of the n keys from `key` on the band shows to some lane, rounded outward to multiples of `unit`. */
static struct range panel_range(const struct panel *panel, int64_t key, int64_t n, int64_t unit)
{
    int64_t from = panel->any_low - key, to = panel->any_high + 1 - key;
    from = from < 0 ? 0 : from / unit * unit;
    to = mfa_cpu_ceil(to < 0 ? 0 : to, unit) * unit;
    return (struct range){from, to < n ? to : n};
}

/* The end of the keys of range r for which the vectors from v on are all that see any; in whole units. */
static int64_t vector_end(const struct panel *panel, int v, int64_t key, struct range r, int64_t unit)
{
    int64_t to = panel->vector_high[v] + 1 - key;
    to = mfa_cpu_ceil(to < r.from ? r.from : to, unit) * unit;
    return v + 1 < panel->vectors && to < r.to ? to : r.to;
}

/* The keys among r that the band shows to all lanes, in whole units. */
static struct range panel_shown(const struct panel *panel, int64_t key, struct range r, int64_t unit)
{
    int64_t from = panel->all_low - key, to = panel->all_high + 1 - key;
    from = from < r.from ? r.from : mfa_cpu_ceil(from, unit) * unit;
    to = to < r.to ? to / unit * unit : r.to;
    return from < to ? (struct range){from, to} : (struct range){r.to, r.to};
}

enum visibility {
    HIDDEN, /* no lane sees any key of the block: it is not visited */
    SHOWN,  /* every lane sees every key, and nothing is added to the scores */
    BANDED, /* the band hides a part */
    MASKED  /* a mask tile must be added; the band may hide a part too */
};

#define REAL_MAX (sizeof(real) == 8 ? (real)DBL_MAX : (real)FLT_MAX)

/* Finite masks are often the lowest number of their type: that times log2(e) would be -inf, which hides. A power of two
 * survives the way into L and back. */
#define LOWEST_BIAS (sizeof(real) == 8 ? -(real)0x1p1023 : -(real)0x1p127)

/* Row of mask: what it adds to the scores of n keys. Notes hidden and nonzero values. */
static void load_mask_row(real *to, const char *from, const struct mfa_cpu_call *call, int64_t n, int *any_shown,
                          int *any_nonzero)
{
    int64_t step = call->args.mask.column;
    real shown = 0, nonzero = 0;
    if (call->mask_kind == CPU_MASK_BOOL) {
        int64_t count = 0;
        if (step == 1) /* in words that compilers turn into vectors */
            for (int64_t k = 0; k < n; k++)
                count += from[k] != 0, to[k] = from[k] ? (real)0 : -(real)INFINITY;
        else
            for (int64_t k = 0; k < n; k++)
                count += from[k * step] != 0, to[k] = from[k * step] ? (real)0 : -(real)INFINITY;
        shown = (real)count, nonzero = (real)(n - count);
    } else {
        load_row(to, from, call->mask_dtype, step, n);
        for (int64_t k = 0; k < n; k++) {
            real x = to[k] < LOWEST_BIAS && to[k] >= -REAL_MAX ? LOWEST_BIAS : to[k];
            shown += x != -(real)INFINITY;
            nonzero += x != 0;
            to[k] = x * (real)call->unit;
        }
    }
    *any_shown |= shown != 0;
    *any_nonzero |= nonzero != 0;
    for (int64_t k = n; k < padded(n); k++)
        to[k] = 0;
}

/* How the panel sees keys [key, key + n). If MASKED, tile[k][lane] is what is to be added; rows is room for
 * PANEL x padded(n). */
static enum visibility panel_sees(const struct panel *panel, const struct mfa_cpu_call *call, int64_t batch,
                                  int64_t key, int64_t n, real *rows, real *tile)
{
    const struct mfa_strides *s = &call->args.mask;
    if (key > panel->any_high || key + n - 1 < panel->any_low)
        return HIDDEN;
    enum visibility band = key >= panel->all_low && key + n - 1 <= panel->all_high ? SHOWN : BANDED;
    if (call->mask_kind == CPU_MASK_NONE)
        return band;

    int any_shown = 0, any_nonzero = 0;
    int64_t stride = padded(n), bytes = call->mask_kind == CPU_MASK_BOOL ? 1 : bytes_of(call->mask_dtype);
    for (int64_t i = 0; i < panel->vectors * LANES; i++) {
        real *to = rows + i * stride;
        if (i > 0 && panel->row[i] == panel->row[i - 1] && panel->head[i] == panel->head[i - 1]) {
            memcpy(to, to - stride, (size_t)stride * sizeof(real));
            continue;
        }
        const char *from = row_at(call->mask, bytes, s, batch, panel->head[i], panel->row[i]);
        load_mask_row(to, from + key * s->column * bytes, call, n, &any_shown, &any_nonzero);
    }
    if (!any_shown)
        return HIDDEN;
    if (!any_nonzero)
        return band;
    transpose(rows, stride, tile, PANEL, panel->vectors * LANES, stride);
    return MASKED;
}

/* tanh: Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel. */
static inline vec vec_tanh(vec x)
{
    if (sizeof(real) == 8) {
        real lane[LANES];
        vec_store(lane, x);
        for (int i = 0; i < LANES; i++)
            lane[i] = (real)tanh((double)lane[i]);
        return vec_load(lane);
    }
    vec size = vec_max(vec_sub(vec_set1(0), x), x), z = vec_mul(x, x);
    vec p = vec_fma(vec_set1((real)-5.70498872745e-3), z, vec_set1((real)2.06390887954e-2));
    p = vec_fma(p, z, vec_set1((real)-5.37397155531e-2));
    p = vec_fma(p, z, vec_set1((real)1.33314422036e-1));
    p = vec_fma(p, z, vec_set1((real)-3.33332819422e-1));
    p = vec_fma(vec_mul(p, z), x, x);
    vec bounded = vec_select_less(vec_set1(20), size, vec_set1(20), size);
    vec e = vec_exp2(vec_mul(bounded, vec_set1((real)(2 * LOG2E))));
    vec far = vec_sub(vec_set1(1), vec_div(vec_set1(2), vec_add(e, vec_set1(1))));
    far = vec_select_less(x, vec_set1(0), vec_sub(vec_set1(0), far), far);
    return vec_select_less(size, vec_set1((real)0.625), p, far);
}

/* S = softcap * tanh(S) of n rows; slope, if wanted, gets 1 - tanh^2. The queries hold scale / softcap. */
static void cap_scores(int vectors, real *S, int64_t stride, int64_t n, double softcap, real *slope)
{
    vec cap = vec_set1((real)softcap);
    for (int64_t k = 0; k < n; k++)
        for (int v = 0; v < vectors; v++) {
            vec t = vec_tanh(vec_load(S + k * stride + v * LANES));
            vec_store(S + k * stride + v * LANES, vec_mul(t, cap));
            if (slope)
                vec_store(slope + k * PANEL + v * LANES, vec_sub(vec_set1(1), vec_mul(t, t)));
        }
}

/* What Q K^T is multiplied by to give the scores (or what cap_scores takes). Reals of Q^T can be given the factor
 * beforehand; terms of two numbers cannot, without rounding them. */
static inline real score_factor(const struct mfa_cpu_call *call)
{
    return (real)(call->softcap > 0 ? call->scale / call->softcap : call->scale * call->unit);
}

static void scale_queries(const struct mfa_cpu_call *call, term *Q, int64_t n)
{
    if (TERM == 1)
        scale_vectors(Q, n, score_factor(call));
}

/* S + mask; -inf wherever the mask is, also if S is NaN. */
static inline vec masked(vec S, vec mask)
{
    return vec_select_less(mask, vec_set1(-REAL_MAX), mask, vec_add(S, mask));
}

/* Softcap, mask and band on the raw scores of keys [key, key + n). */
static void panel_adjust(const struct panel *panel, const struct mfa_cpu_call *call, enum visibility seen, int64_t key,
                         int64_t n, real *S, int64_t stride, const real *tile, real *slope)
{
    if (call->softcap > 0)
        cap_scores(panel->vectors, S, stride, n, call->softcap * call->unit, slope);
    if (seen == MASKED)
        for (int64_t k = 0; k < n; k++)
            for (int v = 0; v < panel->vectors; v++) {
                real *at = S + k * stride + v * LANES;
                vec_store(at, masked(vec_load(at), vec_load(tile + k * PANEL + v * LANES)));
            }
    if (seen == SHOWN || (key >= panel->all_low && key + n - 1 <= panel->all_high))
        return;
    real low[PANEL], high[PANEL]; /* relative to `key`, so that small numbers are compared */
    for (int64_t i = 0; i < PANEL; i++) {
        int64_t from = panel->low[i] - key, to = panel->high[i] - key;
        low[i] = (real)(from < 0 ? 0 : from > n ? n : from);
        high[i] = (real)(to < -1 ? -1 : to > n ? n : to);
    }
    vec hidden = vec_set1(-(real)INFINITY);
    for (int64_t k = 0; k < n; k++)
        for (int v = 0; v < panel->vectors; v++) {
            real *at = S + k * stride + v * LANES;
            vec j = vec_set1((real)k), s = vec_load(at);
            s = vec_select_less(j, vec_load(low + v * LANES), hidden, s);
            vec_store(at, vec_select_less(vec_load(high + v * LANES), j, hidden, s));
        }
}
