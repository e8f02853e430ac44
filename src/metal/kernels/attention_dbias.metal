/* dbias = dS, summed over the dimensions along which its stride is 0.
 *
 *     each threadgroup has a tile of dbias, 32 x 32, and a part of all (batch, head, queries, keys) summed into it:
 *         B = 0
 *         for each tile of scores of that part:
 *             S = scale * Q K^T, softcap, mask, band;   P = exp(S - L)
 *             B = B + P * (dO V^T - D)
 *         B = sum of its rows, of its columns, or both, if dbias has one element along them
 *
 * With more than one part, attention_dbias_sum adds them up, in order. Each simdgroup has 8 queries; operands are read
 * where they lie, so the loop has no barrier. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"
#include "metal/kernels/backward.h"

#define BLOCK 32
#define FRAGMENTS (BLOCK / 8)

/* A tile of scores: of which batch and head, and where its queries and keys begin. */
struct corner {
    long batch, head, i, key;
};

/* The tile of dbias of this number. */
METAL_FUNC corner corner_of(constant mfa_metal_call &call, long number)
{
    corner c;
    c.key = number % call.grid.column * BLOCK;
    number /= call.grid.column;
    c.i = number % call.grid.row * BLOCK;
    number /= call.grid.row;
    c.head = number % call.grid.head;
    c.batch = number / call.grid.head;
    return c;
}

/* How many tiles of scores are summed into a tile of dbias, along each dimension. */
METAL_FUNC mfa_metal_grid summed(constant mfa_args &args)
{
    mfa_metal_grid n;
    n.batch = args.dbias.batch == 0 ? args.batch : 1;
    n.head = args.dbias.head == 0 ? args.q_heads : 1;
    n.row = args.dbias.row == 0 ? (args.q_len + BLOCK - 1) / BLOCK : 1;
    n.column = args.dbias.column == 0 ? (args.kv_len + BLOCK - 1) / BLOCK : 1;
    return n;
}

/* S += A B^T, with rows of device memory: the lane's own of A, and two of B from `first` on, of `there`. */
METAL_FUNC void multiply_in_place(thread float2 *S, device const storage *A, bool A_there, long A_step,
                                  device const storage *B, long B_rows, long B_row_step, long B_step, long columns,
                                  place at)
{
    for (long d = 0; d < columns; d += 8) {
        storage2 a[1];
        load_row<1>(a, A, A_step, d + at.column, columns, A_there);
        bool inside = d + at.row < columns;
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            float2 b = float2{0.0f, 0.0f};
            UNROLL
            for (int e = 0; e < 2; e++) {
                long row = n * 8 + at.column + e;
                if (inside && row < B_rows)
                    b[e] = widen(B[row * B_row_step + (d + at.row) * B_step]);
            }
            multiply_add(S[n], widen(a[0]), b);
        }
    }
}

/* Adds P * (dP - D) of a tile of scores. */
METAL_FUNC void add_tile(thread float2 *sum, corner c, thread const backward_operands &in,
                         constant mfa_metal_call &call, uint simdgroup, place at)
{
    constant mfa_args &args = call.args;
    long i = c.i + simdgroup * 8 + at.row, keys = args.kv_len - c.key, kv_head = c.head / args.group;
    bool there = i < args.q_len;
    long low = 0, high = there ? args.kv_len - 1 : -1;
#if defined(BAND)
    if (c.key > c.i + BLOCK - 1 + args.upper || c.key + BLOCK - 1 < c.i + args.lower)
        return;
    low = i + args.lower;
    high = min(high, i + args.upper);
#endif
    i = there ? i : 0;
    sight sees;
    sight_cut(sees, low, high, c.key, BLOCK);
#if defined(MASKED)
    sight_of_mask(sees,
                  in.mask + c.batch * args.mask.batch + c.head * args.mask.head + i * args.mask.row +
                      c.key * args.mask.column,
                  args.mask.column, MFA_METAL_TILE_MIXED);
#endif
    float2 S[FRAGMENTS], dP[FRAGMENTS], slope[FRAGMENTS];
    clear<FRAGMENTS>(S);
    clear<FRAGMENTS>(dP);
    multiply_in_place(S, in.Q + c.batch * args.q.batch + c.head * args.q.head + i * args.q.row, there, args.q.column,
                      in.K + c.batch * args.k.batch + kv_head * args.k.head + c.key * args.k.row, keys, args.k.row,
                      args.k.column, args.head_dim, at);
    multiply_in_place(dP, in.dO + c.batch * args.d_o.batch + c.head * args.d_o.head + i * args.d_o.row, there,
                      args.d_o.column, in.V + c.batch * args.v.batch + kv_head * args.v.head + c.key * args.v.row, keys,
                      args.v.row, args.v.column, args.value_dim, at);
    score_tile<FRAGMENTS>(S, slope, 0, sees, at, call);
    long number = (c.batch * args.q_heads + c.head) * args.q_len + i;
    float L = in.L[number], D = in.D[number];
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        sum[n] += float2{probability(S[n][0], L), probability(S[n][1], L)} * (dP[n] - D);
}

