/* dbias = dS, summed over the dimensions along which its stride is 0.
 *
 *     each threadgroup has a tile of dbias, 32 x 32, and a split of all (batch, head, queries, keys) summed into it:
 *         B = 0
 *         for each tile of scores of that split:
 *             S = scale * Q K^T, softcap, mask, band;   P = exp(S - L)
 *             B = B + P * (dO V^T with dropout - D)
 *         B = sum of its rows, of its columns, or both, if dbias has one element along them
 *
 * With more than one split, attention_dbias_sum adds the partial sums, in order. Each simdgroup has 8 queries; operands
 * are read where they lie, so the loop has no barrier. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;

#define BLOCK 32
#define BLOCK_Q BLOCK
#define BLOCK_KV BLOCK
#define ROW_GROUPS (BLOCK / 8)
#define SPLIT 1

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

#define FRAGMENTS (BLOCK / 8)

/* A tile of scores: of which batch and head, and where its queries and keys begin. */
struct tile_coord {
    int batch, head, i, key;
};

/* The tile of dbias of this number. */
METAL_FUNC tile_coord tile_coord_of(constant mfa_metal_call &call, uint number)
{
    grid_coord c = grid_coord_of(call.grid, number);
    return tile_coord{c.batch, c.head, c.row * BLOCK, c.column * BLOCK};
}

/* How many tiles of scores are summed into a tile of dbias, along each dimension. */
METAL_FUNC grid_coord summed_tiles(constant mfa_args &args)
{
    grid_coord n;
    n.batch = args.dbias.batch == 0 ? int(args.batch) : 1;
    n.head = args.dbias.head == 0 ? int(args.q_heads) : 1;
    n.row = args.dbias.row == 0 ? (int(args.q_len) + BLOCK - 1) / BLOCK : 1;
    n.column = args.dbias.column == 0 ? (int(args.kv_len) + BLOCK - 1) / BLOCK : 1;
    return n;
}

/* S += A B^T, with rows of device memory: the lane's own of A, and 8 * FRAGMENTS rows of B from `first` on. */
METAL_FUNC void gemm_nt_device(thread float2 *S, thread const row_source<KV_SAME> &A, int A_row, bool A_valid,
                               thread const row_source<KV_SAME> &B, int first, lane_coord at)
{
    device const storage *B_rows = row_address(B, first);
    int rows = B.rows - first;
    for (int d = 0; d < B.columns; d += 8) {
        storage a[2];
        load_elements<2>(a, A, row_address(A, A_row), d + at.column, A_valid);
        bool inside = d + at.row < B.columns;
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            float2 b = float2{0.0f, 0.0f};
            UNROLL
            for (int e = 0; e < 2; e++) {
                int row = n * 8 + at.column + e;
                if (inside && row < rows)
                    b[e] = widen(B_rows[row * B.row_stride + (d + at.row) * B.column_stride]);
            }
            multiply_add(S[n], float2{widen(a[0]), widen(a[1])}, b);
        }
    }
}

/* Adds P * (dP - D) of a tile of scores. */
METAL_FUNC void add_tile(thread float2 *sum, tile_coord c, thread const backward_operands &in,
                         thread const index_operands &index, constant mfa_metal_call &call, uint simdgroup,
                         lane_coord at)
{
    constant mfa_args &args = call.args;
    sequence seq = sequence_of(call, index, c.batch);
    if (!block_is_visible(in.score, call, seq, c.head, c.i, c.key))
        return;
    int i = c.i + int(simdgroup) * 8 + at.row, kv_head = c.head / int(args.q_heads_per_kv);
    bool valid = i < seq.q_len;
    query q = query{c.head, valid ? i : 0, valid};
    mask_range range;
    mask_range_of_query(range, in.score, call, seq, q);
    mask_range_move(range, range, c.key);
#if defined(BLOCK_MAP)
    mask_range_add_map<BLOCK>(range, range.map, args.block_map_kv, args.block_map.column, c.key, seq.kv_len - 1);
#endif
#if defined(ALIBI)
    mask_range_add_alibi(range, in.score, call, seq, q.head, q.i, c.key, -1.0f);
#endif
    mask_range_add_mask(range, in.score.mask + mask_offset(seq, args.mask, q.head, q.i, c.key), args.mask.column,
                        MFA_METAL_BLOCK_PARTIAL);
    float2 S[FRAGMENTS], dP[FRAGMENTS], dtanh[FRAGMENTS];
    clear<FRAGMENTS>(S);
    clear<FRAGMENTS>(dP);
    gemm_nt_device(S, q_source(in.Q, call, seq, q.head), q.i, valid, k_source(in.kv, call, seq, kv_head), c.key, at);
    gemm_nt_device(dP, do_source(in.dO, call, seq, q.head), q.i, valid, v_source(in.kv, call, seq, kv_head), c.key, at);
    score_tile<1, FRAGMENTS>(S, dtanh, 0, BLOCK, &range, at, call);
    dropout dropped = dropout_of(in.score, call, seq);
    kept_tile<1, FRAGMENTS> kept;
    keep_keys(kept, dropped, args, &q, c.key, at);
    long row = row_stats_index(seq, args, q.head, q.i);
    float L = in.L[row], D = in.D[row];
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        sum[n] += softmax_probability(S[n], float2{L, L}) * (dropout_gradient(dP[n], args, kept, n) - D);
}

