/* O = softmax(scale * Q K^T) V and L: each threadgroup has BLOCK_Q rows of queries and walks along their keys.
 *
 *     rows of a KV head: its queries, those of all heads of its group packed next to each other
 *     m, l, O = what the rows get from their range of keys       (forward.h)
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

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_forward(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
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
        if (call.splits > 1)
            store_split(acc, q, coord.column, call, sg, partials);
        else
            store_rows(acc, q, call, sg, forward_results{O, O_low, L, sinks});
    }
}
