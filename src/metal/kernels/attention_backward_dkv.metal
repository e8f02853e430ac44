/* dK and dV: each threadgroup has BLOCK_KV keys and walks along the queries that see them, head by head of their group.
 * Everything is transposed, so that the keys are the rows:
 *
 *     dK = 0, dV = 0
 *     for each query head of the KV head, for each tile of queries that see some key:
 *         stage Q and dO
 *         S^T = scale * K Q^T, softcap, mask, band;   P^T = exp(S^T - L)
 *         dP^T = V dO^T
 *         dZ^T = P^T * (dP^T - D) * slope of the softcap
 *         dV = dV + P^T dO
 *         dK = dK + dZ^T Q
 *     dK = scale * dK
 *
 * K, V, S, P, dP, dK and dV stay in registers. Two barriers a tile; one more where columns are split, and four more
 * where Q and dO share a tile's memory, Q being staged twice. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"
#include "metal/kernels/blocks.h"
#include "metal/kernels/backward.h"

#define QUERY_FRAGMENTS (BLOCK_Q / 8)

/* The keys of a threadgroup: the first, and the lane's own. */
struct keys {
    long batch, kv_head, first, own;
    bool there;
};

METAL_FUNC keys keys_of(constant mfa_metal_call &call, mfa_metal_grid part, thread const seat &own)
{
    keys k;
    k.batch = part.batch;
    k.kv_head = part.head;
    k.first = part.row * BLOCK_KV;
    k.own = k.first + own.row_group * 8 + own.at.row;
    k.there = k.own < call.args.kv_len;
    return k;
}

/* S^T becomes P^T, dP^T becomes dZ^T, for queries of which D and L begin with these. */
METAL_FUNC void gradients(thread float2 *S, thread float2 *dP, thread const sight &sees, long queries,
                          device const float *D, device const float *L, constant mfa_metal_call &call, place at)
{
    float2 slope[QUERY_FRAGMENTS];
    score_tile<QUERY_FRAGMENTS>(S, slope, 0, sees, at, call);
    UNROLL
    for (int n = 0; n < QUERY_FRAGMENTS; n++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            long i = min(long(n * 8 + at.column + e), queries - 1);
            S[n][e] = probability(S[n][e], L[i]);
            dP[n][e] = S[n][e] * (dP[n][e] - D[i]) * slope[n][e];
        }
    }
}

/* Adds to dK, not yet scaled, and dV of the lane's key what the queries of one head give; returns how many tiles were
 * visited. */
