/* What attention_forward and attention_decode share: a threadgroup's rows of queries against a range of keys.
 *
 *     m = NOTHING, l = 0, O = 0
 *     for each tile of keys that some row sees:
 *         stage K and V
 *         S = scale * Q K^T, softcap, mask, band
 *         m' = max(m, rowmax(S)), alpha = exp2(m - m'), m = m'
 *         P = exp2(S - m)
 *         l = alpha * l + rowsum(P)
 *         O = alpha * O + P V
 *
 * Q, S, P, O, m and l stay in registers. Two barriers a tile; one more where columns are split, and one more where
 * K and V share a tile's memory. */

#define KEY_FRAGMENTS (BLOCK_KV / KEY_GROUPS / 8)

struct forward_operands {
    device const storage *Q, *K, *V;
    device const mask_storage *mask;
    device const uchar *classes;
};

/* Of the lane's row. All simdgroups that share rows and keys have the same m and l, and each its slice of O. */
struct sums {
    float m, l;
    float2 O[E_FRAGMENTS];
};

/* m, l and P from S. */
METAL_FUNC void softmax_step(thread sums &s, thread float2 *S)
{
    float top = s.m;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; n++)
        top = max(top, max(S[n][0], S[n][1]));
    top = row_max(top);
    float alpha = fast::exp2(s.m - top);
    s.m = top;
    s.l *= alpha;
    UNROLL
    for (int n = 0; n < KEY_FRAGMENTS; n++) {
        S[n] = float2{fast::exp2(S[n][0] - top), fast::exp2(S[n][1] - top)};
        s.l += S[n][0] + S[n][1];
    }
    UNROLL
    for (int d = 0; d < E_FRAGMENTS; d++)
        s.O[d] *= alpha;
}

/* Leaves m, l and O of the rows' keys; returns how many tiles were visited. */
METAL_FUNC int attend(thread sums &s, thread const rows &r, thread const forward_operands &in,
                      constant mfa_metal_call &call, thread const seat &own, threadgroup storage *tiles,
                      threadgroup float2 *exchange, uint index)
{
    constant mfa_args &args = call.args;
    threadgroup storage *K_tile = tiles, *V_tile = tiles + SECOND_TILE(BLOCK_KV * D_STRIDE);
    device const storage *Q_row = in.Q + offset_of(args.q, r.batch, r.own.head, r.own.i);
    device const storage *K = in.K + offset_of(args.k, r.batch, r.kv_head, 0);
    device const storage *V = in.V + offset_of(args.v, r.batch, r.kv_head, 0);
    bool wide_K = call.wide >> MFA_METAL_BUFFER_K & 1, wide_V = call.wide >> MFA_METAL_BUFFER_V & 1;
    int first_key = own.key_group * (BLOCK_KV / KEY_GROUPS), visited = 0;
    storage2 Q[D_FRAGMENTS];
    load_row<D_FRAGMENTS>(Q, Q_row, args.q.column, own.slice * D_SLICE + own.at.column, args.head_dim, r.own.there);
    s.m = NOTHING;
    s.l = 0.0f;
    clear<E_FRAGMENTS>(s.O);

    for (long tile = r.keys.begin; tile < r.keys.end; tile++) {
        long key = tile * BLOCK_KV, keys = args.kv_len - key;
        sight sees;
        sight_of_query(sees, call, r.own, key);
#if defined(MASKED)
        if (!sight_of_mask(sees, in.mask + offset_of(args.mask, r.batch, r.own.head, r.own.i) + key * args.mask.column,
                           args.mask.column,
                           in.classes[offset_of(call.classes, r.batch, r.kv_head, r.first / BLOCK_Q) +
                                      tile * call.classes.column]))
            continue;
#endif
        visited++;
        stage<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K + key * args.k.row, args.k.row, args.k.column, keys, args.head_dim,
                                           wide_K, index);
#if !defined(SHARED_TILE)
        stage<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V + key * args.v.row, args.v.row, args.v.column, keys,
                                            args.value_dim, wide_V, index);
#endif
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float2 S[KEY_FRAGMENTS], slope[KEY_FRAGMENTS];
        clear<KEY_FRAGMENTS>(S);
        multiply_rows<KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, Q, K_tile + first_key * D_STRIDE + own.slice * D_SLICE,
                                                            own.at);
#if SPLIT > 1
        threadgroup float2 *shelf = shelf_of<KEY_FRAGMENTS>(exchange, own);
        hand_in<KEY_FRAGMENTS, KEY_FRAGMENTS>(S, shelf, own.slice);
        threadgroup_barrier(mem_flags::mem_threadgroup);
#if defined(SHARED_TILE)
        stage<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V + key * args.v.row, args.v.row, args.v.column, keys,
                                            args.value_dim, wide_V, index);
#endif
        add_up<KEY_FRAGMENTS, KEY_FRAGMENTS>(S, shelf);
#endif
        score_tile<KEY_FRAGMENTS>(S, slope, first_key, sees, own.at, call);
        softmax_step(s, S);
#if defined(SHARED_TILE)
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
        multiply_columns<KEY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(
            s.O, S, V_tile + first_key * E_STRIDE + own.slice * E_SLICE, own.at);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    s.l = row_sum(s.l);
    return visited;
}

/* A partial result is m, l and then O, undivided, of one row and one part of its keys: attention_merge puts them
 * together. */
METAL_FUNC void store_partial(thread const sums &s, thread const rows &r, mfa_metal_grid part,
                              constant mfa_metal_call &call, thread const seat &own, device float *partials)
{
    if (!r.own.there)
        return;
    long number = ((r.batch * call.args.kv_heads + r.kv_head) * call.args.q_len * call.fold + r.row) * call.splits;
    device float *to = partials + (number + part.column) * (call.args.value_dim + 2);
    if (own.slice == 0 && own.at.column == 0) {
        to[0] = s.m;
        to[1] = s.l;
    }
    UNROLL
    for (int d = 0; d < E_FRAGMENTS; d++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            int column = own.slice * E_SLICE + d * 8 + own.at.column + e;
            if (column < call.args.value_dim)
                to[2 + column] = s.O[d][e];
        }
    }
}

/* O = O / l, L = ln(2) * (m + log2(l)); 0 and -inf for a row that has seen nothing. O_low gets what rounding takes off
 * O. */
METAL_FUNC void store_rows(thread const sums &s, thread const rows &r, constant mfa_metal_call &call,
                           thread const seat &own, device storage *O, device storage *O_low, device uint *L)
{
    if (!r.own.there)
        return;
    float inverse = s.l != 0.0f ? 1.0f / s.l : 0.0f;
    device storage *O_row = O + offset_of(call.args.o, r.batch, r.own.head, r.own.i);
    store_row<E_FRAGMENTS>(O_row, call.args.o.column, own.slice * E_SLICE + own.at.column, call.args.value_dim, s.O,
                           inverse);
    if (call.given >> MFA_METAL_BUFFER_O_LOW & 1)
        store_row<E_FRAGMENTS, true>(O_low + offset_of(call.args.o, r.batch, r.own.head, r.own.i), call.args.o.column,
                                     own.slice * E_SLICE + own.at.column, call.args.value_dim, s.O, inverse);
    if ((call.given >> MFA_METAL_BUFFER_LSE & 1) && own.slice == 0 && own.at.column == 0)
        L[offset_of(call.args.lse, r.batch, r.own.head, r.own.i)] = log_sum_exp(s.m, s.l);
}
