/* Conversions between double and the element types of tensors. The 16-bit formats share one encoder and
 * one decoder, whose arguments are the numbers of exponent and fraction bits. */
#include "reference/element.h"

#include <math.h>
#include <string.h>

enum { F16_EXPONENT = 5, F16_FRACTION = 10, BF16_EXPONENT = 8, BF16_FRACTION = 7 };

static uint16_t encode(double value, int exponent_bits, int fraction_bits)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 63 << 15);
    int exponent = (int)(bits >> 52 & 0x7ff) - 1023;
    uint64_t fraction = bits & ((UINT64_C(1) << 52) - 1);
    uint32_t infinity = ((1U << exponent_bits) - 1) << fraction_bits;
    if (exponent == 1024)
        return (uint16_t)(sign | infinity | (fraction ? 1U << (fraction_bits - 1) : 0));

    /* A subnormal has the least exponent and no implicit bit: its shift grows as it shrinks. */
    int least = 2 - (1 << (exponent_bits - 1));
    int shift = 52 - fraction_bits + (exponent < least ? least - exponent : 0);
    if (shift > 54)
        return sign;
    uint64_t significand = fraction | UINT64_C(1) << 52;
    uint64_t kept = significand >> shift;
    uint64_t dropped = significand & ((UINT64_C(1) << shift) - 1);
    uint64_t half = UINT64_C(1) << (shift - 1);
    kept += dropped > half || (dropped == half && (kept & 1));
    /* The implicit bit, and a carry out of the fraction, add one to the exponent by themselves. */
    uint64_t magnitude = kept + ((uint64_t)(exponent > least ? exponent - least : 0) << fraction_bits);
    return (uint16_t)(sign | (magnitude > infinity ? infinity : magnitude));
}

static double decode(uint16_t bits, int exponent_bits, int fraction_bits)
{
    int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    uint64_t fraction = bits & ((UINT64_C(1) << fraction_bits) - 1);
    int least = 2 - (1 << (exponent_bits - 1));
    double magnitude;
    if (exponent == (1 << exponent_bits) - 1) {
        magnitude = fraction ? (double)NAN : (double)INFINITY;
    } else if (exponent == 0) {
        magnitude = ldexp((double)fraction, least - fraction_bits);
    } else {
        uint64_t wide = (uint64_t)(exponent - 1 + least + 1023) << 52 | fraction << (52 - fraction_bits);
        memcpy(&magnitude, &wide, sizeof magnitude);
    }
    return bits >> 15 ? -magnitude : magnitude;
}

size_t element_size(int32_t dtype)
{
    switch (dtype) {
    case ELEMENT_U64:
    case MFA_F64: return 8;
    case ELEMENT_I32:
    case MFA_F32: return 4;
    case MFA_F16:
    case MFA_BF16: return 2;
    default: return 1;
    }
}

/* The switch lies outside of the loops, which tests spend much of their time in. */
void element_load_row(int32_t dtype, const void *elements, int64_t index, int64_t stride, int64_t count, double *values)
{
#define LOAD_ROW(type, value)                                              \
    for (int64_t at = 0; at < count; at++) {                               \
        const type stored = ((const type *)elements)[index + at * stride]; \
        values[at] = value;                                                \
    }                                                                      \
    break
    switch (dtype) {
    case ELEMENT_U64: LOAD_ROW(uint64_t, (double)stored);
    case ELEMENT_I32: LOAD_ROW(int32_t, (double)stored);
    case ELEMENT_CODE: LOAD_ROW(uint8_t, (double)stored);
    case MFA_F64: LOAD_ROW(double, stored);
    case MFA_F32: LOAD_ROW(float, stored);
    case MFA_F16: LOAD_ROW(uint16_t, decode(stored, F16_EXPONENT, F16_FRACTION));
    case MFA_BF16: LOAD_ROW(uint16_t, decode(stored, BF16_EXPONENT, BF16_FRACTION));
    default: LOAD_ROW(uint8_t, stored != 0);
    }
#undef LOAD_ROW
}

void element_store_row(int32_t dtype, void *elements, int64_t index, int64_t stride, int64_t count,
                       const double *values)
{
#define STORE_ROW(type, value)                           \
    for (int64_t at = 0; at < count; at++)               \
        ((type *)elements)[index + at * stride] = value; \
    break
    switch (dtype) {
    case ELEMENT_U64: STORE_ROW(uint64_t, (uint64_t)values[at]);
    case ELEMENT_I32: STORE_ROW(int32_t, (int32_t)values[at]);
    case MFA_F64: STORE_ROW(double, values[at]);
    case MFA_F32: STORE_ROW(float, (float)values[at]);
    case MFA_F16: STORE_ROW(uint16_t, encode(values[at], F16_EXPONENT, F16_FRACTION));
    case MFA_BF16: STORE_ROW(uint16_t, encode(values[at], BF16_EXPONENT, BF16_FRACTION));
    default: STORE_ROW(uint8_t, (uint8_t)values[at]);
    }
#undef STORE_ROW
}

double element_load(int32_t dtype, const void *elements, int64_t index)
{
    double value;
    element_load_row(dtype, elements, index, 1, 1, &value);
    return value;
}

void element_store(int32_t dtype, void *elements, int64_t index, double value)
{
    element_store_row(dtype, elements, index, 1, 1, &value);
}

double element_round(int32_t dtype, double value)
{
    switch (dtype) {
    case ELEMENT_U64:
    case ELEMENT_I32:
    case ELEMENT_CODE:
    case MFA_F64: return value;
    case MFA_F32: return (float)value;
    case MFA_F16: return decode(encode(value, F16_EXPONENT, F16_FRACTION), F16_EXPONENT, F16_FRACTION);
    case MFA_BF16: return decode(encode(value, BF16_EXPONENT, BF16_FRACTION), BF16_EXPONENT, BF16_FRACTION);
    default: return value != 0;
    }
}

double element_ulp(int32_t dtype)
{
    switch (dtype) {
    case MFA_F64: return 0x1p-52;
    case MFA_F32: return 0x1p-23;
    case MFA_F16: return 0x1p-10;
    case MFA_BF16: return 0x1p-7;
    default: return 1;
    }
}

double element_least(int32_t dtype)
{
    switch (dtype) {
    case MFA_F64: return 0x1p-1074;
    case MFA_F32: return 0x1p-149;
    case MFA_F16: return 0x1p-24;
    case MFA_BF16: return 0x1p-133;
    default: return 1;
    }
}

const char *element_name(int32_t dtype)
{
    switch (dtype) {
    case ELEMENT_U64: return "u64";
    case ELEMENT_I32: return "i32";
    case ELEMENT_CODE: return "code";
    case MFA_F64: return "f64";
    case MFA_F32: return "f32";
    case MFA_F16: return "f16";
    case MFA_BF16: return "bf16";
    default: return "bool";
    }
}
