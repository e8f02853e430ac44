/* Which keys a panel sees and which queries a block of keys sees, as far as the band and the block map say it. */

/* How a panel sees a block of keys, or a part of one. */
enum block_mask {
    BLOCK_EMPTY,        /* no lane sees any key: it is not visited */
    BLOCK_FULL,         /* every lane sees every key, and nothing is added to the scores */
    BLOCK_PARTIAL_BAND, /* the band cuts it */
    BLOCK_PARTIAL_BIAS  /* a tile of biases must be added (score.h); the band may cut it, too */
};

/* Keys [from, to) of a block, counted from its first; or other things that are counted. */
struct range {
    int64_t from, to;
};

/* The first and the last of something, both included; none if first > last. */
struct bounds {
    int64_t first, last;
};

static enum block_mask band_block_mask(const struct panel *panel, int64_t key, int64_t n)
{
    if (key > panel->any_high || key + n - 1 < panel->any_low)
        return BLOCK_EMPTY;
    return key >= panel->all_low && key + n - 1 <= panel->all_high ? BLOCK_FULL : BLOCK_PARTIAL_BAND;
}

/* Which of the n keys from `key` on some lane sees, rounded outward to multiples of `unit`. */
static struct range band_range(const struct panel *panel, int64_t key, int64_t n, int64_t unit)
{
    int64_t from = panel->any_low - key, to = panel->any_high + 1 - key;
    from = from < 0 ? 0 : from / unit * unit;
    to = mfa_cpu_ceil(to < 0 ? 0 : to, unit) * unit;
    return (struct range){from, to < n ? to : n};
}

/* The keys among r of which vector v sees any, or one that shares a unit with it; in whole units. Products and softmax
 * skip the others. */
static struct range vector_band_range(const struct panel *panel, int v, int64_t key, struct range r)
{
    const int first = v / QUERY_VECTORS * QUERY_VECTORS;
    int64_t from = panel->vector_low[first] - key, to = panel->vector_high[first + QUERY_VECTORS - 1] + 1 - key;
    from = from / KEY_UNIT * KEY_UNIT;
    to = mfa_cpu_ceil(to < 0 ? 0 : to, KEY_UNIT) * KEY_UNIT;
    r.from = from < r.from ? r.from : from < r.to ? from : r.to;
    r.to = to < r.from ? r.from : to < r.to ? to : r.to;
    return r;
}

/* Keys that the same vectors see: `vectors` of them, from `vector` on. */
struct band_part {
    struct range keys;
    int vector, vectors;
};

