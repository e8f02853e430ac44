/* What rows get that belong to no sequence, where lengths differ:
 *
 *     unused_queries: packed queries before the first sequence and after the last
 *         O = 0, L = -inf, or with sinks that of the first batch entry;   in the backward pass dQ = 0
 *     unused_keys: keys of an entry that do not count, and packed keys before the first sequence and after the last
 *         dK = 0, dV = 0
 *
 * How many there are is known here only, so a few threadgroups take all of them in turn, a simdgroup a row. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/fragment.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"
#include "metal/kernels/softmax.h"
#include "metal/kernels/sinks.h"

#define ROWS_OF_GROUP 4 /* simdgroups */

/* The rows of [begin, end) that are not among those from `first` on up to `last`: how many, and number n of them. */
struct rows_around {
    int begin, first, last, end;
};

METAL_FUNC int count_of(thread const rows_around &r)
{
    return r.first - r.begin + r.end - r.last;
}

METAL_FUNC int row_of(thread const rows_around &r, int n)
{
    return n < r.first - r.begin ? r.begin + n : r.last + n - (r.first - r.begin);
}

/* The rows of a packed tensor in no sequence. */
METAL_FUNC rows_around rows_around_all(device const int *cu_seqlens, constant mfa_strides &s, int batch, int total)
{
    int first = clamp_index(index_of(cu_seqlens, s, 0), 0, total);
    return rows_around{0, first, clamp_index(index_of(cu_seqlens, s, batch), first, total), total};
}

METAL_FUNC void clear_row(device out_storage *row, long step, mfa_int columns, uint lane)
{
    for (int d = int(lane); d < int(columns); d += 32)
        row[d * step] = out_storage(0);
}

#if defined(KERNEL_unused_queries)
kernel void unused_queries(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                           device out_storage *O [[buffer(10)]], device uint *L [[buffer(11)]],
                           device out_storage *dQ [[buffer(14)]], device out_storage *O_low [[buffer(18)]],
                           device const float *sinks [[buffer(20)]], uint group [[threadgroup_position_in_grid]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    index_operands in = INDEX_OPERANDS;
    grid_coord own = threadgroup_coord(call, group);
    rows_around rows = rows_around_all(in.cu_seqlens_q, args.cu_seqlens_q, int(args.batch), int(args.total_q));
    sequence seq; /* all packed rows */
    seq.batch = seq.q_batch = 0, seq.q_row = 0;
#if defined(SINKS)
    uint none = as_type<uint>(sinks[head_offset(seq, args.sinks, own.head)]); /* as it is given */
#else
    uint none = log_sum_exp(softmax_init().m, softmax_init().l);
#endif
    for (int n = own.row * ROWS_OF_GROUP + int(simdgroup); n < count_of(rows);
         n += int(call.grid.row) * ROWS_OF_GROUP) {
        int i = row_of(rows, n);
        if (call.present >> MFA_METAL_BUFFER_O & 1)
            clear_row(O + q_offset(seq, args.o, own.head, i), args.o.column, args.value_dim, lane);
        if (call.present >> MFA_METAL_BUFFER_O_LOW & 1)
            clear_row(O_low + q_offset(seq, args.o, own.head, i), args.o.column, args.value_dim, lane);
        if ((call.present >> MFA_METAL_BUFFER_LSE & 1) && lane == 0)
            L[q_offset(seq, args.lse, own.head, i)] = none;
        if (call.present >> MFA_METAL_BUFFER_DQ & 1)
            clear_row(dQ + q_offset(seq, args.dq, own.head, i), args.dq.column, args.head_dim, lane);
    }
}
#endif

#if defined(KERNEL_unused_keys)
kernel void unused_keys(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                        device out_storage *dK [[buffer(15)]], device out_storage *dV [[buffer(16)]],
                        uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    index_operands in = INDEX_OPERANDS;
    grid_coord own = threadgroup_coord(call, group);
    sequence seq;
    rows_around rows;
    int batch = own.batch + (args.has_seqused_k || args.has_leftpad_k ? 0 : int(args.batch));
    if (batch < int(args.batch)) {
        seq = all_keys_of(call, in, batch);
        int begin = seq.kv_row, end = begin + seq.kv_len;
        seq = sequence_of(call, in, batch);
        rows = rows_around{begin, seq.kv_row, seq.kv_row + seq.kv_len, end};
    } else { /* of packed keys, as the one entry that they are in memory */
        seq.kv_batch = 0;
        rows = rows_around_all(in.cu_seqlens_k, args.cu_seqlens_k, int(args.batch), int(args.total_kv));
    }
    seq.kv_row = 0;
    for (int n = own.row * ROWS_OF_GROUP + int(simdgroup); n < count_of(rows);
         n += int(call.grid.row) * ROWS_OF_GROUP) {
        int j = row_of(rows, n);
        if (call.present >> MFA_METAL_BUFFER_DK & 1)
            clear_row(dK + kv_offset(seq, args.dk, own.head, j), args.dk.column, args.head_dim, lane);
        if (call.present >> MFA_METAL_BUFFER_DV & 1)
            clear_row(dV + kv_offset(seq, args.dv, own.head, j), args.dv.column, args.value_dim, lane);
    }
}
#endif
