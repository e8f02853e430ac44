/* dQ: each threadgroup has BLOCK_Q rows of queries, as in attention_forward, and walks along their keys.
 *
 *     dQ = 0
 *     for each tile of keys that some row sees:
 *         stage K and V
 *         S = scale * Q K^T, softcap, mask, band;   P = exp(S - L)
 *         dP = dO V^T
 *         dZ = P * (dP - D) * slope of the softcap
 *         dQ = dQ + dZ K
 *     dQ = scale * dQ
 *
 * Q, dO, S, P, dP and dQ stay in registers. Two barriers a tile; one more where columns are split, and two more where
 * K and V share a tile's memory. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"
#include "metal/kernels/blocks.h"
#include "metal/kernels/backward.h"

#define KEY_FRAGMENTS (BLOCK_KV / 8)

/* Leaves dQ, not yet scaled, of the lane's row; returns how many tiles were visited. */
METAL_FUNC int walk_keys(thread float2 *dQ, thread const rows &r, thread const backward_operands &in,
                         constant mfa_metal_call &call, thread const seat &own, threadgroup storage *tiles,
                         threadgroup float2 *exchange, uint index)
{
    constant mfa_args &args = call.args;
    threadgroup storage *K_tile = tiles, *V_tile = tiles + SECOND_TILE(BLOCK_KV * D_STRIDE);
    device const storage *Q_row = in.Q + offset_of(args.q, r.batch, r.own.head, r.own.i);
    device const storage *dO_row = in.dO + offset_of(args.d_o, r.batch, r.own.head, r.own.i);
    device const storage *K = in.K + offset_of(args.k, r.batch, r.kv_head, 0);
    device const storage *V = in.V + offset_of(args.v, r.batch, r.kv_head, 0);
    long number = (r.batch * args.q_heads + r.own.head) * args.q_len + r.own.i;
    float L = in.L[number], D = in.D[number];
    bool wide_K = call.wide >> MFA_METAL_BUFFER_K & 1, wide_V = call.wide >> MFA_METAL_BUFFER_V & 1;
    int visited = 0;
    storage2 Q[D_FRAGMENTS], dO[E_FRAGMENTS];
    load_row<D_FRAGMENTS>(Q, Q_row, args.q.column, own.slice * D_SLICE + own.at.column, args.head_dim, r.own.there);
    load_row<E_FRAGMENTS>(dO, dO_row, args.d_o.column, own.slice * E_SLICE + own.at.column, args.value_dim,
                          r.own.there);
    clear<D_FRAGMENTS>(dQ);

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
        stage<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V + key * args.v.row, args.v.row, args.v.column, keys,
                                            args.value_dim, wide_V, index);
#if !defined(SHARED_TILE)
        stage<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K + key * args.k.row, args.k.row, args.k.column, keys, args.head_dim,
                                           wide_K, index);
#endif
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float2 S[KEY_FRAGMENTS], dP[KEY_FRAGMENTS], slope[KEY_FRAGMENTS];
        clear<KEY_FRAGMENTS>(dP);
        multiply_rows<KEY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(dP, dO, V_tile + own.slice * E_SLICE, own.at);
#if defined(SHARED_TILE)
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K + key * args.k.row, args.k.row, args.k.column, keys, args.head_dim,
                                           wide_K, index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
        clear<KEY_FRAGMENTS>(S);
        multiply_rows<KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, Q, K_tile + own.slice * D_SLICE, own.at);
#if SPLIT > 1
        threadgroup float2 *shelf = shelf_of<2 * KEY_FRAGMENTS>(exchange, own);
        hand_in<KEY_FRAGMENTS, 2 * KEY_FRAGMENTS>(S, shelf, own.slice);
        hand_in<KEY_FRAGMENTS, 2 * KEY_FRAGMENTS>(dP, shelf + KEY_FRAGMENTS * 32, own.slice);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        add_up<KEY_FRAGMENTS, 2 * KEY_FRAGMENTS>(S, shelf);
        add_up<KEY_FRAGMENTS, 2 * KEY_FRAGMENTS>(dP, shelf + KEY_FRAGMENTS * 32);
#endif
        score_tile<KEY_FRAGMENTS>(S, slope, 0, sees, own.at, call);
        UNROLL
        for (int n = 0; n < KEY_FRAGMENTS; n++) {
            float2 P = float2{probability(S[n][0], L), probability(S[n][1], L)};
            dP[n] = P * (dP[n] - D) * slope[n];
        }
        multiply_columns<KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(dQ, dP, K_tile + own.slice * D_SLICE, own.at);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    return visited;
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_backward_dq(constant mfa_metal_call &call [[buffer(0)]], device const storage *Q [[buffer(1)]],
                      device const storage *K [[buffer(2)]], device const storage *V [[buffer(3)]],
                      device const mask_storage *mask [[buffer(4)]], device const storage *dO [[buffer(7)]],
                      device storage *dQ [[buffer(9)]], device const uchar *classes [[buffer(14)]],
                      device const float *D [[buffer(16)]], device const float *L [[buffer(17)]],
#if defined(COUNT_TILES)
                      device uint *visited [[buffer(18)]],
#endif
                      threadgroup storage *tile TG_ARG(0), threadgroup float2 *exchange TG_ARG(1),
                      uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    seat own = seat_of(simdgroup, lane);
    rows r = rows_of(call, part_of(call, group), own);
    float2 dQ_row[D_FRAGMENTS];
    int count =
        walk_keys(dQ_row, r, backward_operands{Q, K, V, dO, mask, classes, D, L}, call, own, tile, exchange, index);
#if defined(COUNT_TILES)
    if (index == 0)
        visited[call.first + group] = uint(count);
#else
    (void)count;
#endif
    if (r.own.there)
        store_row<D_FRAGMENTS>(dQ + offset_of(call.args.dq, r.batch, r.own.head, r.own.i), call.args.dq.column,
                               own.slice * D_SLICE + own.at.column, call.args.head_dim, dQ_row, call.args.scale);
}
