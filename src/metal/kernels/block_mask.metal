/* The block mask: what the mask leaves of each block of scores, so that no kernel visits a block that it excludes, nor
 * reads a mask where it changes nothing:
 *
 *     for each block of block_q rows x block_kv keys:
 *         state = EMPTY if the mask excludes every score, FULL if it changes none, else PARTIAL
 *
 * The table has one entry along dimensions on which the mask does not depend. A simdgroup has a block. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"

kernel void block_mask(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                       device const mask_storage *mask [[buffer(9)]], device uchar *states [[buffer(1)]],
                       uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_strides &strides = call.args.mask;
    uint number = (uint(call.first_group) + group) * 4 + simdgroup;
    grid_coord coord = grid_coord_of(call.grid, number);
    int block_q = int(call.block_q), block_kv = int(call.block_kv), pack = int(call.pack_gqa);
    bool valid = coord.batch < int(call.grid.batch);
    sequence seq = sequence_of(call, INDEX_OPERANDS, valid ? coord.batch : 0);
    int row = coord.row * block_q, key = coord.column * block_kv, head = coord.head * pack;
    int rows = valid ? min(block_q, seq.q_len * pack - row) : 0, keys = min(block_kv, seq.kv_len - key);
    bool any_shown = false, any_changed = false;
    for (int r = row; r < row + rows; r++) {
        device const mask_storage *from = mask + mask_offset(seq, strides, head + r % pack, r / pack, key);
        for (int t = int(lane); t < keys; t += 32) {
            mask_storage bits = from[t * strides.column];
            any_shown = any_shown || !masks_out(bits);
            any_changed = any_changed || changes_score(bits);
        }
    }
    any_shown = simd_any(any_shown);
    any_changed = simd_any(any_changed);
    if (valid && lane == 0)
        states[number] = !any_shown     ? MFA_METAL_BLOCK_EMPTY
                         : !any_changed ? MFA_METAL_BLOCK_FULL
                                        : MFA_METAL_BLOCK_PARTIAL;
}
