/* Finds a kernel set: those of the CPU are compiled in, and kernels.inc lists them. */
#ifndef MFA_CPU_PROGRAM_H
#define MFA_CPU_PROGRAM_H

#include "cpu/device.h"
#include "cpu/kernels/contract.h"
#include "mfa.h"

/* 1 if all sets of that instruction set were built. */
int mfa_cpu_program_has(mfa_cpu_isa isa);

/* The instruction set whose kernels run this problem: `isa`, or one that it includes. */
mfa_cpu_isa mfa_cpu_program_isa(mfa_cpu_isa isa, const mfa_problem *problem);

/* The same where products are of int8; MFA_CPU_ISA_COUNT: the problem does not permit them, or no set has them. */
mfa_cpu_isa mfa_cpu_program_int8(mfa_cpu_isa isa, const mfa_problem *problem);

/* The kernel set for tensors of that dtype and for a variant (enum mfa_variant), of an instruction set that
 * mfa_cpu_program_isa has returned for it, or mfa_cpu_program_int8 for MFA_VARIANT_INT8. */
const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype, int32_t variant);

#endif
