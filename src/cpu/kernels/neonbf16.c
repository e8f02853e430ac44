/* The kernels for bf16 on arm64 with FEAT_BF16, beside those of neon.c. */
#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define KERNEL_SET mfa_cpu_kernels_neonbf16
#include "cpu/kernels/simd/neonbf16.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_neonbf16 = {.lanes = 0};
#endif
