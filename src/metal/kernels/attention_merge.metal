/* Merges the partial results that attention_forward and the kernels of decode store for each row; a sink enters here:
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
#include "metal/kernels/fragment.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"
#include "metal/kernels/softmax.h"
#include "metal/kernels/sinks.h"

kernel void attention_merge(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                            device out_storage *O [[buffer(10)]], device uint *L [[buffer(11)]],
                            device out_storage *O_low [[buffer(18)]], device const float *sinks [[buffer(20)]],
                            device const float *partials [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    uint number = (uint(call.first_group) + group) * 4 + simdgroup;
    int splits = int(call.splits), columns = int(args.value_dim);
    long step = columns + 2;
    numbered_query row = query_of_number(call, number, uint(args.kv_heads), uint(call.pack_gqa));
    bool valid = row.q.valid;
#if defined(VARLEN)
    if (call.args.varlen_q && valid) {
        int batch = entry_of_query(call, INDEX_OPERANDS, row.q.i);
        valid = batch >= 0;
        row.seq.batch = valid ? batch : 0;
    }
#endif
    device const float *parts = partials + (valid ? number : 0) * (splits * step);

    softmax_state s = softmax_init();
    for (int p = int(lane); valid && p < splits; p += 32)
        s.m = max(s.m, parts[p * step]);
    s.m = simd_max(s.m);
    for (int p = int(lane); valid && p < splits; p += 32)
        s.l += softmax_rescale(parts[p * step], s.m) * parts[p * step + 1];
    s.l = simd_sum(s.l);
    softmax_state end = s;
    float inverse = softmax_end(end, sinks, args, row.seq, row.q.head);

    long O_row = q_offset(row.seq, args.o, row.q.head, row.q.i);
    for (int d = int(lane); valid && d < columns; d += 32) {
        float sum = 0.0f;
        for (int p = 0; p < splits; p++)
            sum += softmax_rescale(parts[p * step], s.m) * parts[p * step + 2 + d];
        O[O_row + d * args.o.column] = narrow_out(sum * inverse);
        if (call.present >> MFA_METAL_BUFFER_O_LOW & 1)
            O_low[O_row + d * args.o.column] = narrow_rest(sum * inverse);
    }
    if (valid && lane == 0 && (call.present >> MFA_METAL_BUFFER_LSE & 1))
        L[q_offset(row.seq, args.lse, row.q.head, row.q.i)] = log_sum_exp(end.m, end.l);
}
