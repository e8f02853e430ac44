/* A kernel's key: the features that a problem needs, and the key's text. */
#include "core/key.h"

#include <stdio.h>

#include "core/problem.h"

int32_t mfa_key_features(const mfa_problem *p)
{
    int32_t features = 0;
    if (p->lower > 1 - p->q_len || p->upper < p->kv_len - 1)
        features |= MFA_FEATURE_BAND;
    if (p->mask == MFA_MASK_BOOL)
        features |= MFA_FEATURE_MASK_BOOL;
    if (p->mask == MFA_MASK_ADDITIVE)
        features |= MFA_FEATURE_MASK_ADDITIVE;
    if (p->softcap > 0)
        features |= MFA_FEATURE_SOFTCAP;
    return features;
}

static const char *kernel_word(const struct mfa_key *key)
{
    if (key->variant == MFA_VARIANT_DECODE)
        return key->pass == MFA_BACKWARD ? "decode_backward" : "decode";
    return mfa_pass_name(key->pass);
}

void mfa_key_print(const struct mfa_key *key, char text[MFA_KEY_TEXT])
{
    char value_dim[16] = "";
    if (key->value_dim != key->head_dim)
        snprintf(value_dim, sizeof value_dim, "v%d", key->value_dim);
    const int additive = key->features & MFA_FEATURE_MASK_ADDITIVE;
    snprintf(text, MFA_KEY_TEXT, "%s_%s_d%d%s_q%d_k%d%s%s%s%s%s_%.*s", kernel_word(key),
             mfa_dtype_name(key->dtype), key->head_dim, value_dim, key->block_q, key->block_kv,
             key->features & MFA_FEATURE_BAND ? "_band" : "", key->features & MFA_FEATURE_MASK_BOOL ? "_mask_bool" : "",
             additive ? "_mask_" : "", additive ? mfa_dtype_name(key->mask_dtype) : "",
             key->features & MFA_FEATURE_SOFTCAP ? "_softcap" : "", (int)sizeof key->machine, key->machine);
}
