/* dK and dV: each threadgroup has BLOCK_KV keys and walks along the queries that attend to them, head by head of their
 * group. Everything is transposed, so that the keys are the rows:
 *
 *     dK = 0, dV = 0
 *     for each query head of the KV head, for each block of queries that is not EMPTY:
 *         load Q and dO tiles
 *         S^T = scale * K Q^T, softcap, mask, band;   P^T = exp(S^T - L)
 *         dP^T = V dO^T, dropout of P^T
 *         dZ^T = P^T * (dP^T - D) * derivative of the softcap
 *         dV = dV + P^T dO
 *         dK = dK + dZ^T Q
 *     dK = scale * dK
 *
 * K, V, S, P, dP, dK and dV stay in registers. Two barriers a block; one more where columns are split, and four more
 * where Q and dO share a tile's memory, Q being loaded twice. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;

#define KEYS_ARE_ROWS

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

#define QUERY_FRAGMENTS (BLOCK_Q / 8)

/* K and V of the lane's key, and the gradients that are summed for it: dK is not yet scaled. */
struct key_row {
    storage2 K[D_FRAGMENTS], V[E_FRAGMENTS];
    float2 dK[D_FRAGMENTS], dV[E_FRAGMENTS];
};

/* S^T becomes P^T, dP^T becomes dZ^T, for `queries` queries from `first` on; D and L are those of the head. P that are
 * not kept become 0. */
METAL_FUNC void gradients(thread float2 *S, thread float2 *dP, thread const mask_range &range,
                          thread const kept_tile<1, QUERY_FRAGMENTS> &kept, int first, int queries,
                          device const float *D, device const float *L, constant mfa_metal_call &call, lane_coord at)
{
    float2 dtanh[QUERY_FRAGMENTS];
    score_tile<1, QUERY_FRAGMENTS>(S, dtanh, 0, BLOCK_Q, &range, at, call);
    bool whole = queries >= BLOCK_Q;
    UNROLL
    for (int n = 0; n < QUERY_FRAGMENTS; n++) {
        int i = n * 8 + at.column, next = i + 1;
        if (!whole)
            i = min(i, queries - 1), next = min(next, queries - 1);
        i += first, next += first;
        S[n] = softmax_probability(S[n], float2{L[i], L[next]});
        dP[n] = score_gradient(S[n], dropout_gradient(dP[n], call.args, kept, n), float2{D[i], D[next]}, dtanh[n]);
    }
    drop(S, kept);
}

/* Adds to the gradients of the lane's key those of the queries of one head; returns how many blocks of queries were
 * visited. */
