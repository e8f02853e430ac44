/* Which instruction sets this CPU and its operating system offer. */
#ifndef MFA_CPU_DEVICE_H
#define MFA_CPU_DEVICE_H

#include "mfa.h"

/* Ordered: a machine that has one has all before it of its family. */
typedef enum mfa_cpu_isa {
    MFA_CPU_SCALAR,
    MFA_CPU_AVX2,
    MFA_CPU_AVX512,
    MFA_CPU_AVX512BF16,
    MFA_CPU_AMXBF16,
    MFA_CPU_NEON,
    MFA_CPU_NEONBF16,
    MFA_CPU_ISA_COUNT
} mfa_cpu_isa;

/* "scalar", "avx2", "avx512", "avx512bf16", "amxbf16", "neon", "neonbf16". */
const char *mfa_cpu_isa_name(mfa_cpu_isa isa);

/* The instruction set of that name; MFA_CPU_ISA_COUNT if there is none. */
mfa_cpu_isa mfa_cpu_isa_named(const char *name);

/* 1 if this machine runs it (AVX2 means AVX2, FMA and F16C; AVX-512 means F, DQ, BW and VL; avx512bf16 has BF16 beside
 * these, and amxbf16 tile registers; neonbf16 means FEAT_BF16), else 0. */
int mfa_cpu_isa_present(mfa_cpu_isa isa);

/* The best one present; or the one named in `mask` (NULL: the environment's MFA_ISA, if set).
 * MFA_INVALID: no such name. MFA_UNAVAILABLE: this machine does not have it. */
mfa_status mfa_cpu_isa_choose(const char *mask, mfa_cpu_isa *isa);

#endif
