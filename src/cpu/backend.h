/* The CPU backend. */
#ifndef MFA_CPU_BACKEND_H
#define MFA_CPU_BACKEND_H

#include "core/backend.h"

extern const struct mfa_backend mfa_cpu_backend;

#endif