/* Element (row, column) of a tile of dbias; only the first row or column counts if it is summed along them. */
METAL_FUNC void store_bias(device mask_storage *dbias, constant mfa_args &args, corner c, long row, long column,
                           float value)
{
    bool in_rows = args.dbias.row == 0 ? row == 0 : c.i + row < args.q_len;
    bool in_columns = args.dbias.column == 0 ? column == 0 : c.key + column < args.kv_len;
    if (in_rows && in_columns)
        dbias[c.batch * args.dbias.batch + c.head * args.dbias.head + (c.i + row) * args.dbias.row +
              (c.key + column) * args.dbias.column] = mask_narrow(value);
}

kernel void attention_dbias(constant mfa_metal_call &call [[buffer(0)]], device const storage *Q [[buffer(1)]],
                            device const storage *K [[buffer(2)]], device const storage *V [[buffer(3)]],
                            device const mask_storage *mask [[buffer(4)]], device const storage *dO [[buffer(7)]],
                            device mask_storage *dbias [[buffer(12)]], device float *partials [[buffer(15)]],
                            device const float *D [[buffer(16)]], device const float *L [[buffer(17)]],
                            threadgroup float2 *exchange TG_ARG(1), uint group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    long index = call.first + group, part = index % call.splits;
    corner own = corner_of(call, index / call.splits);
    mfa_metal_grid n = summed(args);
    long steps = n.batch * n.head * n.row * n.column;
    place at = place_of(lane);
    float2 sum[FRAGMENTS];
    clear<FRAGMENTS>(sum);
    for (long step = steps * part / call.splits; step < steps * (part + 1) / call.splits; step++) {
        corner c = own;
        c.key += step % n.column * BLOCK;
        c.i += step / n.column % n.row * BLOCK;
        c.head += step / n.column / n.row % n.head;
        c.batch += step / n.column / n.row / n.head;
        add_tile(sum, c, backward_operands{Q, K, V, dO, mask, nullptr, D, L}, call, simdgroup, at);
    }
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
    for (int f = 0; f < FRAGMENTS; f++) {
        for (int s = 1; s < BLOCK / 8 && args.dbias.row == 0; s++)
            sum[f] += exchange[((simdgroup + s) % (BLOCK / 8) * FRAGMENTS + f) * 32 + lane];
        long row = simdgroup * 8 + at.row, column = f * 8 + at.column;
        UNROLL
        for (int e = 0; e < 2; e++) {
            if (call.splits > 1)
                partials[(index * BLOCK + row) * BLOCK + column + e] = sum[f][e];
            else
                store_bias(dbias, args, own, row, column + e, sum[f][e]);
        }
    }
}

kernel void attention_dbias_sum(constant mfa_metal_call &call [[buffer(0)]], device mask_storage *dbias [[buffer(12)]],
                                device const float *partials [[buffer(15)]],
                                uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]])
{
    long number = call.first + group;
    corner own = corner_of(call, number);
    for (int element = int(index); element < BLOCK * BLOCK; element += 128) {
        float sum = 0.0f;
        for (long part = 0; part < call.splits; part++)
            sum += partials[(number * call.splits + part) * (BLOCK * BLOCK) + element];
        store_bias(dbias, call.args, own, element / BLOCK, element % BLOCK, sum);
    }
}
