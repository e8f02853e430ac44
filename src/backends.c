/* The one list of the backends built into this library, best first. */
#include "core/backend.h"
#include "cpu/backend.h"
#include "metal/backend.h"

const struct mfa_backend *const mfa_backends[] = {&mfa_metal_backend, &mfa_cpu_backend, NULL};
