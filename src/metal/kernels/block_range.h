/* Which blocks of keys a block of queries attends to, and which blocks of queries a block of keys: the band bounds the
 * range, and blocks of it that the mask leaves EMPTY are skipped. */

/* Blocks [begin, end). */
struct block_range {
    long begin, end;
};

/* Blocks of keys that some query from `first` to `last` attends to, as far as the band says. */
METAL_FUNC block_range kv_blocks_of(constant mfa_metal_call &call, thread const sequence &seq, long first, long last)
{
    long low = 0, high = seq.kv_len - 1;
#if defined(BAND)
    low = max(low, first + call.args.lower);
    high = min(high, last + call.args.upper);
#endif
    block_range range;
    range.begin = low / BLOCK_KV;
    range.end = high < low ? range.begin : high / BLOCK_KV + 1;
    return range;
}

/* Blocks of queries that attend to some key from `first` to `last`, as far as the band says. */
METAL_FUNC block_range q_blocks_of(constant mfa_metal_call &call, thread const sequence &seq, long first, long last)
{
    long low = 0, high = seq.q_len - 1;
#if defined(BAND)
    low = max(low, first - call.args.upper);
    high = min(high, last - call.args.lower);
#endif
    block_range range;
    range.begin = low / BLOCK_Q;
    range.end = high < low ? range.begin : high / BLOCK_Q + 1;
    return range;
}

/* Whether some query of the block from `i` on attends to some key of the block from `key` on, as far as the band says.
 */
METAL_FUNC bool block_in_band(constant mfa_metal_call &call, long i, long key)
{
#if defined(BAND)
    return key <= i + BLOCK_Q - 1 + call.args.upper && key + BLOCK_KV - 1 >= i + call.args.lower;
#else
    return true;
#endif
}

/* The rows of queries of a threadgroup: where they begin among those of the KV head, the lane's own, and the blocks of
 * keys they are summed over. */
struct q_block {
    sequence seq;
    long kv_head, first;
    query own;
    long row; /* of `own` */
    block_range kv_blocks;
};

METAL_FUNC q_block q_block_of(constant mfa_metal_call &call, mfa_metal_grid coord, thread const simdgroup_coord &sg)
{
    q_block q;
    q.seq = sequence_of(call, coord.batch);
    q.kv_head = coord.head;
    q.first = (call.grid.row - 1 - coord.row) * BLOCK_Q; /* last first: with a causal band it has the most to do */
    q.row = q.first + sg.row_group * 8 + sg.at.row;
    q.own = query_of(call, q.seq, q.kv_head, q.row);
    long last = min(q.first + BLOCK_Q, q.seq.q_len * call.pack_gqa) - 1;
    block_range all = kv_blocks_of(call, q.seq, q.first / call.pack_gqa, last / call.pack_gqa);
    q.kv_blocks.begin = all.begin + (all.end - all.begin) * coord.column / call.splits;
    q.kv_blocks.end = all.begin + (all.end - all.begin) * (coord.column + 1) / call.splits;
    return q;
}

/* The keys of a threadgroup: the first, and the lane's own. */
struct kv_block {
    sequence seq;
    long kv_head, first, own;
    bool valid; /* `own` is a key */
};

METAL_FUNC kv_block kv_block_of(constant mfa_metal_call &call, mfa_metal_grid coord, thread const simdgroup_coord &sg)
{
    kv_block k;
    k.seq = sequence_of(call, coord.batch);
    k.kv_head = coord.head;
    k.first = coord.row * BLOCK_KV;
    k.own = k.first + sg.row_group * 8 + sg.at.row;
    k.valid = k.own < k.seq.kv_len;
    return k;
}

/* The index in the block mask of a block of queries (row) and of keys (column); `head` counts groups of pack_gqa
 * heads. */
METAL_FUNC long block_mask_index(constant mfa_metal_call &call, long batch, long head, long row, long column)
{
    constant mfa_strides &s = call.block_mask;
    return batch * s.batch + head * s.head + row * s.row + column * s.column;
}

/* The blocks [begin, end) are walked in stretches: how many blocks the one that begins at `block` has. */
METAL_FUNC int stretch_blocks(long block, long end)
{
    return int(min(end - block, long(STRETCH_BLOCKS)));
}

/* Block n of the stretch of keys that begins with block `first`: sets the lane's range for it, `band` being that of the
 * stretch. false: the block is EMPTY, and is skipped by the whole threadgroup. */
METAL_FUNC bool visit_kv_block(thread mask_range &range, thread const mask_range &band, long first, int n,
                               thread const q_block &q, thread const score_operands &in, constant mfa_metal_call &call)
{
    mask_range_move(range, band, n * BLOCK_KV);
#if defined(ALIBI)
    mask_range_add_alibi(range, in, call, q.seq, q.own.head, q.own.i, (first + n) * BLOCK_KV, -1.0f);
#endif
#if defined(MASKED)
    constant mfa_strides &s = call.args.mask;
    uchar state = in.block_mask[block_mask_index(call, q.seq.batch, q.kv_head, q.first / BLOCK_Q, first + n)];
    long mask = mask_offset(q.seq, s, q.own.head, q.own.i, (first + n) * BLOCK_KV);
    mask_range_add_mask(range, in.mask + mask, s.column, state);
    return state != MFA_METAL_BLOCK_EMPTY;
#else
    return true;
#endif
}

/* The same for a block of queries of a head. */
METAL_FUNC bool visit_q_block(thread mask_range &range, thread const mask_range &band, long first, int n, long head,
                              thread const kv_block &k, thread const score_operands &in, constant mfa_metal_call &call)
{
    mask_range_move(range, band, n * BLOCK_Q);
#if defined(ALIBI)
    mask_range_add_alibi(range, in, call, k.seq, head, (first + n) * BLOCK_Q, k.own, 1.0f);
#endif
#if defined(MASKED)
    constant mfa_strides &s = call.args.mask;
    uchar state = in.block_mask[block_mask_index(call, k.seq.batch, head, first + n, k.first / BLOCK_KV)];
    long mask = mask_offset(k.seq, s, head, (first + n) * BLOCK_Q, k.own);
    mask_range_add_mask(range, in.mask + mask, s.row, state);
    return state != MFA_METAL_BLOCK_EMPTY;
#else
    return true;
#endif
}
