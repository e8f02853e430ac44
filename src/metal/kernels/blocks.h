/* Who does what: which part of a pass a threadgroup owns, and which part of a tile a simdgroup.
 *
 * The host defines the sizes of a tile and how simdgroups share it:
 *     BLOCK_Q, BLOCK_KV    rows of queries and of keys
 *     HEAD_DIM, VALUE_DIM  columns, padded to whole fragments for each of SPLIT
 *     ROW_GROUPS           simdgroups along the rows that the threadgroup owns: 8 rows each
 *     SPLIT                simdgroups that share these 8 rows; each takes a slice of the columns, so that its
 *                          registers hold it. Their parts of S are added up through threadgroup memory
 *     KEY_GROUPS           simdgroups with the same rows and columns, and different keys of each tile (decode)
 *     SHARED_TILE          the two staged operands take turns in one tile's memory
 *     THREADS              32 for each of these simdgroups */

#define D_SLICE (HEAD_DIM / SPLIT)
#define E_SLICE (VALUE_DIM / SPLIT)
#define D_FRAGMENTS (D_SLICE / 8)
#define E_FRAGMENTS (E_SLICE / 8)
#define D_STRIDE PADDED(HEAD_DIM)
#define E_STRIDE PADDED(VALUE_DIM)
#if defined(SHARED_TILE)
#define SECOND_TILE(elements) 0
#else
#define SECOND_TILE(elements) (elements)
#endif

/* A simdgroup's part of the work, and the lane's place in it. */
struct seat {
    place at;
    int row_group, slice, key_group;
    int lane;
};

METAL_FUNC seat seat_of(uint simdgroup, uint lane)
{
    return seat{place_of(lane), int(simdgroup / SPLIT % ROW_GROUPS), int(simdgroup % SPLIT),
                int(simdgroup / (SPLIT * ROW_GROUPS)), int(lane)};
}

/* Coordinates of a threadgroup in the grid of its pass. */
METAL_FUNC mfa_metal_grid part_of(constant mfa_metal_call &call, uint group)
{
    long index = call.first + group;
    mfa_metal_grid part;
    part.column = index % call.grid.column;
    index /= call.grid.column;
    part.row = index % call.grid.row;
    index /= call.grid.row;
    part.head = index % call.grid.head;
    part.batch = index / call.grid.head;
    return part;
}

METAL_FUNC long offset_of(constant mfa_strides &s, long batch, long head, long row)
{
    return batch * s.batch + head * s.head + row * s.row;
}

/* A query: row r of a KV head is query r / fold of the head r % fold of its group, so that few queries of many heads
 * fill a block together, and a block's queries are neighbours. */
struct query {
    long head, i;
    bool there;
};

METAL_FUNC query query_of(constant mfa_metal_call &call, long kv_head, long row)
{
    query q;
    q.there = row < call.args.q_len * call.fold;
    q.i = q.there ? row / call.fold : 0;
    q.head = kv_head * call.fold + (q.there ? row % call.fold : 0);
    return q;
}

/* Tiles [begin, end). */
struct tiles {
    long begin, end;
};

/* Those of keys that some query from `first` to `last` sees, as far as the band says. */
METAL_FUNC tiles tiles_of_keys(constant mfa_metal_call &call, long first, long last)
{
    long low = 0, high = call.args.kv_len - 1;
#if defined(BAND)
    low = max(low, first + call.args.lower);
    high = min(high, last + call.args.upper);
#endif
    tiles t;
    t.begin = low / BLOCK_KV;
    t.end = high < low ? t.begin : high / BLOCK_KV + 1;
    return t;
}

/* The rows of queries of a threadgroup: where they begin among the KV head's, the lane's own, and the keys they see. */
struct rows {
    long batch, kv_head, first;
    query own;
    long row; /* of `own` */
    tiles keys;
};

METAL_FUNC rows rows_of(constant mfa_metal_call &call, mfa_metal_grid part, thread const seat &own)
{
    rows r;
    r.batch = part.batch;
    r.kv_head = part.head;
    r.first = (call.grid.row - 1 - part.row) * BLOCK_Q; /* last first: with a causal band it has the most to do */
    r.row = r.first + own.row_group * 8 + own.at.row;
    r.own = query_of(call, r.kv_head, r.row);
    long last = min(r.first + BLOCK_Q, call.args.q_len * call.fold) - 1;
    tiles all = tiles_of_keys(call, r.first / call.fold, last / call.fold);
    r.keys.begin = all.begin + (all.end - all.begin) * part.column / call.splits;
    r.keys.end = all.begin + (all.end - all.begin) * (part.column + 1) / call.splits;
    return r;
}

/* Tiles of queries that see some key from `first` to `last`, as far as the band says. */
METAL_FUNC tiles tiles_of_queries(constant mfa_metal_call &call, long first, long last)
{
    long low = 0, high = call.args.q_len - 1;
#if defined(BAND)
    low = max(low, first - call.args.upper);
    high = min(high, last - call.args.lower);
#endif
    tiles t;
    t.begin = low / BLOCK_Q;
    t.end = high < low ? t.begin : high / BLOCK_Q + 1;
    return t;
}

/* What a query sees of the keys from `key` on. */
METAL_FUNC void sight_of_query(thread sight &s, constant mfa_metal_call &call, thread const query &q, long key)
{
    long low = 0, high = q.there ? call.args.kv_len - 1 : -1;
#if defined(BAND)
    low = q.i + call.args.lower;
    high = min(high, q.i + call.args.upper);
#endif
    sight_cut(s, low, high, key, BLOCK_KV);
}

/* What a key sees of the queries from `i` on. */
METAL_FUNC void sight_of_key(thread sight &s, constant mfa_metal_call &call, long key, long i)
{
    long low = 0, high = key < call.args.kv_len ? call.args.q_len - 1 : -1;
#if defined(BAND)
    low = key - call.args.upper;
    high = min(high, key - call.args.lower);
#endif
    sight_cut(s, low, high, i, BLOCK_Q);
}

/* S of a slice becomes S: each simdgroup hands in its own, and after a barrier adds up those of all that share its
 * rows, in the same order as they do. ROOM fragments of a simdgroup lie one after another, and then those of the next
 * slice; the lane's place in those of slice 0 is its shelf. */
template <int ROOM> METAL_FUNC threadgroup float2 *shelf_of(threadgroup float2 *exchange, thread const seat &own)
{
    return exchange + (own.key_group * ROW_GROUPS + own.row_group) * SPLIT * ROOM * 32 + own.lane;
}

template <int FRAGMENTS, int ROOM> METAL_FUNC void hand_in(thread const float2 *S, threadgroup float2 *shelf, int slice)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        shelf[(slice * ROOM + n) * 32] = S[n];
}

template <int FRAGMENTS, int ROOM> METAL_FUNC void add_up(thread float2 *S, threadgroup const float2 *shelf)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        S[n] = shelf[n * 32];
        for (int slice = 1; slice < SPLIT; slice++)
            S[n] += shelf[(slice * ROOM + n) * 32];
    }
}
