/* The same as attention_forward for few rows of queries, one block of 8: a decode step, where all heads that share K
 * and V fit into one block, and each tile of K and V is read once for all of them. There is next to nothing to
 * compute, so simdgroups take different keys of each tile:
 *
 *     m_g, l_g, O_g = what the rows get from the keys of group g of simdgroups       (forward.h)
 *     m = max of the m_g, l = sum of exp2(m_g - m) l_g, O = sum of exp2(m_g - m) O_g
 *     O = O / l, L = ln(2) * (m + log2(l))
 *
 * A call with more than one split cuts the range of keys: then m, l and O themselves are left for attention_merge. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/tile.h"
#include "metal/kernels/scores.h"
#include "metal/kernels/blocks.h"
#include "metal/kernels/forward.h"

/* Makes the sums of the first key group those of all. `memory` is that of the tiles, which nobody reads any more: m
 * and l of every simdgroup's lanes, then O of all but the first group. */
METAL_FUNC void merge_key_groups(thread sums &s, thread const seat &own, threadgroup float2 *memory)
{
    int simdgroup = own.key_group * SPLIT + own.slice, first = KEY_GROUPS * SPLIT;
    memory[simdgroup * 32 + own.lane] = float2{s.m, s.l};
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float m = NOTHING, l = 0.0f;
    for (int g = 0; g < KEY_GROUPS; g++)
        m = max(m, memory[(g * SPLIT + own.slice) * 32 + own.lane][0]);
    for (int g = 0; g < KEY_GROUPS; g++) {
        float2 other = memory[(g * SPLIT + own.slice) * 32 + own.lane];
        l += fast::exp2(other[0] - m) * other[1];
    }
    float alpha = fast::exp2(s.m - m);
    s.m = m;
    s.l = l;
    UNROLL
    for (int d = 0; d < E_FRAGMENTS; d++) {
        s.O[d] *= alpha;
        if (own.key_group > 0)
            memory[(first + (simdgroup - SPLIT) * E_FRAGMENTS + d) * 32 + own.lane] = s.O[d];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int g = 1; g < KEY_GROUPS && own.key_group == 0; g++) {
        UNROLL
        for (int d = 0; d < E_FRAGMENTS; d++)
            s.O[d] += memory[(first + ((g - 1) * SPLIT + own.slice) * E_FRAGMENTS + d) * 32 + own.lane];
    }
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_decode(constant mfa_metal_call &call [[buffer(0)]], device const storage *Q [[buffer(1)]],
                 device const storage *K [[buffer(2)]], device const storage *V [[buffer(3)]],
                 device const mask_storage *mask [[buffer(4)]], device storage *O [[buffer(5)]],
                 device uint *L [[buffer(6)]], device storage *O_low [[buffer(13)]],
                 device const uchar *classes [[buffer(14)]], device float *partials [[buffer(15)]],
#if defined(COUNT_TILES)
                 device uint *visited [[buffer(18)]],
#endif
                 threadgroup storage *tile TG_ARG(0), threadgroup float2 *exchange TG_ARG(1),
                 uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    seat own = seat_of(simdgroup, lane);
    mfa_metal_grid part = part_of(call, group);
    rows r = rows_of(call, part, own);
    sums s;
    int count = attend(s, r, forward_operands{Q, K, V, mask, classes}, call, own, tile, exchange, index);
#if defined(COUNT_TILES)
    if (index == 0)
        visited[call.first + group] = uint(count);
#else
    (void)count;
#endif
    if (KEY_GROUPS > 1)
        merge_key_groups(s, own, (threadgroup float2 *)tile);
    r.own.there = r.own.there && own.key_group == 0;
    if (call.splits > 1)
        store_partial(s, r, part, call, own, partials);
    else
        store_rows(s, r, call, own, O, O_low, L);
}
