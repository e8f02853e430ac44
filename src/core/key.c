/* A kernel's key: the features that a problem needs, and the key's text. */
#include "core/key.h"

#include <stdio.h>
#include <string.h>

#include "core/problem.h"

int32_t mfa_key_features(const mfa_problem *p)
{
    int32_t features = 0;
#define FEATURE(name, text, needed) features |= (needed) ? MFA_FEATURE_##name : 0;
#include "core/options.inc"
    return features;
}

static const char *kernel_word(const struct mfa_key *key)
{
    if (key->variant == MFA_VARIANT_DECODE)
        return key->pass == MFA_BACKWARD ? "decode_backward" : "decode";
    if (key->variant == MFA_VARIANT_INT8)
        return "forward_int8";
    return key->variant == MFA_VARIANT_DECODE_VECTOR ? "decode_vector" : mfa_pass_name(key->pass);
}

/* The features' parts of a key's text. */
static void print_features(const struct mfa_key *key, char text[MFA_KEY_TEXT])
{
    static const char *const parts[] = {
#define FEATURE(name, text, needed) text,
#include "core/options.inc"
    };
    size_t length = 0;
    text[0] = '\0';
    for (int n = 0; n < (int)(sizeof parts / sizeof *parts); n++)
        if (key->features & 1 << n)
            length += (size_t)snprintf(text + length, MFA_KEY_TEXT - length, "%s%s", parts[n],
                                       1 << n == MFA_FEATURE_MASK_ADDITIVE ? mfa_dtype_name(key->mask_dtype) : "");
}

static void print_kv_types(const struct mfa_key *key, char text[MFA_KEY_TEXT])
{
    const size_t length = strlen(text);
    snprintf(text + length, MFA_KEY_TEXT - length, "%s%s%s%s", key->k_type ? "_k_" : "",
             key->k_type ? mfa_kv_type_name(key->k_type) : "", key->v_type ? "_v_" : "",
             key->v_type ? mfa_kv_type_name(key->v_type) : "");
}

void mfa_key_print(const struct mfa_key *key, char text[MFA_KEY_TEXT])
{
    char value_dim[16] = "", features[MFA_KEY_TEXT];
    if (key->value_dim != key->head_dim)
        snprintf(value_dim, sizeof value_dim, "v%d", key->value_dim);
    print_features(key, features);
    print_kv_types(key, features);
    snprintf(text, MFA_KEY_TEXT, "%s_%s_d%d%s_q%d_k%d%s_%.*s", kernel_word(key), mfa_dtype_name(key->dtype),
             key->head_dim, value_dim, key->block_q, key->block_kv, features, (int)sizeof key->machine, key->machine);
}
