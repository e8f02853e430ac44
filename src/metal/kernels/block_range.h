/* Which blocks of keys a block of queries attends to, and which blocks of queries a block of keys: the band bounds the
 * range, and blocks of it that the mask leaves EMPTY, or the block map hides, are skipped. A kernel whose threadgroups
 * own keys in place of queries defines KEYS_ARE_ROWS. */

/* Blocks [begin, end). */
struct block_range {
    int begin, end;
};

/* Blocks of keys that some query from `first` to `last` attends to, as far as the band says. */
METAL_FUNC block_range kv_blocks_of(constant mfa_metal_call &call, thread const sequence &seq, int first, int last)
{
    int low = 0, high = seq.kv_len - 1;
#if defined(BAND)
    low = max(low, first + band_lower(call, seq));
    high = min(high, last + band_upper(call, seq));
#endif
    block_range range;
    range.begin = low / BLOCK_KV;
    range.end = high < low ? range.begin : high / BLOCK_KV + 1;
    return range;
}

/* Blocks of queries that attend to some key from `first` to `last`, as far as the band says. */
METAL_FUNC block_range q_blocks_of(constant mfa_metal_call &call, thread const sequence &seq, int first, int last)
{
    int low = 0, high = seq.q_len - 1;
#if defined(BAND)
    low = max(low, first - band_upper(call, seq));
    high = min(high, last - band_lower(call, seq));
#endif
    block_range range;
    range.begin = low / BLOCK_Q;
    range.end = high < low ? range.begin : high / BLOCK_Q + 1;
    return range;
}

#if defined(BLOCK_MAP)
/* Whether the block map shows some of keys [key, last_key] to some of queries [i, last_i] of a head. */
METAL_FUNC bool map_shows(thread const score_operands &in, constant mfa_metal_call &call, thread const sequence &seq,
                          int head, int i, int last_i, int key, int last_key)
{
    uint rows = uint(call.args.block_map_q), columns = uint(call.args.block_map_kv);
    for (uint row = uint(i) / rows; row <= uint(last_i) / rows; row++)
        for (uint column = uint(key) / columns; column <= uint(last_key) / columns; column++)
            if (in.block_map[mask_offset(seq, call.args.block_map, head, int(row), int(column))] != 0)
                return true;
    return false;
}
#endif

/* Whether some query of a head in the block from `i` on attends to some key of the block from `key` on, as far as the
 * band and the block map say. */
METAL_FUNC bool block_is_visible(thread const score_operands &in, constant mfa_metal_call &call,
                                 thread const sequence &seq, int head, int i, int key)
{
#if defined(VARLEN)
    if (i >= seq.q_len || key >= seq.kv_len)
        return false;
#endif
#if defined(BAND)
    if (key - (BLOCK_Q - 1) > i + band_upper(call, seq) || key + (BLOCK_KV - 1) < i + band_lower(call, seq))
        return false;
#endif
#if defined(BLOCK_MAP)
    return map_shows(in, call, seq, head, i, min(i + BLOCK_Q, seq.q_len) - 1, key, min(key + BLOCK_KV, seq.kv_len) - 1);
#else
    return true;
#endif
}

/* What a walk knows of the block map: which of 32 blocks it shows. They are looked up together, a block by each lane,
 * for one load would be waited for about as long as a block takes. */
struct map_walk {
#if defined(BLOCK_MAP)
    uint shown; /* bit n: block end - 32 + n */
    int end;
#endif
};

METAL_FUNC map_walk map_walk_init()
{
#if defined(BLOCK_MAP)
    return map_walk{0, 0};
#else
    return map_walk{};
#endif
}

#if !defined(KEYS_ARE_ROWS)
/* The rows of a lane, and the number of row r among those of the threadgroup: one of each 8 of the simdgroup's, or, in
 * the vector kernel, all. */
#if defined(COLUMN_LANES)
#define LANE_ROWS BLOCK_Q
#define LANE_ROW(sg, r) (r)
#else
#define LANE_ROWS (BLOCK_Q / ROW_GROUPS / 8)
#define LANE_ROW(sg, r) (((sg).row_group * LANE_ROWS + (r)) * 8 + (sg).at.row)
#endif

