/* Kernels for arm64; an absent set elsewhere. */
#if defined(__aarch64__)
#define KERNEL_SET mfa_cpu_kernels_neon
#include "cpu/kernels/simd/neon.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_neon = {.lanes = 0};
#endif
