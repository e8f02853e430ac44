/* How a kernel set is run: the call that all tasks share, its workspace, and its phases. */
#ifndef MFA_CPU_LAUNCH_H
#define MFA_CPU_LAUNCH_H

#include "core/backend.h"
#include "cpu/kernels/contract.h"
#include "cpu/threads.h"

/* Fills in choice->shared and choice->per_thread, in bytes; the rest of the choice has been made by
 * mfa_cpu_tiles_choose. */
void mfa_cpu_launch_measure(const struct mfa_cpu_kernels *kernels, const mfa_problem *problem,
                            struct mfa_choice *choice);

/* Runs the problem on at most `workers` threads, themselves at most choice->threads. `workspace` has choice->shared +
 * choice->threads * choice->per_thread bytes, 64-byte aligned. MFA_INVALID: a tensor that says the lengths of sequences
 * has a wrong number; then nothing has been written. */
mfa_status mfa_cpu_launch(mfa_cpu_threads *threads, int workers, const struct mfa_cpu_kernels *kernels,
                          const mfa_problem *problem, const struct mfa_choice *choice, const mfa_buffers *buffers,
                          void *workspace);

#endif
