/* Which instruction sets this CPU and its operating system have. */
#ifndef MFA_CPU_DEVICE_H
#define MFA_CPU_DEVICE_H

#include "mfa.h"

/* In the order of isas.inc: MFA_CPU_SCALAR, MFA_CPU_AVX2 and so on. */
typedef enum mfa_cpu_isa {
#define ISA(constant, name, needs) MFA_CPU_##constant,
#include "cpu/isas.inc"
#undef ISA
    MFA_CPU_ISA_COUNT
} mfa_cpu_isa;

/* "scalar", "avx2" and so on; NULL: there is no instruction set of that number. */
const char *mfa_cpu_isa_name(int isa);

/* The instruction set of that name; MFA_CPU_ISA_COUNT if there is none. */
mfa_cpu_isa mfa_cpu_isa_named(const char *name);

/* 1 if this CPU and its operating system have what the instruction set needs, else 0. */
int mfa_cpu_isa_present(mfa_cpu_isa isa);

/* The best one present; or the one named in `cap` (NULL: the environment's MFA_ISA, if set).
 * MFA_INVALID: there is no such name. MFA_UNAVAILABLE: this machine does not have it. */
mfa_status mfa_cpu_isa_choose(const char *cap, mfa_cpu_isa *isa);

#endif
