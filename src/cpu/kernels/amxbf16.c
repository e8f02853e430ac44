/* The kernels for bf16 on x86-64 with AMX, beside those of avx512bf16.c. */
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define KERNEL_SET mfa_cpu_kernels_amxbf16
#include "cpu/kernels/simd/amxbf16.h"
#include "cpu/kernels/kernel_set.h"
#else
#include "cpu/kernels/contract.h"
const struct mfa_cpu_kernels mfa_cpu_kernels_amxbf16 = {.lanes = 0};
#endif
