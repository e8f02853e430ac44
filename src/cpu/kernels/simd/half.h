/* f16 and bf16 as bits, one element at a time: for strided rows, and for machines without conversion
 * instructions. Rounds to nearest, ties to even; NaN stays NaN. */
#ifndef MFA_CPU_KERNELS_HALF_H
#define MFA_CPU_KERNELS_HALF_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bf16_to_float(uint16_t h)
{
    return float_of_bits((uint32_t)h << 16);
}

static inline uint16_t bf16_of_float(float x)
{
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* A half's bits, shifted into a float's place, lack 2^112. All floats here are normal, for others may count as 0. */
static inline float f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest >= 0x0f800000u) /* infinity or NaN */
        return float_of_bits(sign | 0x70000000u | rest);
    if (rest < 0x00800000u) /* subnormal, or 0: as the fraction of 2^-14, which is then taken away */
        return float_of_bits(sign | bits_of_float(float_of_bits(rest | 0x38800000u) - 0x1p-14f));
    return float_of_bits(sign | (rest + 0x38000000u));
}

static inline uint16_t f16_of_float(float x)
{
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x1ff));
    if (rest >= 0x477ff000u) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) /* below 2^-14: adding 1/2 leaves a multiple of 2^-24 in the low bits */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000u) >> 13));
}

#endif
