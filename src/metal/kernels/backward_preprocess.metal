/* What the backward pass needs of each row of queries, computed once for all its kernels:
 *
 *     D = rowsum(dO * O) - dL, O being O + O_low if that is given
 *     L as it is given, but so large for a row without keys that its P is 0
 *
 * A simdgroup has a row. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/fragment.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"
#include "metal/kernels/softmax.h"

kernel void backward_preprocess(constant mfa_metal_call &call [[buffer(0)]], device const out_storage *O [[buffer(10)]],
                                device const uint *L [[buffer(11)]], device const storage *dO [[buffer(12)]],
                                device const float *dL [[buffer(13)]], device const out_storage *O_low [[buffer(18)]],
                                device float *D [[buffer(3)]], device float *L_finite [[buffer(4)]],
                                uint group [[threadgroup_position_in_grid]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]],
                                uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    uint number = (uint(call.first_group) + group) * 4 + simdgroup;
    int columns = int(args.value_dim);
    numbered_query row = query_of_number(call, number, uint(args.q_heads), 1);
    bool valid = row.q.valid;
    long O_row = q_offset(row.seq, args.o, row.q.head, row.q.i);
    device const storage *dO_row = dO + q_offset(row.seq, args.d_o, row.q.head, row.q.i);
    float sum = 0.0f;
    for (int d = int(lane); valid && d < columns; d += 32)
        sum += widen(dO_row[d * args.d_o.column]) * widen_out(O[O_row + d * args.o.column]);
    for (int d = int(lane); valid && d < columns && (call.present >> MFA_METAL_BUFFER_O_LOW & 1); d += 32)
        sum += widen(dO_row[d * args.d_o.column]) * widen_out(O_low[O_row + d * args.o.column]);
    sum = simd_sum(sum);
    if (!valid || lane != 0)
        return;
    if (call.present >> MFA_METAL_BUFFER_DLSE & 1)
        sum -= dL[q_offset(row.seq, args.dlse, row.q.head, row.q.i)];
    D[number] = sum;
    L_finite[number] = finite_lse(L[q_offset(row.seq, args.lse, row.q.head, row.q.i)]);
}
