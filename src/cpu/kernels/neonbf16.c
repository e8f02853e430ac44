/* The kernels for bf16, and those that multiply int8, on arm64 with FEAT_BF16 and FEAT_I8MM, beside those of neon.c. */
#if defined(__aarch64__) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define KERNEL_SET mfa_cpu_kernels_neonbf16
#include "cpu/kernels/simd/neonbf16.h"
#include "cpu/kernels/simd/neoni8mm.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_neonbf16 = {.lanes = 0};
#endif
