/* Kernels for x86-64 with AVX2, FMA and F16C; an absent set where the compiler's flags lack them. */
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KERNEL_SET mfa_cpu_kernels_avx2
#include "cpu/kernels/simd/avx2.h"
#include "cpu/kernels/simd/avx2int16.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_avx2 = {.lanes = 0};
#endif
