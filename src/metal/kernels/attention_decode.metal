/* The same as attention_forward for few rows of queries, one block of 8: a decode step, where all heads that share K
 * and V fit into one block, and each tile of K and V is read once for all of them. There is next to nothing to
 * compute, so simdgroups take different keys of each tile:
 *
 *     m_g, l_g, O_g = what the rows get from the keys of group g of simdgroups       (forward.h)
 *     m = max of the m_g, l = sum of exp2(m_g - m) l_g, O = sum of exp2(m_g - m) O_g
 *     O = O / l, L = ln(2) * (m + log2(l))
 *
 * A call with more than one split cuts the range of keys: then m, l and O themselves are stored for attention_merge. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
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
#include "metal/kernels/sinks.h"
#include "metal/kernels/block_range.h"
#include "metal/kernels/dropout.h"
#include "metal/kernels/forward.h"

static_assert(LANE_ROWS == 1, "decode has one block of 8 rows");

/* Merges the sums of all key groups into those of the first. `memory` is that of the tiles, which are not read any
 * more: m and l of every simdgroup's lanes, then O of all but the first group. */
METAL_FUNC void merge_key_groups(thread accumulator &acc, thread const simdgroup_coord &sg, threadgroup float2 *memory)
{
    int simdgroup = sg.key_group * SPLIT + sg.slice, first = KEY_GROUPS * SPLIT;
    memory[simdgroup * 32 + sg.lane] = float2{acc.state[0].m, acc.state[0].l};
    threadgroup_barrier(mem_flags::mem_threadgroup);
    softmax_state all = softmax_init();
    for (int g = 0; g < KEY_GROUPS; g++)
        all.m = max(all.m, memory[(g * SPLIT + sg.slice) * 32 + sg.lane][0]);
    for (int g = 0; g < KEY_GROUPS; g++) {
        float2 other = memory[(g * SPLIT + sg.slice) * 32 + sg.lane];
        all.l += softmax_rescale(other[0], all.m) * other[1];
    }
    float alpha = softmax_rescale(acc.state[0].m, all.m);
    acc.state[0] = all;
    UNROLL
    for (int d = 0; d < E_FRAGMENTS; d++) {
        acc.O[d] *= alpha;
        if (sg.key_group > 0)
            memory[(first + (simdgroup - SPLIT) * E_FRAGMENTS + d) * 32 + sg.lane] = acc.O[d];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int g = 1; g < KEY_GROUPS && sg.key_group == 0; g++) {
        UNROLL
        for (int d = 0; d < E_FRAGMENTS; d++)
            acc.O[d] += memory[(first + ((g - 1) * SPLIT + sg.slice) * E_FRAGMENTS + d) * 32 + sg.lane];
    }
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_decode(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                 device const storage *Q [[buffer(6)]] KV_BUFFERS, SCORE_BUFFERS, device out_storage *O [[buffer(10)]],
                 device uint *L [[buffer(11)]], device out_storage *O_low [[buffer(18)]],
                 device const float *sinks [[buffer(20)]], device float *partials [[buffer(2)]],
#if defined(COUNT_TILES)
                 device uint *visited [[buffer(5)]],
#endif
                 uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(tile_element, tile, TILE_BYTES / sizeof(tile_element));
    THREADGROUP_ARRAY(float2, exchange, EXCHANGE_BYTES / sizeof(float2));
    simdgroup_coord sg = simdgroup_coord_of(index, simdgroup, lane);
    grid_coord coord = threadgroup_coord(call, group);
    q_block q = q_block_of(call, INDEX_OPERANDS, coord, sg);
    if (!is_past_end(call, q)) {
        accumulator acc;
        int count = attend(acc, q, forward_operands{Q, KV_OPERANDS, SCORE_OPERANDS}, call, sg,
                           threadgroup_memory{tile, exchange});
#if defined(COUNT_TILES)
        if (index == 0)
            visited[call.first_group + group] = uint(count);
#else
        (void)count;
#endif
        if (KEY_GROUPS > 1)
            merge_key_groups(acc, sg, (threadgroup float2 *)tile);
        q.own[0].valid = q.own[0].valid && sg.key_group == 0;
        if (call.splits > 1)
            store_split(acc, q, coord.column, call, sg, partials);
        else
            store_rows(acc, q, call, sg, forward_results{O, O_low, L, sinks});
    }
}
