/* Kernels for any machine. */
#define KERNEL_SET mfa_cpu_kernels_scalar
#include "cpu/kernels/simd/scalar.h"
#include "cpu/kernels/kernel_set.h"