METAL_FUNC int walk_queries(thread key_row &row, thread const kv_block &k, int head, thread const backward_operands &in,
                            constant mfa_metal_call &call, thread const simdgroup_coord &sg,
                            thread const threadgroup_memory &memory)
{
    threadgroup tile_element *Q_tile = memory.tiles, *dO_tile = memory.tiles + SECOND_TILE(BLOCK_Q);
    row_source<KV_SAME> Q = q_source(in.Q, call, k.seq, head), dO = do_source(in.dO, call, k.seq, head);
    long stats = row_stats_index(k.seq, call.args, head, 0);
    device const float *D = in.D + stats, *L = in.L + stats;
    block_range q_blocks = q_blocks_of(call, k.seq, k.first, min(k.first + BLOCK_KV, k.seq.kv_len) - 1);
    mask_range band;
    mask_range_of_key(band, in.score, call, k.seq, head, k.own);
    map_walk map = map_walk_init();
    dropout dropped = dropout_of(in.score, call, k.seq);
    int visited = 0;

    for (int first = q_blocks.begin; first < q_blocks.end; first += STRETCH_BLOCKS) {
        tile_cursor<KV_SAME> Q_at = tile_cursor_of<BLOCK_Q>(Q, first * BLOCK_Q),
                             dO_at = tile_cursor_of<BLOCK_Q>(dO, first * BLOCK_Q);
        int end = stretch_end(first, q_blocks.end);
        for (int block = first; block < end;
             block++, tile_cursor_advance<BLOCK_Q>(Q_at), tile_cursor_advance<BLOCK_Q>(dO_at)) {
            mask_range range;
            if (!visit_q_block(range, band, map, block, head, k, in.score, call, sg.lane))
                continue;
            visited++;
            kept_tile<1, QUERY_FRAGMENTS> kept;
            keep_queries(kept, dropped, call.args, head, block * BLOCK_Q, k.first + sg.row_group * 8, sg.at);
            load_tile<BLOCK_Q, HEAD_DIM, THREADS>(Q_tile, Q, Q_at, sg.thread_index);
            if (!SHARED_TILE)
                load_tile<BLOCK_Q, VALUE_DIM, THREADS>(dO_tile, dO, dO_at, sg.thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);

            float2 S[QUERY_FRAGMENTS], dP[QUERY_FRAGMENTS];
            clear<QUERY_FRAGMENTS>(S);
            clear<QUERY_FRAGMENTS>(dP);
            gemm_nt<1, QUERY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, row.K, Q_tile + D_TILE_SLICE(sg, 0), sg.at);
            if (SHARED_TILE) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                load_tile<BLOCK_Q, VALUE_DIM, THREADS>(dO_tile, dO, dO_at, sg.thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            gemm_nt<1, QUERY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(dP, row.V, dO_tile + E_TILE_SLICE(sg, 0), sg.at);
            if (SPLIT > 1) {
                store_partial_pair<QUERY_FRAGMENTS>(S, dP, memory.exchange, sg);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                reduce_partial_pair<QUERY_FRAGMENTS>(S, dP, memory.exchange, sg);
            }
            gradients(S, dP, range, kept, block * BLOCK_Q, Q_at.rows, D, L, call, sg.at);
            if (call.present >> MFA_METAL_BUFFER_DV & 1)
                gemm_nn<1, QUERY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(row.dV, S, dO_tile + E_TILE_SLICE(sg, 0), sg.at);
            if (SHARED_TILE) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                load_tile<BLOCK_Q, HEAD_DIM, THREADS>(Q_tile, Q, Q_at, sg.thread_index);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            if (call.present >> MFA_METAL_BUFFER_DK & 1)
                gemm_nn<1, QUERY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(row.dK, dP, Q_tile + D_TILE_SLICE(sg, 0), sg.at);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    return visited;
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void attention_backward_dkv(
    constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS, device const storage *Q [[buffer(6)]] KV_BUFFERS,
    SCORE_BUFFERS, device const storage *dO [[buffer(12)]], device out_storage *dK [[buffer(15)]],
    device out_storage *dV [[buffer(16)]], device const float *D [[buffer(3)]], device const float *L [[buffer(4)]],
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
    kv_block k = kv_block_of(call, INDEX_OPERANDS, threadgroup_coord(call, group), sg);
    if (!is_past_end(k)) {
        int key = k.valid ? k.own : 0, heads = int(args.q_heads_per_kv);
        key_row row;
        int count = 0;
        load_row_paired<D_FRAGMENTS>(row.K, k_source(KV_OPERANDS, call, k.seq, k.kv_head), key, sg.slice * D_SLICE,
                                     k.valid, sg.at);
        load_row_paired<E_FRAGMENTS>(row.V, v_source(KV_OPERANDS, call, k.seq, k.kv_head), key, sg.slice * E_SLICE,
                                     k.valid, sg.at);
        clear<D_FRAGMENTS>(row.dK);
        clear<E_FRAGMENTS>(row.dV);
        for (int head = 0; head < heads; head++)
            count += walk_queries(row, k, k.kv_head * heads + head,
                                  backward_operands{Q, dO, KV_OPERANDS, SCORE_OPERANDS, D, L}, call, sg,
                                  threadgroup_memory{tile, exchange});
#if defined(COUNT_TILES)
        if (index == 0)
            visited[call.first_group + group] = uint(count);
#else
        (void)count;
#endif
        if (k.valid && (call.present >> MFA_METAL_BUFFER_DK & 1))
            store_row<D_FRAGMENTS>(dK + kv_offset(k.seq, args.dk, k.kv_head, key), args.dk.column, D_COLUMN(sg),
                                   int(args.head_dim), row.dK, args.scale);
        if (k.valid && (call.present >> MFA_METAL_BUFFER_DV & 1))
            store_row<E_FRAGMENTS>(dV + kv_offset(k.seq, args.dv, k.kv_head, key), args.dv.column, E_COLUMN(sg),
                                   int(args.value_dim), row.dV, dropout_scale(args));
    }
}
