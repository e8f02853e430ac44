/* Which blocks of keys a block of queries attends to, and which blocks of queries a block of keys: the band bounds the
 * range, and blocks of it that the mask leaves EMPTY are skipped. A kernel whose threadgroups own keys in place of
 * queries defines KEYS_ARE_ROWS. */

/* Blocks [begin, end). */
struct block_range {
    int begin, end;
};

/* Blocks of keys that some query from `first` to `last` attends to, as far as the band says. */
METAL_FUNC block_range kv_blocks_of(constant mfa_metal_call &call, thread const sequence &seq, int first, int last)
{
    int low = 0, high = seq.kv_len - 1;
#if defined(BAND)
    low = max(low, first + int(call.args.lower));
    high = min(high, last + int(call.args.upper));
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
    low = max(low, first - int(call.args.upper));
    high = min(high, last - int(call.args.lower));
#endif
    block_range range;
    range.begin = low / BLOCK_Q;
    range.end = high < low ? range.begin : high / BLOCK_Q + 1;
    return range;
}

/* Whether some query of the block from `i` on attends to some key of the block from `key` on, as far as the band says.
 */
METAL_FUNC bool block_in_band(constant mfa_metal_call &call, int i, int key)
{
#if defined(BAND)
    return key - (BLOCK_Q - 1) <= i + int(call.args.upper) && key + (BLOCK_KV - 1) >= i + int(call.args.lower);
#else
    return true;
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

METAL_FUNC q_block q_block_of(constant mfa_metal_call &call, grid_coord coord, thread const simdgroup_coord &sg)
{
    q_block q;
    int pack = int(call.pack_gqa);
    q.seq = sequence_of(call, coord.batch);
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
#else
/* The keys of a threadgroup: the first, and the lane's own. */
struct kv_block {
    sequence seq;
    int kv_head, first, own;
    bool valid; /* `own` is a key */
};

METAL_FUNC kv_block kv_block_of(constant mfa_metal_call &call, grid_coord coord, thread const simdgroup_coord &sg)
{
    kv_block k;
    k.seq = sequence_of(call, coord.batch);
    k.kv_head = coord.head;
    k.first = coord.row * BLOCK_KV;
    k.own = k.first + sg.row_group * 8 + sg.at.row;
    k.valid = k.own < k.seq.kv_len;
    return k;
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
/* A block of keys: sets the ranges of the lane's rows for it, `bands` being those of all their keys. false: the block
 * is EMPTY, and is skipped by the whole threadgroup. */
METAL_FUNC bool visit_kv_block(thread mask_range *ranges, thread const mask_range *bands, int block,
                               thread const q_block &q, thread const score_operands &in, constant mfa_metal_call &call)
{
#if defined(MASKED)
    constant mfa_strides &s = call.args.mask;
    uchar state = in.block_mask[block_mask_index(call, q.seq.batch, q.kv_head, q.first / BLOCK_Q, block)];
    if (state == MFA_METAL_BLOCK_EMPTY)
        return false;
#endif
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        mask_range_move(ranges[r], bands[r], block * BLOCK_KV);
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
METAL_FUNC bool visit_q_block(thread mask_range &range, thread const mask_range &band, int block, int head,
                              thread const kv_block &k, thread const score_operands &in, constant mfa_metal_call &call)
{
    mask_range_move(range, band, block * BLOCK_Q);
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
