/* The f64 kernels of neon.c. */
#if defined(__aarch64__)
#define REAL double
#define VECTOR_BYTES 16
#define KERNEL_SET mfa_cpu_kernels_neon_f64
#include "cpu/kernels/simd/scalar.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_neon_f64 = {.lanes = 0};
#endif