/* Element (row, column) of a tile of dbias; only the first row or column counts if it is summed along them. */
METAL_FUNC void store_bias(device mask_storage *dbias, constant mfa_metal_call &call, tile_coord c, int row, int column,
                           float value)
{
    constant mfa_strides &s = call.args.dbias;
    bool in_rows = s.row == 0 ? row == 0 : c.i + row < int(call.args.q_len);
    bool in_columns = s.column == 0 ? column == 0 : c.key + column < int(call.args.kv_len);
    if (in_rows && in_columns)
        dbias[c.batch * s.batch + c.head * s.head + (c.i + row) * s.row + (c.key + column) * s.column] =
            mask_narrow(value);
}

/* The tile of scores of this step, among the n tiles that are summed into `own`. */
METAL_FUNC tile_coord summed_tile(tile_coord own, grid_coord n, uint step)
{
    grid_coord c = grid_coord_of(uint(n.head), uint(n.row), uint(n.column), step);
    return tile_coord{own.batch + c.batch, own.head + c.head, own.i + c.row * BLOCK, own.key + c.column * BLOCK};
}

/* Sums a tile over its rows, its columns, or both, if dbias has one element along them. */
METAL_FUNC void reduce_tile(thread float2 *sum, constant mfa_args &args, threadgroup float2 *exchange, uint simdgroup,
                            uint lane)
{
    if (args.dbias.column == 0) {
        float all = 0.0f;
        UNROLL
        for (int f = 0; f < FRAGMENTS; f++)
            all += sum[f][0] + sum[f][1];
        sum[0][0] = row_sum(all);
    }
    UNROLL
    for (int f = 0; f < FRAGMENTS; f++) {
        if (args.dbias.row == 0)
            sum[f] = float2{column_sum(sum[f][0]), column_sum(sum[f][1])};
        exchange[(simdgroup * FRAGMENTS + f) * 32 + lane] = sum[f];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int f = 0; f < FRAGMENTS; f++)
        for (int s = 1; s < BLOCK / 8 && args.dbias.row == 0; s++)
            sum[f] += exchange[((simdgroup + s) % (BLOCK / 8) * FRAGMENTS + f) * 32 + lane];
}

#if defined(KERNEL_attention_dbias)
kernel void attention_dbias(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                            device const storage *Q [[buffer(6)]] KV_BUFFERS, SCORE_BUFFERS,
                            device const storage *dO [[buffer(12)]], device mask_storage *dbias [[buffer(17)]],
                            device float *partials [[buffer(2)]], device const float *D [[buffer(3)]],
                            device const float *L [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(float2, exchange, ROW_GROUPS * FRAGMENTS * 32);
    constant mfa_args &args = call.args;
    uint index = uint(call.first_group) + group, splits = uint(call.splits), number = index / splits;
    tile_coord own = tile_coord_of(call, number);
    grid_coord n = summed_tiles(args);
    part_range part =
        part_range_of(uint(n.batch) * uint(n.head) * uint(n.row) * uint(n.column), index - number * splits, splits);
    lane_coord at = lane_coord_of(lane);
    backward_operands in = backward_operands{Q, dO, KV_OPERANDS, SCORE_OPERANDS, D, L};
    float2 sum[FRAGMENTS];
    clear<FRAGMENTS>(sum);
    for (uint step = part.begin; step < part.end; step++)
        add_tile(sum, summed_tile(own, n, step), in, INDEX_OPERANDS, call, simdgroup, at);
    reduce_tile(sum, args, exchange, simdgroup, lane);
    UNROLL
    for (int f = 0; f < FRAGMENTS; f++) {
        int row = int(simdgroup) * 8 + at.row, column = f * 8 + at.column;
        UNROLL
        for (int e = 0; e < 2; e++) {
            if (splits > 1)
                partials[(long(index) * BLOCK + row) * BLOCK + column + e] = sum[f][e];
            else
                store_bias(dbias, call, own, row, column + e, sum[f][e]);
        }
    }
}
#endif

#if defined(KERNEL_attention_dbias_sum)
kernel void attention_dbias_sum(constant mfa_metal_call &call [[buffer(0)]], device mask_storage *dbias [[buffer(17)]],
                                device const float *partials [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                                uint index [[thread_index_in_threadgroup]])
{
    uint number = uint(call.first_group) + group, splits = uint(call.splits);
    tile_coord own = tile_coord_of(call, number);
    for (int element = int(index); element < BLOCK * BLOCK; element += 128) {
        float sum = 0.0f;
        for (uint part = 0; part < splits; part++)
            sum += partials[(long(number) * splits + part) * (BLOCK * BLOCK) + element];
        store_bias(dbias, call, own, element / BLOCK, element % BLOCK, sum);
    }
}
#endif
