/* What attention_forward and attention_decode share: a threadgroup's rows of queries against a range of keys.
 *
 *     m = ROW_MAX_INIT, l = 0, O = 0
 *     for each block of keys that is not EMPTY:
 *         load K and V tiles
 *         S = scale * Q K^T, softcap, mask, band
 *         where rowmax(S) exceeds m by more than 8: m' = rowmax(S), alpha = exp2(m - m'), m = m'
 *             l = alpha * l, O = alpha * O
 *         P = exp2(S - m)
 *         l = l + rowsum(P), dropout of P
 *         O = O + P V
 *
 * Q, S, P, O, m and l stay in registers. Two barriers a block; one more where columns are split, and one more where
 * K and V share a tile's memory. */

#define KEY_FRAGMENTS (BLOCK_KV / KEY_GROUPS / 8)

struct forward_operands {
    device const storage *Q;
    kv_operands kv;
    score_operands score;
};

struct forward_results {
    device out_storage *O, *O_low;
    device uint *L;
    device const float *sinks;
};

/* Of the lane's rows. All simdgroups that share rows and keys have the same m and l, and each its slice of O. */
struct accumulator {
    softmax_state state[LANE_ROWS];
    float2 O[LANE_ROWS * E_FRAGMENTS];
};

/* Computes m, l and O over the block's range of keys; returns how many blocks of keys were visited. */
METAL_FUNC int attend(thread accumulator &acc, thread const q_block &q, thread const forward_operands &in,
                      constant mfa_metal_call &call, thread const simdgroup_coord &sg,
                      thread const threadgroup_memory &memory)
{
    constexpr int ROWS = LANE_ROWS, S_FRAGMENTS = ROWS * KEY_FRAGMENTS;
    threadgroup tile_element *K_tile = memory.tiles, *V_tile = memory.tiles + SECOND_TILE(BLOCK_KV);
    kv_source<K_TYPE> K = k_source(in.kv, call, q.seq, q.kv_head);
    kv_source<V_TYPE> V = v_source(in.kv, call, q.seq, q.kv_head);
    int first_key = sg.key_group * (BLOCK_KV / KEY_GROUPS), visited = 0;
    storage2 Q[ROWS * D_FRAGMENTS];
    mask_range bands[ROWS];
    map_walk map = map_walk_init();
    dropout dropped = dropout_of(in.score, call, q.seq);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        load_row_paired<D_FRAGMENTS>(Q + r * D_FRAGMENTS, q_source(in.Q, call, q.seq, q.own[r].head), q.own[r].i,
                                     sg.slice * D_SLICE, q.own[r].valid, sg.at);
        mask_range_of_query(bands[r], in.score, call, q.seq, q.own[r]);
        acc.state[r] = softmax_init();
    }
    clear<ROWS * E_FRAGMENTS>(acc.O);

    for (int first = q.kv_blocks.begin; first < q.kv_blocks.end; first += STRETCH_BLOCKS) {
        kv_cursor<K_TYPE> K_at = tile_cursor_of<BLOCK_KV>(K, first * BLOCK_KV);
        kv_cursor<V_TYPE> V_at = tile_cursor_of<BLOCK_KV>(V, first * BLOCK_KV);
        int end = stretch_end(first, q.kv_blocks.end);
        for (int block = first; block < end;
             block++, tile_cursor_advance<BLOCK_KV>(K_at), tile_cursor_advance<BLOCK_KV>(V_at)) {
            mask_range ranges[ROWS];
            if (!visit_kv_block(ranges, bands, map, block, q, in.score, call, sg.lane))
                continue;
            visited++;
            kept_tile<ROWS, KEY_FRAGMENTS> kept;
            keep_keys(kept, dropped, call.args, q.own, block * BLOCK_KV + first_key, sg.at);
            load_tile<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K, K_at, sg.thread_index);
            if (!SHARED_TILE)
                load_tile<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V, V_at, sg.thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            float2 S[S_FRAGMENTS], dtanh[S_FRAGMENTS];
            clear<S_FRAGMENTS>(S);
            gemm_nt<ROWS, KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, Q, K_tile + D_TILE_SLICE(sg, first_key), sg.at);
            if (SPLIT > 1) {
                threadgroup float2 *slot = exchange_slot<S_FRAGMENTS>(memory.exchange, sg);
                store_partial<S_FRAGMENTS, S_FRAGMENTS>(S, slot, sg.slice);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (SHARED_TILE)
                    load_tile<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V, V_at, sg.thread_index);
                reduce_partials<S_FRAGMENTS, S_FRAGMENTS>(S, slot);
            }
            score_tile<ROWS, KEY_FRAGMENTS>(S, dtanh, first_key, BLOCK_KV, ranges, sg.at, call);
            softmax_step<ROWS, KEY_FRAGMENTS, E_FRAGMENTS>(acc.state, acc.O, S);
            drop(S, kept);
            if (SHARED_TILE)
                threadgroup_barrier(mem_flags::mem_threadgroup);
            gemm_nn<ROWS, KEY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(acc.O, S, V_tile + E_TILE_SLICE(sg, first_key), sg.at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        acc.state[r].l = row_sum(acc.state[r].l);
    return visited;
}

/* Stores a partial result: m, l and then O, undivided, of each row and one split of its keys. attention_merge merges
 * them. */
METAL_FUNC void store_split(thread const accumulator &acc, thread const q_block &q, int split,
                            constant mfa_metal_call &call, thread const simdgroup_coord &sg, device float *partials)
{
    constant mfa_args &args = call.args;
    long first = packed_row_index(call, q.seq, q.kv_head, 0);
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        device float *to = partials + ((first + q.row[r]) * call.splits + split) * (args.value_dim + 2);
        if (q.own[r].valid && sg.slice == 0 && sg.at.column == 0) {
            to[0] = acc.state[r].m;
            to[1] = acc.state[r].l;
        }
        UNROLL
        for (int d = 0; d < E_FRAGMENTS; d++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                int column = E_COLUMN(sg) + d * 8 + e;
                if (q.own[r].valid && column < args.value_dim)
                    to[2 + column] = acc.O[r * E_FRAGMENTS + d][e];
            }
        }
    }
}

/* The epilogue: O = O / l, L = ln(2) * (m + log2(l)); 0 and -inf for a row without keys; with sinks, 0 and the sink.
 * O_low gets what rounding takes off O. */
METAL_FUNC void store_rows(thread const accumulator &acc, thread const q_block &q, constant mfa_metal_call &call,
                           thread const simdgroup_coord &sg, thread const forward_results &out)
{
    constant mfa_args &args = call.args;
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        if (!q.own[r].valid)
            continue;
        thread const float2 *O = acc.O + r * E_FRAGMENTS;
        softmax_state end = acc.state[r];
        float inverse = softmax_end(end, out.sinks, args, q.seq, q.own[r].head);
        long row = q_offset(q.seq, args.o, q.own[r].head, q.own[r].i);
        store_row<E_FRAGMENTS>(out.O + row, args.o.column, E_COLUMN(sg), int(args.value_dim), O, inverse);
        if (call.present >> MFA_METAL_BUFFER_O_LOW & 1)
            store_row<E_FRAGMENTS, true>(out.O_low + row, args.o.column, E_COLUMN(sg), int(args.value_dim), O, inverse);
        if ((call.present >> MFA_METAL_BUFFER_LSE & 1) && sg.slice == 0 && sg.at.column == 0)
            out.L[q_offset(q.seq, args.lse, q.own[r].head, q.own[r].i)] = log_sum_exp(end.m, end.l);
    }
}
