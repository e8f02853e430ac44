/* The f64 kernels of avx2.c. */
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define REAL double
#define VECTOR_BYTES 32
#define KERNEL_SET mfa_cpu_kernels_avx2_f64
#include "cpu/kernels/simd/scalar.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_avx2_f64 = {.lanes = 0};
#endif
