/* What the backward pass needs to know of each row of queries, once for all its kernels:
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
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"

kernel void attention_rows(constant mfa_metal_call &call [[buffer(0)]], device const storage *O [[buffer(5)]],
                           device const uint *L [[buffer(6)]], device const storage *dO [[buffer(7)]],
                           device const float *dL [[buffer(8)]], device const storage *O_low [[buffer(13)]],
                           device float *D [[buffer(16)]], device float *L_finite [[buffer(17)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    long number = (call.first + group) * 4 + simdgroup;
    bool there = number < args.batch * args.q_heads * args.q_len;
    long i = there ? number % args.q_len : 0, head = there ? number / args.q_len % args.q_heads : 0;
    long batch = there ? number / args.q_len / args.q_heads : 0;
    long O_row = batch * args.o.batch + head * args.o.head + i * args.o.row;
    device const storage *dO_row = dO + batch * args.d_o.batch + head * args.d_o.head + i * args.d_o.row;
    float sum = 0.0f;
    for (long d = lane; there && d < args.value_dim; d += 32)
        sum += widen(dO_row[d * args.d_o.column]) * widen(O[O_row + d * args.o.column]);
    for (long d = lane; there && d < args.value_dim && (call.given >> MFA_METAL_BUFFER_O_LOW & 1); d += 32)
        sum += widen(dO_row[d * args.d_o.column]) * widen(O_low[O_row + d * args.o.column]);
    sum = simd_sum(sum);
    if (!there || lane != 0)
        return;
    if (call.given >> MFA_METAL_BUFFER_DLSE & 1)
        sum -= dL[batch * args.dlse.batch + head * args.dlse.head + i * args.dlse.row];
    uint bits = L[batch * args.lse.batch + head * args.lse.head + i * args.lse.row];
    D[number] = sum;
    L_finite[number] = bits == NEGATIVE_INFINITY ? UNSEEN : as_type<float>(bits);
}
