/* A panel: up to PANEL queries of one KV head, one a lane. Scores are kept transposed, S[key][lane], so that everything
 * of the softmax is lane by lane; a score that does not count is -inf. */

/* Keys in whole units and vectors. */
static inline int64_t round_up_keys(int64_t keys)
{
    return padded(mfa_cpu_ceil(keys, KEY_UNIT) * KEY_UNIT);
}

/* Queries in whole units. */
static inline int64_t round_up_queries(int64_t queries)
{
    return mfa_cpu_ceil(queries, QUERY_VECTORS * LANES) * QUERY_VECTORS * LANES;
}

struct panel {
    const struct mfa_cpu_sequence *seq;
    int64_t lanes;                   /* queries in it; the lanes beyond repeat the last */
    int vectors;                     /* that hold them, in whole units */
    int64_t head[PANEL], row[PANEL]; /* query head and query of each lane */
    /* What the band leaves (block_range.h): of each lane, its first and last key, none if low > high; keys outside of
     * any_low..any_high are seen by no lane, those within all_low..all_high by all; those before vector_low by neither
     * this vector nor one after it, those after vector_high by neither this nor one before it. */
    int64_t low[PANEL], high[PANEL];
    int64_t any_low, any_high, all_low, all_high;
    int64_t vector_low[PANEL_VECTORS], vector_high[PANEL_VECTORS];
};

static void panel_add_band(struct panel *panel, int64_t lane)
{
    const struct mfa_cpu_sequence *seq = panel->seq;
    const int64_t row = panel->row[lane], vector = lane / LANES;
    int64_t low = row + seq->lower > 0 ? row + seq->lower : 0;
    int64_t high = row + seq->upper < seq->kv_len - 1 ? row + seq->upper : seq->kv_len - 1;
    panel->low[lane] = low, panel->high[lane] = high;
    if (low <= high) {
        panel->any_low = low < panel->any_low ? low : panel->any_low;
        panel->any_high = high > panel->any_high ? high : panel->any_high;
        panel->vector_low[vector] = low < panel->vector_low[vector] ? low : panel->vector_low[vector];
    }
    panel->vector_high[vector] = panel->any_high;
    panel->all_low = low > panel->all_low ? low : panel->all_low;
    panel->all_high = high < panel->all_high ? high : panel->all_high;
}

/* The panel of `lanes` rows of a KV head from `first` on: its row r is query r % q_len of the head r / q_len of its
 * group. So short queries of a whole group share one panel (pack GQA). */
static void panel_init(struct panel *panel, const struct mfa_cpu_sequence *seq, const struct mfa_args *a,
                       int64_t kv_head, int64_t first, int64_t lanes)
{
    panel->seq = seq;
    panel->lanes = lanes;
    panel->vectors = (int)(round_up_queries(lanes) / LANES);
    panel->any_low = seq->kv_len, panel->any_high = -1;
    panel->all_low = 0, panel->all_high = seq->kv_len - 1;
    for (int v = 0; v < PANEL_VECTORS; v++)
        panel->vector_low[v] = seq->kv_len, panel->vector_high[v] = -1;
    int64_t head = first / seq->q_len, row = first % seq->q_len;
    for (int64_t i = 0; i < PANEL; i++) {
        panel->head[i] = kv_head * a->q_heads_per_kv + head;
        panel->row[i] = row;
        panel_add_band(panel, i);
        if (i + 1 < lanes && ++row == seq->q_len)
            row = 0, head++;
    }
    for (int v = PANEL_VECTORS - 1; v > 0; v--)
        if (panel->vector_low[v] < panel->vector_low[v - 1])
            panel->vector_low[v - 1] = panel->vector_low[v];
}

/* The panel of queries [first, end) of one query head, of which it takes as many as it has lanes. */
static void panel_of_head(struct panel *panel, const struct mfa_cpu_sequence *seq, const struct mfa_args *a,
                          int64_t head, int64_t first, int64_t end)
{
    const int64_t group = a->q_heads_per_kv ? a->q_heads_per_kv : 1; /* without query heads there is dbias to write */
    panel_init(panel, seq, a, head / group, head % group * seq->q_len + first,
               end - first < PANEL ? end - first : PANEL);
}

/* Panel number n of a KV head. */
static void panel_of_kv_head(struct panel *panel, const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                             int64_t kv_head, int64_t n)
{
    const struct mfa_args *a = &call->args;
    if (mfa_cpu_stretch(call)) {
        const int64_t of_head = mfa_cpu_units_of_head(call, seq->q_len, PANEL);
        const struct mfa_cpu_queries q = mfa_cpu_unit_of_head(call, seq->q_len, PANEL, n % of_head);
        panel_of_head(panel, seq, a, kv_head * a->q_heads_per_kv + n / of_head, q.first, q.end);
        return;
    }
    const int64_t rest = a->q_heads_per_kv * seq->q_len - n * PANEL;
    panel_init(panel, seq, a, kv_head, n * PANEL, rest < PANEL ? rest : PANEL);
}

/* Where the row of a lane begins in a tensor of queries. */
static inline const char *panel_row(const struct panel *panel, const void *data, int64_t bytes,
                                    const struct mfa_strides *s, int64_t lane)
{
    return q_row_of(panel->seq, data, bytes, s, panel->head[lane], panel->row[lane]);
}

/* rows[lane] = the panel's rows of a tensor of queries as row-major packs, row_packs(columns) apart, for the first
 * `count` lanes; zeros beyond those that it has. */
static void panel_load(const struct panel *panel, int64_t count, const void *data, int dtype,
                       const struct mfa_strides *s, int64_t columns, packed *rows)
{
    const int64_t stride = row_packs(columns), lanes = count < panel->lanes ? count : panel->lanes;
    for (int64_t i = 0; i < lanes; i++)
        load_packs(rows + i * stride, panel_row(panel, data, bytes_of(dtype), s, i), dtype, s->column, columns);
    fill(rows + lanes * stride, (count - lanes) * stride, 0);
}
