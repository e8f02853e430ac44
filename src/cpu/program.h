/* How a kernel comes to be: the CPU's are compiled in, so this is a look into kernels.inc. */
#ifndef MFA_CPU_PROGRAM_H
#define MFA_CPU_PROGRAM_H

#include "cpu/device.h"
#include "cpu/kernels/contract.h"
#include "mfa.h"

/* 1 if both sets of that instruction set were built, for f32 and for f64. */
int mfa_cpu_program_has(mfa_cpu_isa isa);

/* The kernel set for tensors of that dtype; NULL if it was not built. */
const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype);

#endif
