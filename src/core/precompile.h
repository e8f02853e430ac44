/* Kernels compiled ahead of their first use, for a cache or to be shipped. */
#ifndef MFA_CORE_PRECOMPILE_H
#define MFA_CORE_PRECOMPILE_H

#include "core/context.h"
#include "mfa.h"

/* The body of mfa_precompile, and its statuses. */
mfa_status mfa_precompile_problem(mfa_context *context, const mfa_problem *problem, const char *folder,
                                  mfa_compiler compiler, void *argument);

#endif
