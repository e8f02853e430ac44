/* Elements of tensors, read and written through double: the four dtypes of the library, the bytes of a bool mask and
 * the integers of seeds and of lengths. The conversions are our own and round to nearest, ties to even, in one step. */
#ifndef REFERENCE_ELEMENT_H
#define REFERENCE_ELEMENT_H

#include <stddef.h>
#include <stdint.h>

#include "mfa.h"

/* Beside the mfa_dtypes: a byte, nonzero is true; a 64-bit integer below 2^53; a 32-bit integer; a byte of codes. */
#define ELEMENT_BOOL 64
#define ELEMENT_U64 65
#define ELEMENT_I32 66
#define ELEMENT_CODE 67

size_t element_size(int32_t dtype);
double element_load(int32_t dtype, const void *elements, int64_t index);
void element_store(int32_t dtype, void *elements, int64_t index, double value);

/* `count` of them, from `index` on, `stride` apart. */
void element_load_row(int32_t dtype, const void *elements, int64_t index, int64_t stride, int64_t count,
                      double *values);
void element_store_row(int32_t dtype, void *elements, int64_t index, int64_t stride, int64_t count,
                       const double *values);

/* `value` as the dtype holds it. */
double element_round(int32_t dtype, double value);

/* The distance from 1 to the next larger number of the dtype. */
double element_ulp(int32_t dtype);

/* The least number of the dtype above 0. */
double element_least(int32_t dtype);

/* "f32" and so on; "bool", "u64", "i32", "code". */
const char *element_name(int32_t dtype);

#endif