METAL_FUNC int walk_queries(thread float2 *dK, thread float2 *dV, thread const storage2 *K, thread const storage2 *V,
                            thread const keys &k, long head, thread const backward_operands &in,
                            constant mfa_metal_call &call, thread const seat &own, threadgroup storage *tiles_memory,
                            threadgroup float2 *exchange, uint index)
{
    constant mfa_args &args = call.args;
    threadgroup storage *Q_tile = tiles_memory, *dO_tile = tiles_memory + SECOND_TILE(BLOCK_Q * D_STRIDE);
    device const storage *Q = in.Q + offset_of(args.q, k.batch, head, 0);
    device const storage *dO = in.dO + offset_of(args.d_o, k.batch, head, 0);
    long number = (k.batch * args.q_heads + head) * args.q_len;
    bool wide_Q = call.wide >> MFA_METAL_BUFFER_Q & 1, wide_dO = call.wide >> MFA_METAL_BUFFER_DO & 1;
    tiles range = tiles_of_queries(call, k.first, min(k.first + BLOCK_KV, args.kv_len) - 1);
    int visited = 0;

    for (long tile = range.begin; tile < range.end; tile++) {
        long i = tile * BLOCK_Q, queries = args.q_len - i;
        sight sees;
        sight_of_key(sees, call, k.own, i);
#if defined(MASKED)
        if (!sight_of_mask(
                sees, in.mask + offset_of(args.mask, k.batch, head, i) + k.own * args.mask.column, args.mask.row,
                in.classes[offset_of(call.classes, k.batch, head, tile) + k.first / BLOCK_KV * call.classes.column]))
            continue;
#endif
        visited++;
        stage<BLOCK_Q, HEAD_DIM, THREADS>(Q_tile, Q + i * args.q.row, args.q.row, args.q.column, queries, args.head_dim,
                                          wide_Q, index);
#if !defined(SHARED_TILE)
        stage<BLOCK_Q, VALUE_DIM, THREADS>(dO_tile, dO + i * args.d_o.row, args.d_o.row, args.d_o.column, queries,
                                           args.value_dim, wide_dO, index);
#endif
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float2 S[QUERY_FRAGMENTS], dP[QUERY_FRAGMENTS];
        clear<QUERY_FRAGMENTS>(S);
        clear<QUERY_FRAGMENTS>(dP);
        multiply_rows<QUERY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(S, K, Q_tile + own.slice * D_SLICE, own.at);
#if defined(SHARED_TILE)
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage<BLOCK_Q, VALUE_DIM, THREADS>(dO_tile, dO + i * args.d_o.row, args.d_o.row, args.d_o.column, queries,
                                           args.value_dim, wide_dO, index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
        multiply_rows<QUERY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(dP, V, dO_tile + own.slice * E_SLICE, own.at);
#if SPLIT > 1
        threadgroup float2 *shelf = shelf_of<2 * QUERY_FRAGMENTS>(exchange, own);
        hand_in<QUERY_FRAGMENTS, 2 * QUERY_FRAGMENTS>(S, shelf, own.slice);
        hand_in<QUERY_FRAGMENTS, 2 * QUERY_FRAGMENTS>(dP, shelf + QUERY_FRAGMENTS * 32, own.slice);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        add_up<QUERY_FRAGMENTS, 2 * QUERY_FRAGMENTS>(S, shelf);
        add_up<QUERY_FRAGMENTS, 2 * QUERY_FRAGMENTS>(dP, shelf + QUERY_FRAGMENTS * 32);
#endif
        gradients(S, dP, sees, queries, in.D + number + i, in.L + number + i, call, own.at);
        if (call.given >> MFA_METAL_BUFFER_DV & 1)
            multiply_columns<QUERY_FRAGMENTS, E_FRAGMENTS, E_STRIDE>(dV, S, dO_tile + own.slice * E_SLICE, own.at);
#if defined(SHARED_TILE)
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage<BLOCK_Q, HEAD_DIM, THREADS>(Q_tile, Q + i * args.q.row, args.q.row, args.q.column, queries, args.head_dim,
                                          wide_Q, index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
        if (call.given >> MFA_METAL_BUFFER_DK & 1)
            multiply_columns<QUERY_FRAGMENTS, D_FRAGMENTS, D_STRIDE>(dK, dP, Q_tile + own.slice * D_SLICE, own.at);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    return visited;
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_backward_dkv(constant mfa_metal_call &call [[buffer(0)]], device const storage *Q [[buffer(1)]],
                       device const storage *K [[buffer(2)]], device const storage *V [[buffer(3)]],
                       device const mask_storage *mask [[buffer(4)]], device const storage *dO [[buffer(7)]],
                       device storage *dK [[buffer(10)]], device storage *dV [[buffer(11)]],
                       device const uchar *classes [[buffer(14)]], device const float *D [[buffer(16)]],
                       device const float *L [[buffer(17)]],
#if defined(COUNT_TILES)
                       device uint *visited [[buffer(18)]],
#endif
                       threadgroup storage *tile TG_ARG(0), threadgroup float2 *exchange TG_ARG(1),
                       uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    seat own = seat_of(simdgroup, lane);
    keys k = keys_of(call, part_of(call, group), own);
    long row = k.there ? k.own : 0, d_column = own.slice * D_SLICE + own.at.column;
    long e_column = own.slice * E_SLICE + own.at.column;
    storage2 K_row[D_FRAGMENTS], V_row[E_FRAGMENTS];
    float2 dK_row[D_FRAGMENTS], dV_row[E_FRAGMENTS];
    int count = 0;
    load_row<D_FRAGMENTS>(K_row, K + offset_of(args.k, k.batch, k.kv_head, row), args.k.column, d_column, args.head_dim,
                          k.there);
    load_row<E_FRAGMENTS>(V_row, V + offset_of(args.v, k.batch, k.kv_head, row), args.v.column, e_column,
                          args.value_dim, k.there);
    clear<D_FRAGMENTS>(dK_row);
    clear<E_FRAGMENTS>(dV_row);
    for (long head = k.kv_head * args.group; head < (k.kv_head + 1) * args.group; head++)
        count += walk_queries(dK_row, dV_row, K_row, V_row, k, head,
                              backward_operands{Q, K, V, dO, mask, classes, D, L}, call, own, tile, exchange, index);
#if defined(COUNT_TILES)
    if (index == 0)
        visited[call.first + group] = uint(count);
#else
    (void)count;
#endif
    if (k.there && (call.given >> MFA_METAL_BUFFER_DK & 1))
        store_row<D_FRAGMENTS>(dK + offset_of(args.dk, k.batch, k.kv_head, row), args.dk.column, d_column,
                               args.head_dim, dK_row, args.scale);
    if (k.there && (call.given >> MFA_METAL_BUFFER_DV & 1))
        store_row<E_FRAGMENTS>(dV + offset_of(args.dv, k.batch, k.kv_head, row), args.dv.column, e_column,
                               args.value_dim, dV_row, 1.0f);
}
