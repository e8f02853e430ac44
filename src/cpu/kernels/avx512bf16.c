/* The kernels for bf16, and those that multiply int8, on x86-64 with AVX512_BF16 and AVX512_VNNI, beside those of
 * avx512.c. */
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define KERNEL_SET mfa_cpu_kernels_avx512bf16
#include "cpu/kernels/simd/avx512bf16.h"
#include "cpu/kernels/simd/avx512vnni.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_avx512bf16 = {.lanes = 0};
#endif
