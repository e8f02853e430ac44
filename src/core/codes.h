/* The codes of quantised K and V (enum mfa_kv_type in include/mfa.h), for kernels on any machine: plain constants, for
 * C and GPU languages. */
#ifndef MFA_CORE_CODES_H
#define MFA_CORE_CODES_H

#define MFA_KV_BLOCK 32 /* columns of a block of 4-bit codes: columns c and c + 16 share its byte c */

/* NF4: QLoRA (Dettmers et al., 2023), appendix E. */
/* clang-format off */
#define MFA_NF4_VALUES                                                                                     \
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,      \
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,       \
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,                \
    0.7229568362236023f, 1.0f
/* clang-format on */

#endif
