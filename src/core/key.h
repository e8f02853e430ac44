/* The name of one specialised kernel: what changes the code. A length is no part of it, except that few queries have a
 * variant of their own. Its text names cache files, and stands in logs, tests and benchmarks:
 *     <kernel>_<dtype>_d<head_dim>_q<block_q>_k<block_kv>[_<feature>...]_<machine>
 * <kernel> is forward, forward_int8, backward, decode or decode_backward: the pass and the variant. d96v64 where
 * value_dim differs from head_dim. */
#ifndef MFA_CORE_KEY_H
#define MFA_CORE_KEY_H

#include <stddef.h>
#include <stdint.h>

#include "mfa.h"

/* In the order in which a key's text names them. */
enum mfa_feature_bit {
#define FEATURE(name, ...) MFA_FEATURE_BIT_##name,
#include "core/options.inc"
};

enum mfa_feature {
#define FEATURE(name, ...) MFA_FEATURE_##name = 1 << MFA_FEATURE_BIT_##name,
#include "core/options.inc"
};

enum mfa_variant {
    MFA_VARIANT_TILED,         /* blocks of queries */
    MFA_VARIANT_DECODE,        /* few queries, as in a decode step */
    MFA_VARIANT_DECODE_VECTOR, /* one or two: lanes along the columns (Metal) */
    MFA_VARIANT_INT8           /* blocks of queries, products of int8 (CPU) */
};

struct mfa_key { /* no padding: compared and hashed as bytes */
    int32_t pass, variant, dtype, head_dim, value_dim, block_q, block_kv, features, mask_dtype, k_type, v_type;
    char machine[16];
};

#define MFA_KEY_TEXT 200 /* enough for any key's text and its end */

/* The set of enum mfa_feature that a canonical problem needs. */
int32_t mfa_key_features(const mfa_problem *problem);

/* The key's text; of a machine without an end, all 16 bytes. */
void mfa_key_print(const struct mfa_key *key, char text[MFA_KEY_TEXT]);

#endif
