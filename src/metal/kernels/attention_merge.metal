/* Puts together the partial results that attention_forward and attention_decode leave of each row:
 *
 *     m = max of the m_p over the parts p
 *     l = sum of exp2(m_p - m) l_p
 *     O = sum of exp2(m_p - m) O_p, divided by l;   L = ln(2) * (m + log2(l))
 *
 * A simdgroup has a row. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"

kernel void attention_merge(constant mfa_metal_call &call [[buffer(0)]], device storage *O [[buffer(5)]],
                            device uint *L [[buffer(6)]], device storage *O_low [[buffer(13)]],
                            device const float *partials [[buffer(15)]], uint group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    long rows = args.q_len * call.fold, number = (call.first + group) * 4 + simdgroup;
    bool there = number < args.batch * args.kv_heads * rows;
    long row = there ? number % rows : 0, kv_head = there ? number / rows % args.kv_heads : 0;
    long batch = there ? number / rows / args.kv_heads : 0, step = args.value_dim + 2;
    long head = kv_head * call.fold + row % call.fold, i = row / call.fold;
    device const float *parts = partials + (there ? number : 0) * call.splits * step;

    float m = NOTHING;
    for (long p = lane; p < call.splits; p += 32)
        m = max(m, parts[p * step]);
    m = simd_max(m);
    float l = 0.0f;
    for (long p = lane; p < call.splits; p += 32)
        l += fast::exp2(parts[p * step] - m) * parts[p * step + 1];
    l = simd_sum(l);
    float inverse = l != 0.0f ? 1.0f / l : 0.0f;

    long O_row = batch * args.o.batch + head * args.o.head + i * args.o.row;
    for (long d = lane; there && d < args.value_dim; d += 32) {
        float sum = 0.0f;
        for (long p = 0; p < call.splits; p++)
            sum += fast::exp2(parts[p * step] - m) * parts[p * step + 2 + d];
        O[O_row + d * args.o.column] = narrow(sum * inverse);
        if (call.given >> MFA_METAL_BUFFER_O_LOW & 1)
            O_low[O_row + d * args.o.column] = narrow_rest(sum * inverse);
    }
    if (there && lane == 0 && (call.given >> MFA_METAL_BUFFER_LSE & 1))
        L[batch * args.lse.batch + head * args.lse.head + i * args.lse.row] = log_sum_exp(m, l);
}
