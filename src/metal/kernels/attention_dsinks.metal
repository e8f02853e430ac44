/* dsink = -sum of exp(sink - L) * D over the queries of a head, and over the dimensions along which dsinks has
 * stride 0:
 *
 *     each threadgroup has an element of dsinks
 *         each thread sums its share of the rows; the sums of all threads are added, in order
 */
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

#define SIMDGROUPS 4

kernel void attention_dsinks(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                             device const float *sinks [[buffer(20)]], device float *dsinks [[buffer(21)]],
                             device const float *D [[buffer(3)]], device const float *L [[buffer(4)]],
                             uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                             uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(float, exchange, SIMDGROUPS);
    constant mfa_args &args = call.args;
    grid_coord own = threadgroup_coord(call, group);
    uint batches = args.dsinks.batch == 0 ? uint(args.batch) : 1;
    uint heads = args.dsinks.head == 0 ? uint(args.q_heads) : 1;
    float sum = 0.0f;
    for (uint b = 0; b < batches; b++) {
        sequence seq = sequence_of(call, INDEX_OPERANDS, own.batch + int(b));
        for (uint h = 0; h < heads; h++) {
            int head = own.head + int(h);
            float sink = sinks[head_offset(seq, args.sinks, head)];
            long first = row_stats_index(seq, args, head, 0);
            for (int i = int(index); i < seq.q_len; i += SIMDGROUPS * 32)
                sum -= sink_probability(sink, L[first + i]) * D[first + i];
        }
    }
    sum = simd_sum(sum);
    if (lane == 0)
        exchange[simdgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (index != 0)
        return;
    for (int s = 1; s < SIMDGROUPS; s++)
        sum += exchange[s];
    dsinks[own.batch * args.dsinks.batch + own.head * args.dsinks.head] = sum;
}
