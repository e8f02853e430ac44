/* Kernels for x86-64 with AVX-512 F, DQ, BW and VL; an absent set where the compiler's flags lack them. */
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define KERNEL_SET mfa_cpu_kernels_avx512
#include "cpu/kernels/simd/avx512.h"
#include "cpu/kernels/simd/avx512int16.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_avx512 = {.lanes = 0};
#endif