/* The rows of queries of a threadgroup: where they begin among those of the KV head, the lane's own, and the blocks of
 * keys they are summed over. */
struct q_block {
    sequence seq;
    int kv_head, first;
    query own[LANE_ROWS];
    int row[LANE_ROWS]; /* of `own` */
    block_range kv_blocks;
};

METAL_FUNC q_block q_block_of(constant mfa_metal_call &call, thread const index_operands &in, grid_coord coord,
                              thread const simdgroup_coord &sg)
{
    q_block q;
    int pack = int(call.pack_gqa);
    q.seq = sequence_of(call, in, coord.batch);
    q.kv_head = coord.head;
    q.first = (int(call.grid.row) - 1 - coord.row) * BLOCK_Q; /* last first: with a causal band it has the most to do */
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        q.row[r] = q.first + LANE_ROW(sg, r);
        q.own[r] = query_of(call, q.seq, q.kv_head, q.row[r]);
    }
    int last = min(q.first + BLOCK_Q, q.seq.q_len * pack) - 1;
    block_range all = kv_blocks_of(call, q.seq, q.first / pack, last / pack);
    part_range part = part_range_of(uint(all.end - all.begin), uint(coord.column), uint(call.splits));
    q.kv_blocks = block_range{all.begin + int(part.begin), all.begin + int(part.end)};
    return q;
}

/* Whether the threadgroup has no rows: its batch entry may be shorter than the grid. */
METAL_FUNC bool is_past_end(constant mfa_metal_call &call, thread const q_block &q)
{
#if defined(VARLEN)
    return q.first >= q.seq.q_len * int(call.pack_gqa);
#else
    (void)call, (void)q;
    return false;
#endif
}
#else
/* The keys of a threadgroup: the first, and the lane's own. */
struct kv_block {
    sequence seq;
    int kv_head, first, own;
    bool valid; /* `own` is a key */
};

METAL_FUNC kv_block kv_block_of(constant mfa_metal_call &call, thread const index_operands &in, grid_coord coord,
                                thread const simdgroup_coord &sg)
{
    kv_block k;
    k.seq = sequence_of(call, in, coord.batch);
    k.kv_head = coord.head;
    k.first = coord.row * BLOCK_KV;
    k.own = k.first + sg.row_group * 8 + sg.at.row;
    k.valid = k.own < k.seq.kv_len;
    return k;
}

/* Whether the threadgroup has no keys. */
METAL_FUNC bool is_past_end(thread const kv_block &k)
{
#if defined(VARLEN)
    return k.first >= k.seq.kv_len;
#else
    (void)k;
    return false;
#endif
}
#endif

/* The index in the block mask of a block of queries (row) and of keys (column); `head` counts groups of pack_gqa
 * heads. */
METAL_FUNC long block_mask_index(constant mfa_metal_call &call, int batch, int head, int row, int column)
{
    constant mfa_strides &s = call.block_mask;
    return batch * s.batch + head * s.head + row * s.row + column * s.column;
}

/* Where the stretch of blocks that begins at `first` ends. */
METAL_FUNC int stretch_end(int first, int end)
{
    return min(first + STRETCH_BLOCKS, end);
}

#if !defined(KEYS_ARE_ROWS)
#if defined(BLOCK_MAP)
/* Whether the map shows some key of a block to some row of the threadgroup. */
METAL_FUNC bool map_shows_kv_block(thread const score_operands &in, constant mfa_metal_call &call,
                                   thread const q_block &q, int block)
{
    int pack = int(call.pack_gqa), last = min(q.first + BLOCK_Q, q.seq.q_len * pack) - 1;
    int key = block * BLOCK_KV, last_key = min(key + BLOCK_KV, q.seq.kv_len) - 1, head = q.kv_head * pack;
    if (key > last_key)
        return false;
    if (pack == 1 || call.args.block_map.head == 0)
        return map_shows(in, call, q.seq, head, q.first / pack, last / pack, key, last_key);
    for (int h = 0; h < pack && h <= last; h++) { /* rows h, h + pack ... */
        int i = (q.first - h + pack - 1) / pack, last_i = (last - h) / pack;
        if (i <= last_i && map_shows(in, call, q.seq, head + h, i, last_i, key, last_key))
            return true;
    }
    return false;
}
#endif

