/* A panel: up to PANEL queries of one KV head, one a lane. Which keys the band shows them.
 *
 * Scores are kept transposed, S[key][lane], so that everything of the softmax is lane by lane, and in
 * base 2, times log2(e): P = exp2(S - L). A hidden score is -inf. */

/* How products divide a panel: its width, and the unit of its vectors that hold queries, in vectors; the unit of the
 * keys that it visits. A dialect may say otherwise. */
#ifndef PANEL_VECTORS
#define PANEL_VECTORS 3
#define QUERY_VECTORS 1
#define KEY_UNIT 8 /* whole tiles */
#endif

#define PANEL (PANEL_VECTORS * LANES)

/* Keys in whole units and vectors. */
static inline int64_t whole_keys(int64_t keys)
{
    return padded(mfa_cpu_ceil(keys, KEY_UNIT) * KEY_UNIT);
}

/* Queries in whole units. */
static inline int64_t round_up_queries(int64_t queries)
{
    return mfa_cpu_ceil(queries, QUERY_VECTORS * LANES) * QUERY_VECTORS * LANES;
}

struct panel {
    int64_t lanes;                /* queries in it; the lanes beyond repeat the last */
    int vectors;                  /* that hold them, in whole units */
    int64_t head[PANEL], row[PANEL]; /* query head and query of each lane */
    int64_t low[PANEL], high[PANEL]; /* first and last key that the band shows a lane; none if low > high */
    int64_t any_low, any_high;    /* keys outside are hidden from all lanes */
    int64_t all_low, all_high;    /* keys inside are shown to all lanes */
    int64_t vector_low[PANEL_VECTORS];  /* keys before it are hidden from this vector and all after it */
    int64_t vector_high[PANEL_VECTORS]; /* keys after it are hidden from this vector and all before it */
};

/* The panel of `lanes` folded rows from `first` on: row r of a KV head is query r % q_len of the head
 * r / q_len of its group. So short queries of a whole group share one panel. */
static void panel_init(struct panel *panel, const struct mfa_args *a, int64_t kv_head, int64_t first, int64_t lanes)
{
    panel->lanes = lanes;
    panel->vectors = (int)(round_up_queries(lanes) / LANES);
    panel->any_low = a->kv_len, panel->any_high = -1;
    panel->all_low = 0, panel->all_high = a->kv_len - 1;
    for (int v = 0; v < PANEL_VECTORS; v++)
        panel->vector_low[v] = a->kv_len, panel->vector_high[v] = -1;
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
            int64_t *vector_low = &panel->vector_low[i / LANES];
            *vector_low = low < *vector_low ? low : *vector_low;
        }
        panel->vector_high[i / LANES] = panel->any_high;
        panel->all_low = low > panel->all_low ? low : panel->all_low;
        panel->all_high = high < panel->all_high ? high : panel->all_high;
        if (i + 1 < lanes && ++row == a->q_len)
            row = 0, head++;
    }
    for (int v = PANEL_VECTORS - 1; v > 0; v--)
        if (panel->vector_low[v] < panel->vector_low[v - 1])
            panel->vector_low[v - 1] = panel->vector_low[v];
}

/* The panel of one query head's queries from `first` on. */
static void panel_of_head(struct panel *panel, const struct mfa_args *a, int64_t head, int64_t first)
{
    int64_t left = a->q_len - first;
    panel_init(panel, a, head / a->group, head % a->group * a->q_len + first, left < PANEL ? left : PANEL);
}

/* rows[lane] = the panel's rows of a tensor of queries, terms across, `stride` apart; zeros beyond its lanes. */
static void panel_load(const struct panel *panel, packed *rows, int64_t stride, const void *data, int dtype,
                       const struct mfa_strides *s, int64_t batch, int64_t columns)
{
    for (int64_t i = 0; i < panel->vectors * LANES; i++)
        if (i < panel->lanes)
            load_packs(rows + i * stride, row_at(data, bytes_of(dtype), s, batch, panel->head[i], panel->row[i]), dtype,
                       s->column, columns);
        else
            fill(rows + i * stride, row_packs(columns), 0);
}

/* Keys [from, to) of a block, counted from its first. */
struct range {
    int64_t from, to;
};

/* Which of the n keys from `key` on the band shows to some lane, rounded outward to multiples of `unit`. */
static struct range band_range(const struct panel *panel, int64_t key, int64_t n, int64_t unit)
{
    int64_t from = panel->any_low - key, to = panel->any_high + 1 - key;
    from = from < 0 ? 0 : from / unit * unit;
    to = mfa_cpu_ceil(to < 0 ? 0 : to, unit) * unit;
    return (struct range){from, to < n ? to : n};
}

/* The keys among r of which vector v sees any, or one that shares a unit with it; in whole units. Products and softmax
 * leave out the others. */
static struct range vector_band_range(const struct panel *panel, int v, int64_t key, struct range r)
{
    int first = v / QUERY_VECTORS * QUERY_VECTORS;
    int64_t from = panel->vector_low[first] - key, to = panel->vector_high[first + QUERY_VECTORS - 1] + 1 - key;
    from = from / KEY_UNIT * KEY_UNIT;
    to = mfa_cpu_ceil(to < 0 ? 0 : to, KEY_UNIT) * KEY_UNIT;
    r.from = from < r.from ? r.from : from < r.to ? from : r.to;
    r.to = to < r.from ? r.from : to < r.to ? to : r.to;
    return r;
}

/* Keys that the same vectors see: `vectors` of them, from `vector` on. */
struct part {
    struct range keys;
    int vector, vectors;
};

/* The part with which range r begins. */
static struct part band_part(const struct panel *panel, int64_t key, struct range r)
{
    struct part part = {r, 0, 0};
    for (int v = 0; v < panel->vectors; v += QUERY_VECTORS) {
        struct range seen = vector_band_range(panel, v, key, r);
        if (seen.to == r.from)
            part.vector = v + QUERY_VECTORS;
        else if (seen.from == r.from)
            part.vectors = v + QUERY_VECTORS - part.vector;
        int64_t change = seen.from > r.from ? seen.from : seen.to;
        if (change > r.from && change < part.keys.to)
            part.keys.to = change;
    }
    return part;
}

/* The keys among r that the band shows to all lanes, in whole units. */
static struct range full_range(const struct panel *panel, int64_t key, struct range r, int64_t unit)
{
    int64_t from = panel->all_low - key, to = panel->all_high + 1 - key;
    from = from < r.from ? r.from : mfa_cpu_ceil(from, unit) * unit;
    to = to < r.to ? to / unit * unit : r.to;
    return from < to ? (struct range){from, to} : (struct range){r.to, r.to};
}
