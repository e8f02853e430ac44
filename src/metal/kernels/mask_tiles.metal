/* What a mask does to each tile of scores, so that no kernel visits a tile that it hides, nor reads a mask where it
 * changes nothing:
 *
 *     for each tile of BLOCK_Q rows x BLOCK_KV keys:
 *         class = hidden if the mask hides every element, clear if it changes none, else mixed
 *
 * The table has one entry along dimensions on which the mask does not depend. A simdgroup has a tile. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"

kernel void mask_tiles(constant mfa_metal_call &call [[buffer(0)]], device const mask_storage *mask [[buffer(4)]],
                       device uchar *classes [[buffer(14)]], uint group [[threadgroup_position_in_grid]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_args &args = call.args;
    long number = (call.first + group) * 4 + simdgroup, tiles = call.grid.row * call.grid.column;
    bool there = number < call.grid.batch * call.grid.head * tiles;
    long row = there ? number / call.grid.column % call.grid.row * call.block_q : 0;
    long key = there ? number % call.grid.column * call.block_kv : 0;
    long head = there ? number / tiles % call.grid.head * call.fold : 0;
    long batch = there ? number / tiles / call.grid.head : 0;
    long rows = there ? min(call.block_q, args.q_len * call.fold - row) : 0;
    long keys = min(call.block_kv, args.kv_len - key);
    bool shown = false, changed = false;
    for (long r = row; r < row + rows; r++) {
        device const mask_storage *from = mask + batch * args.mask.batch + (head + r % call.fold) * args.mask.head +
                                          r / call.fold * args.mask.row + key * args.mask.column;
        for (long t = lane; t < keys; t += 32) {
            mask_storage bits = from[t * args.mask.column];
            shown = shown || !mask_hides(bits);
            changed = changed || mask_changes(bits);
        }
    }
    shown = simd_any(shown);
    changed = simd_any(changed);
    if (there && lane == 0)
        classes[number] = shown ? changed ? MFA_METAL_TILE_MIXED : MFA_METAL_TILE_CLEAR : MFA_METAL_TILE_HIDDEN;
}