/* A block of keys: sets the ranges of the lane's rows for it, `bands` being those of all their keys. false: the block
 * is EMPTY or hidden, and is skipped by the whole threadgroup. */
METAL_FUNC bool visit_kv_block(thread mask_range *ranges, thread const mask_range *bands, thread map_walk &map,
                               int block, thread const q_block &q, thread const score_operands &in,
                               constant mfa_metal_call &call, int lane)
{
#if defined(BLOCK_MAP)
    if (block >= map.end)
        map = map_walk{simd_or(map_shows_kv_block(in, call, q, block + lane) ? 1u << lane : 0u), block + 32};
    if ((map.shown >> (block - (map.end - 32)) & 1u) == 0)
        return false;
#endif
#if defined(MASKED)
    constant mfa_strides &s = call.args.mask;
    uchar state = in.block_mask[block_mask_index(call, q.seq.batch, q.kv_head, q.first / BLOCK_Q, block)];
    if (state == MFA_METAL_BLOCK_EMPTY)
        return false;
#endif
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        mask_range_move(ranges[r], bands[r], block * BLOCK_KV);
#if defined(BLOCK_MAP)
        mask_range_add_map<BLOCK_KV>(ranges[r], bands[r].map, call.args.block_map_kv, call.args.block_map.column,
                                     block * BLOCK_KV, q.seq.kv_len - 1);
#endif
#if defined(ALIBI)
        mask_range_add_alibi(ranges[r], in, call, q.seq, q.own[r].head, q.own[r].i, block * BLOCK_KV, -1.0f);
#endif
#if defined(MASKED)
        long mask = mask_offset(q.seq, s, q.own[r].head, q.own[r].i, block * BLOCK_KV);
        mask_range_add_mask(ranges[r], in.mask + mask, s.column, state);
#endif
    }
    return true;
}
#else
/* A block of queries of a head: the same for the lane's key. */
METAL_FUNC bool visit_q_block(thread mask_range &range, thread const mask_range &band, thread map_walk &map, int block,
                              int head, thread const kv_block &k, thread const score_operands &in,
                              constant mfa_metal_call &call, int lane)
{
#if defined(BLOCK_MAP)
    if (block >= map.end) {
        int i = (block + lane) * BLOCK_Q, last_i = min(i + BLOCK_Q, k.seq.q_len) - 1;
        bool shows = i <= last_i &&
                     map_shows(in, call, k.seq, head, i, last_i, k.first, min(k.first + BLOCK_KV, k.seq.kv_len) - 1);
        map = map_walk{simd_or(shows ? 1u << lane : 0u), block + 32};
    }
    if ((map.shown >> (block - (map.end - 32)) & 1u) == 0)
        return false;
#endif
    mask_range_move(range, band, block * BLOCK_Q);
#if defined(BLOCK_MAP)
    mask_range_add_map<BLOCK_Q>(range, band.map, call.args.block_map_q, call.args.block_map.row, block * BLOCK_Q,
                                k.seq.q_len - 1);
#endif
#if defined(ALIBI)
    mask_range_add_alibi(range, in, call, k.seq, head, block * BLOCK_Q, k.own, 1.0f);
#endif
#if defined(MASKED)
    constant mfa_strides &s = call.args.mask;
    uchar state = in.block_mask[block_mask_index(call, k.seq.batch, head, block, k.first / BLOCK_KV)];
    long mask = mask_offset(k.seq, s, head, block * BLOCK_Q, k.own);
    mask_range_add_mask(range, in.mask + mask, s.row, state);
    return state != MFA_METAL_BLOCK_EMPTY;
#else
    return true;
#endif
}
#endif
