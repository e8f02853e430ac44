/* Kernels for any machine. */
#define KERNEL_SET mfa_cpu_kernels_scalar
#include "cpu/kernels/simd_scalar.h"
#include "cpu/kernels/attention.h"
