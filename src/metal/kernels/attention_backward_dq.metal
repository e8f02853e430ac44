/* dQ: each threadgroup has BLOCK_Q rows of queries, as in attention_forward, and walks along their keys.
 *
 *     dQ = 0
 *     for each block of keys that is not EMPTY:
 *         load K and V tiles
 *         S = scale * Q K^T, softcap, mask, band;   P = exp(S - L)
 *         dP = dO V^T, dropout of P
 *         dZ = P * (dP - D) * derivative of the softcap
 *         dQ = dQ + dZ K
 *     dQ = scale * dQ
 *
 * Q, dO, S, P, dP and dQ stay in registers. Two barriers a block; one more where columns are split, and two more where
 * K and V share a tile's memory. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/fragment.h"
#include "metal/kernels/codes.h"
#include "metal/kernels/gemm.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"
#include "metal/kernels/kv_source.h"
#include "metal/kernels/simdgroup.h"
#include "metal/kernels/score.h"
#include "metal/kernels/softmax.h"
#include "metal/kernels/block_range.h"
#include "metal/kernels/dropout.h"
#include "metal/kernels/backward.h"

#define KEY_FRAGMENTS (BLOCK_KV / 8)

/* Computes dQ, not yet scaled, of the lane's rows; returns how many blocks of keys were visited. */
METAL_FUNC int walk_keys(thread float2 *dQ, thread const q_block &q, thread const backward_operands &in,
                         constant mfa_metal_call &call, thread const simdgroup_coord &sg,
                         thread const threadgroup_memory &memory)
{
    constexpr int ROWS = LANE_ROWS, S_FRAGMENTS = ROWS * KEY_FRAGMENTS;
    threadgroup tile_element *K_tile = memory.tiles, *V_tile = memory.tiles + SECOND_TILE(BLOCK_KV);
    kv_source<K_TYPE> K = k_source(in.kv, call, q.seq, q.kv_head);
    kv_source<V_TYPE> V = v_source(in.kv, call, q.seq, q.kv_head);
    float L[ROWS], D[ROWS];
    int visited = 0;
    storage2 Q[ROWS * D_FRAGMENTS], dO[ROWS * E_FRAGMENTS];
    mask_range bands[ROWS];
    map_walk map = map_walk_init();
    dropout dropped = dropout_of(in.score, call, q.seq);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        query own = q.own[r];
        long row = row_stats_index(q.seq, call.args, own.head, own.i);
        L[r] = in.L[row], D[r] = in.D[row];
        load_row_paired<D_FRAGMENTS>(Q + r * D_FRAGMENTS, q_source(in.Q, call, q.seq, own.head), own.i,
                                     sg.slice * D_SLICE, own.valid, sg.at);
        load_row_paired<E_FRAGMENTS>(dO + r * E_FRAGMENTS, do_source(in.dO, call, q.seq, own.head), own.i,
                                     sg.slice * E_SLICE, own.valid, sg.at);
        mask_range_of_query(bands[r], in.score, call, q.seq, own);
    }
    clear<ROWS * D_FRAGMENTS>(dQ);

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
            keep_keys(kept, dropped, call.args, q.own, block * BLOCK_KV, sg.at);
            load_tile<BLOCK_KV, VALUE_DIM, THREADS>(V_tile, V, V_at, sg.thread_index);
            if (!SHARED_TILE)
                load_tile<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K, K_at, sg.thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            float2 S[S_FRAGMENTS], dP[S_FRAGMENTS], dtanh[S_FRAGMENTS];
            clear<S_FRAGMENTS>(dP);
            gemm_nt<ROWS, KEY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(dP, dO, V_tile + E_TILE_SLICE(sg, 0), sg.at);
            if (SHARED_TILE) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                load_tile<BLOCK_KV, HEAD_DIM, THREADS>(K_tile, K, K_at, sg.thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            clear<S_FRAGMENTS>(S);
            gemm_nt<ROWS, KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, Q, K_tile + D_TILE_SLICE(sg, 0), sg.at);
            if (SPLIT > 1) {
                store_partial_pair<S_FRAGMENTS>(S, dP, memory.exchange, sg);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                reduce_partial_pair<S_FRAGMENTS>(S, dP, memory.exchange, sg);
            }
            score_tile<ROWS, KEY_FRAGMENTS>(S, dtanh, 0, BLOCK_KV, ranges, sg.at, call);
            UNROLL
            for (int f = 0; f < S_FRAGMENTS; f++) {
                float2 P = softmax_probability(S[f], float2{L[f / KEY_FRAGMENTS], L[f / KEY_FRAGMENTS]});
                dP[f] = score_gradient(P, dropout_gradient(dP[f], call.args, kept, f),
                                       float2{D[f / KEY_FRAGMENTS], D[f / KEY_FRAGMENTS]}, dtanh[f]);
            }
            gemm_nn<ROWS, KEY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(dQ, dP, K_tile + D_TILE_SLICE(sg, 0), sg.at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    return visited;
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_backward_dq(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                      device const storage *Q [[buffer(6)]] KV_BUFFERS, SCORE_BUFFERS,
                      device const storage *dO [[buffer(12)]], device out_storage *dQ [[buffer(14)]],
                      device const float *D [[buffer(3)]], device const float *L [[buffer(4)]],
#if defined(COUNT_TILES)
                      device uint *visited [[buffer(5)]],
#endif
                      uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(tile_element, tile, TILE_BYTES / sizeof(tile_element));
    THREADGROUP_ARRAY(float2, exchange, EXCHANGE_BYTES / sizeof(float2));
    constant mfa_args &args = call.args;
    simdgroup_coord sg = simdgroup_coord_of(index, simdgroup, lane);
    q_block q = q_block_of(call, INDEX_OPERANDS, threadgroup_coord(call, group), sg);
    if (!is_past_end(call, q)) {
        float2 dQ_rows[LANE_ROWS * D_FRAGMENTS];
        int count = walk_keys(dQ_rows, q, backward_operands{Q, dO, KV_OPERANDS, SCORE_OPERANDS, D, L}, call, sg,
                              threadgroup_memory{tile, exchange});
#if defined(COUNT_TILES)
        if (index == 0)
            visited[call.first_group + group] = uint(count);
#else
        (void)count;
#endif
        UNROLL
        for (int r = 0; r < LANE_ROWS; r++)
            if (q.own[r].valid)
                store_row<D_FRAGMENTS>(dQ + q_offset(q.seq, args.dq, q.own[r].head, q.own[r].i), args.dq.column,
                                       D_COLUMN(sg), int(args.head_dim), dQ_rows + r * D_FRAGMENTS, args.scale);
    }
}
