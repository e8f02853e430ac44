/* The f64 kernels of scalar.c. */
#define REAL double
#define VECTOR_BYTES 16
#define KERNEL_SET mfa_cpu_kernels_scalar_f64
#include "cpu/kernels/simd/scalar.h"
#include "cpu/kernels/kernel_set.h"
