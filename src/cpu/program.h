/* How a kernel comes to be: the CPU's are compiled in, so this is a look into kernels.inc. */
#ifndef MFA_CPU_PROGRAM_H
#define MFA_CPU_PROGRAM_H

#include "cpu/device.h"
#include "cpu/kernels/contract.h"
#include "mfa.h"

/* 1 if all sets of that instruction set were built. */
int mfa_cpu_program_has(mfa_cpu_isa isa);

/* The instruction set, that one or one that it includes, whose kernels run this problem. */
mfa_cpu_isa mfa_cpu_program_isa(mfa_cpu_isa isa, const mfa_problem *problem);

/* The kernels of an instruction set that has some for tensors of that dtype. */
const struct mfa_cpu_kernels *mfa_cpu_program_find(mfa_cpu_isa isa, int32_t dtype);

#endif
