/* What attention_forward and attention_decode share: a threadgroup's rows of queries against a range of keys.
 *
 *     m = ROW_MAX_INIT, l = 0, O = 0
 *     for each block of keys that is not EMPTY:
 *         load K and V tiles
 *         S = scale * Q K^T, softcap, mask, band
 *         m' = max(m, rowmax(S)), alpha = exp2(m - m'), m = m'
 *         P = exp2(S - m)
 *         l = alpha * l + rowsum(P)
 *         O = alpha * O + P V
 *
 * Q, S, P, O, m and l stay in registers. Two barriers a block; one more where columns are split, and one more where
 * K and V share a tile's memory. */

#define KEY_FRAGMENTS (BLOCK_KV / KEY_GROUPS / 8)

struct forward_operands {
    device const storage *Q, *K, *V;
    score_operands score;
};

struct forward_results {
    device storage *O, *O_low;
    device uint *L;
};

/* Of the lane's row. All simdgroups that share rows and keys have the same m and l, and each its slice of O. */
struct accumulator {
    softmax_state state;
    float2 O[E_FRAGMENTS];
};

/* Computes m, l and O over the block's range of keys; returns how many blocks of keys were visited. */
METAL_FUNC int attend(thread accumulator &acc, thread const q_block &q, thread const forward_operands &in,
                      constant mfa_metal_call &call, thread const simdgroup_coord &sg,
                      thread const threadgroup_memory &memory)
{
    threadgroup storage *K_tile = memory.tiles, *V_tile = memory.tiles + SECOND_TILE(BLOCK_KV * D_STRIDE);
    row_source K = k_source(in.K, call, q.seq, q.kv_head), V = v_source(in.V, call, q.seq, q.kv_head);
    int first_key = sg.key_group * (BLOCK_KV / KEY_GROUPS), visited = 0;
    storage2 Q[D_FRAGMENTS];
    load_row<D_FRAGMENTS>(Q, q_source(in.Q, call, q.seq, q.own.head), q.own.i, D_COLUMN(sg), q.own.valid);
    acc.state = softmax_init();
    clear<E_FRAGMENTS>(acc.O);

    for (long first = q.kv_blocks.begin; first < q.kv_blocks.end; first += STRETCH_BLOCKS) {
        int blocks = stretch_blocks(first, q.kv_blocks.end);
        tile_cursor K_at = tile_cursor_of<BLOCK_KV>(K, first * BLOCK_KV),
                    V_at = tile_cursor_of<BLOCK_KV>(V, first * BLOCK_KV);
        mask_range band;
        mask_range_of_query(band, call, q.seq, q.own, first * BLOCK_KV);
        for (int n = 0; n < blocks; n++, tile_cursor_advance<BLOCK_KV>(K_at), tile_cursor_advance<BLOCK_KV>(V_at)) {
            mask_range range;
            if (!visit_kv_block(range, band, first, n, q, in.score, call))
                continue;
            visited++;
            load_tile<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K, K_at, sg.thread_index);
            if (!SHARED_TILE)
                load_tile<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V, V_at, sg.thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            float2 S[KEY_FRAGMENTS], dtanh[KEY_FRAGMENTS];
            clear<KEY_FRAGMENTS>(S);
            gemm_nt<KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, Q, K_tile + first_key * D_STRIDE + sg.slice * D_SLICE,
                                                          sg.at);
            if (SPLIT > 1) {
                threadgroup float2 *slot = exchange_slot<KEY_FRAGMENTS>(memory.exchange, sg);
                store_partial<KEY_FRAGMENTS, KEY_FRAGMENTS>(S, slot, sg.slice);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (SHARED_TILE)
                    load_tile<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V, V_at, sg.thread_index);
                reduce_partials<KEY_FRAGMENTS, KEY_FRAGMENTS>(S, slot);
            }
            score_tile<KEY_FRAGMENTS>(S, dtanh, first_key, range, mask_range_is_full(range, BLOCK_KV), sg.at, call);
            softmax_step<KEY_FRAGMENTS, E_FRAGMENTS>(acc.state, acc.O, S);
            if (SHARED_TILE)
                threadgroup_barrier(mem_flags::mem_threadgroup);
            gemm_nn<KEY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(acc.O, S, V_tile + first_key * E_STRIDE + sg.slice * E_SLICE,
                                                          sg.at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    acc.state.l = row_sum(acc.state.l);
    return visited;
}

/* Stores a partial result: m, l and then O, undivided, of one row and one split of its keys. attention_merge merges
 * them. */
METAL_FUNC void store_split(thread const accumulator &acc, thread const q_block &q, long split,
                            constant mfa_metal_call &call, thread const simdgroup_coord &sg, device float *partials)
{
    if (!q.own.valid)
        return;
    constant mfa_args &args = call.args;
    long row = (q.seq.batch * args.kv_heads + q.kv_head) * q.seq.q_len * call.pack_gqa + q.row;
    device float *to = partials + (row * call.splits + split) * (args.value_dim + 2);
    if (sg.slice == 0 && sg.at.column == 0) {
        to[0] = acc.state.m;
        to[1] = acc.state.l;
    }
    UNROLL
    for (int d = 0; d < E_FRAGMENTS; d++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            int column = E_COLUMN(sg) + d * 8 + e;
            if (column < args.value_dim)
                to[2 + column] = acc.O[d][e];
        }
    }
}

/* The epilogue: O = O / l, L = ln(2) * (m + log2(l)); 0 and -inf for a row without keys. O_low gets what rounding takes
 * off O. */
METAL_FUNC void store_rows(thread const accumulator &acc, thread const q_block &q, constant mfa_metal_call &call,
                           thread const simdgroup_coord &sg, thread const forward_results &out)
{
    if (!q.own.valid)
        return;
    constant mfa_args &args = call.args;
    float inverse = softmax_inverse(acc.state.l);
    long row = q_offset(q.seq, args.o, q.own.head, q.own.i);
    store_row<E_FRAGMENTS>(out.O + row, args.o.column, E_COLUMN(sg), args.value_dim, acc.O, inverse);
    if (call.present >> MFA_METAL_BUFFER_O_LOW & 1)
        store_row<E_FRAGMENTS, true>(out.O_low + row, args.o.column, E_COLUMN(sg), args.value_dim, acc.O, inverse);
    if ((call.present >> MFA_METAL_BUFFER_LSE & 1) && sg.slice == 0 && sg.at.column == 0)
        out.L[q_offset(q.seq, args.lse, q.own.head, q.own.i)] = log_sum_exp(acc.state.m, acc.state.l);
}
