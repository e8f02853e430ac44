/* The f64 kernels of avx512.c. */
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REAL double
#define VECTOR_BYTES 64
#define KERNEL_SET mfa_cpu_kernels_avx512_f64
#include "cpu/kernels/simd/scalar.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_avx512_f64 = {.lanes = 0};
#endif
