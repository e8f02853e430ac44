/* The Metal backend. */
#ifndef MFA_METAL_BACKEND_H
#define MFA_METAL_BACKEND_H

#include "core/backend.h"

extern const struct mfa_backend mfa_metal_backend;

#endif