/* The part with which range r begins. */
static struct band_part band_part(const struct panel *panel, int64_t key, struct range r)
{
    struct band_part part = {r, 0, 0};
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

/* The keys among r that all lanes see, in whole units, for panels of full width whose scores need nothing but a bias;
 * none for others. */
static struct range full_range(const struct mfa_cpu_call *call, const struct panel *panel, int64_t key, struct range r)
{
    int64_t from = panel->all_low - key, to = panel->all_high + 1 - key;
    from = from < r.from ? r.from : mfa_cpu_ceil(from, KEY_UNIT) * KEY_UNIT;
    to = to < r.to ? to / KEY_UNIT * KEY_UNIT : r.to;
    if (from >= to || panel->vectors != PANEL_VECTORS || call->softcap > 0)
        return (struct range){r.to, r.to};
    return (struct range){from, to};
}

/* A split's share [from, to) of the blocks of `size` keys that hold some of `keys`. */
static struct range split_blocks(int64_t split, int64_t splits, struct bounds keys, int64_t size)
{
    const int64_t first = keys.first / size, blocks = keys.last < keys.first ? 0 : keys.last / size - first + 1;
    return (struct range){first + blocks * split / splits, first + blocks * (split + 1) / splits};
}

/* The keys of block j among `seen`, in whole units: a chunk of queries loads no others. */
static struct range block_keys(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t j,
                               struct bounds seen)
{
    struct range keys = {j * call->block_kv, (j + 1) * call->block_kv};
    int64_t end = mfa_cpu_ceil(seen.last + 1, KEY_UNIT) * KEY_UNIT;
    if (end > seq->kv_len)
        end = seq->kv_len;
    keys.from = seen.first > keys.from ? seen.first / KEY_UNIT * KEY_UNIT : keys.from;
    keys.to = end < keys.to ? end : keys.to;
    return keys;
}

/* --- The block map ----------------------------------------------------------------------------- */

static inline int has_block_map(const struct mfa_cpu_call *call)
{
    return (call->features & CPU_BLOCK_MAP) != 0;
}

/* `count` of the rows of a KV head, in the order of panels, from query `row` of query head `head` on. */
struct queries {
    const struct mfa_cpu_sequence *seq;
    int64_t head, row, count;
};

static inline struct queries panel_queries(const struct panel *panel)
{
    return (struct queries){panel->seq, panel->head[0], panel->row[0], panel->lanes};
}

/* How many of them, from the first on, lie in one row of the map. */
static inline int64_t map_rows(const struct mfa_cpu_call *call, struct queries q)
{
    const int64_t size = call->args.block_map_q, in_block = size - q.row % size, in_head = q.seq->q_len - q.row;
    const int64_t n = in_block < in_head ? in_block : in_head;
    return n < q.count ? n : q.count;
}

/* The queries after the first n, which end where map_rows says. */
static inline struct queries queries_after(struct queries q, int64_t n)
{
    q.row += n, q.count -= n;
    if (q.row == q.seq->q_len)
        q.row = 0, q.head++;
    return q;
}

/* What the map says of a column and the row of the first query. */
static inline int map_shows(const struct mfa_cpu_call *call, struct queries q, int64_t column)
{
    const struct mfa_strides *s = &call->args.block_map;
    return score_row_of(q.seq, call->block_map, 1, s, q.head, q.row / call->args.block_map_q)[column * s->column] != 0;
}

/* Whether the map shows a column to one of the queries. */
static int map_shows_any(const struct mfa_cpu_call *call, struct queries q, int64_t column)
{
    for (int64_t n; q.count > 0; q = queries_after(q, n)) {
        if (map_shows(call, q, column))
            return 1;
        n = map_rows(call, q);
    }
    return 0;
}

/* map_range of a map; r has keys. */
static __attribute__((noinline)) struct range find_map_range(const struct mfa_cpu_call *call, const struct queries *q,
                                                             int64_t key, struct range r, int64_t unit)
{
    const int64_t size = call->args.block_map_kv, last = (key + r.to - 1) / size;
    int64_t column = (key + r.from) / size;
    while (column <= last && !map_shows_any(call, *q, column))
        column++;
    if (column > last)
        return (struct range){r.to, r.to};
    const int64_t from = (column * size - key) / unit * unit;
    while (column <= last && map_shows_any(call, *q, column))
        column++;
    const int64_t to = mfa_cpu_ceil(column * size - key, unit) * unit;
    return (struct range){from < r.from ? r.from : from, to < r.to ? to : r.to};
}

/* The first keys among r, neighbours, that the map shows to one of the queries, rounded outward to multiples of `unit`
 * as r is; all of r without a map; {r.to, r.to}: there are none. Keys count from `key`. */
static inline struct range map_range(const struct mfa_cpu_call *call, struct queries q, int64_t key, struct range r,
                                     int64_t unit)
{
    return has_block_map(call) && r.from < r.to ? find_map_range(call, &q, key, r, unit) : r;
}

/* --- Blocks of keys and panels of a head ------------------------------------------------------- */

/* The blocks of block_kv keys that queries [first, first + rows) see. */
static struct bounds blocks_of_queries(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                                       int64_t first, int64_t rows)
{
    int64_t low = first + seq->lower, high = first + rows - 1 + seq->upper;
    low = low < 0 ? 0 : low;
    high = high < seq->kv_len - 1 ? high : seq->kv_len - 1;
    const int64_t from = low / call->block_kv;
    return (struct bounds){from, high < low ? from - 1 : high / call->block_kv};
}

/* The panels among [from, to) of a query head that may see one of the n keys from `key` on. */
static struct range panels_of_keys(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t key,
                                   int64_t n, struct range panels)
{
    if (mfa_cpu_stretch(call))
        return panels;
    int64_t first = key - seq->upper, last = key + n - 1 - seq->lower; /* queries */
    first = first < 0 ? 0 : first / PANEL;
    last = last < 0 ? -1 : last / PANEL;
    return (struct range){first > panels.from ? first : panels.from, last + 1 < panels.to ? last + 1 : panels.to};
}
