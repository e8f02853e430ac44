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
#include "metal/kernels/sequence.h"

kernel void block_mask(constant mfa_metal_call &call [[buffer(0)]], device const mask_storage *mask [[buffer(9)]],
                       device uchar *states [[buffer(1)]], uint group [[threadgroup_position_in_grid]],
                       uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    constant mfa_strides &strides = call.args.mask;
    long number = (call.first_group + group) * 4 + simdgroup, blocks = call.grid.row * call.grid.column;
    bool valid = number < call.grid.batch * call.grid.head * blocks;
    long row = valid ? number / call.grid.column % call.grid.row * call.block_q : 0;
    long key = valid ? number % call.grid.column * call.block_kv : 0;
    long head = valid ? number / blocks % call.grid.head * call.pack_gqa : 0;
    sequence seq = sequence_of(call, valid ? number / blocks / call.grid.head : 0);
    long rows = valid ? min(call.block_q, seq.q_len * call.pack_gqa - row) : 0;
    long keys = min(call.block_kv, seq.kv_len - key);
    bool any_shown = false, any_changed = false;
    for (long r = row; r < row + rows; r++) {
        device const mask_storage *from =
            mask + mask_offset(seq, strides, head + r % call.pack_gqa, r / call.pack_gqa, key);
        for (long t = lane; t < keys; t += 32) {
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
