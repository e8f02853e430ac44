/* The arguments of every attention kernel, on any machine: plain numbers, no pointers. C, MSL and CUDA compile this
 * header, so it uses nothing but structs of 8-byte integers and 4-byte floats. Sizes and strides are in elements. */
#ifndef MFA_CORE_ARGS_H
#define MFA_CORE_ARGS_H

#if defined(__METAL_VERSION__)
typedef long mfa_int;
#else
#include <stdint.h>
typedef int64_t mfa_int;
#endif

struct mfa_strides { /* in elements */
    mfa_int batch, head, row, column;
};

struct mfa_args {
    mfa_int batch, q_heads, kv_heads, q_heads_per_kv;
    mfa_int q_len, kv_len, head_dim, value_dim;
    mfa_int lower, upper;              /* the band, brought within [-q_len, kv_len]; with bottom_right, twice that */
    mfa_int drop_below;                /* dropout: 16 random bits below it drop a P; 0 to 2^16 */
    mfa_int block_map_q, block_map_kv; /* queries and keys of a block of the map; 0: no map */
    mfa_int varlen_q, varlen_kv, bottom_right; /* 0 or 1, as in mfa_problem */
    mfa_int has_seqused_k, has_leftpad_k, has_cache_batch_idx;
    mfa_int total_q, total_kv, kv_batch, page_size;
    mfa_int k_group, v_group; /* columns that share a scale; 0: all */
#define INPUT(name, ...) struct mfa_strides name;
#define RESULT(name, ...) struct mfa_strides name;
#include "core/operands.inc"
    float scale, softcap;
    float keep_scale; /* dropout: what the P that are kept are multiplied by */
};

#endif
