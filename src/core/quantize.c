/* Numbers to the codes of K and V, row by row. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/error.h"
#include "core/codes.h"
#include "core/problem.h"

/* The largest code of each type, which the largest size in a group gets; of int4 it is -8, the code 0. */
static float largest_code(int32_t type)
{
    switch (type) {
    case MFA_KV_INT8: return 127;
    case MFA_KV_E4M3: return 448;
    case MFA_KV_E5M2: return 57344;
    case MFA_KV_INT4: return -8;
    default: return 1;
    }
}

/* Infinity in place of NaN, too: neither has a code. */
static float half_to_float(uint16_t h)
{
    const int exponent = h >> 10 & 31, fraction = h & 0x3ff;
    const double size = exponent == 31  ? (double)INFINITY
                        : exponent == 0 ? ldexp(fraction, -24)
                                        : ldexp(fraction + 1024, exponent - 25);
    return (float)(h >> 15 ? -size : size);
}

static int is_finite(float x)
{
    return !isnan(x) && !isinf(x);
}

/* To the nearest integer, ties to even, of a size below 2^51. */
static double round_to_even(double x)
{
    return (x + 0x1.8p52) - 0x1.8p52;
}

static double clamp(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

static float number(const void *numbers, int32_t dtype, int64_t n)
{
    uint32_t bits;
    float x;
    switch (dtype) {
    case MFA_F64: return (float)((const double *)numbers)[n];
    case MFA_F32: return ((const float *)numbers)[n];
    case MFA_F16: return half_to_float(((const uint16_t *)numbers)[n]);
    default:
        bits = (uint32_t)((const uint16_t *)numbers)[n] << 16;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
}

/* An 8-bit float with so many bits of the fraction, whose numbers of the lowest exponent are multiples of 2^least:
 * rounded to nearest, ties to even. The size of x is at most the largest code. */
static uint8_t encode_float8(double x, int fraction_bits, int least)
{
    const double size = fabs(x);
    int exponent = 0;
    frexp(size, &exponent);
    int ulp = exponent - 1 - fraction_bits; /* of x: 2^ulp */
    ulp = ulp < least || size == 0 ? least : ulp;
    const int units = (int)round_to_even(ldexp(size, -ulp));
    /* A carry out of the fraction adds one to the exponent by itself. */
    const int code = ulp > least ? units + ((ulp - least) << fraction_bits) : units;
    return (uint8_t)(code | (x < 0 ? 0x80 : 0));
}

static uint8_t encode_nf4(float x)
{
    static const float values[] = {MFA_NF4_VALUES};
    uint8_t code = 0;
    while (code < 15 && x > (values[code] + values[code + 1]) / 2)
        code++;
    return code;
}

static uint8_t encode(int32_t type, float x)
{
    switch (type) {
    case MFA_KV_INT8: return (uint8_t)(int8_t)clamp(round_to_even((double)x), -127, 127);
    case MFA_KV_E4M3: return encode_float8(clamp((double)x, -448, 448), 3, -9);
    case MFA_KV_E5M2: return encode_float8(clamp((double)x, -57344, 57344), 2, -16);
    case MFA_KV_INT4: return (uint8_t)clamp(round_to_even((double)x) + 8, 0, 15);
    default: return encode_nf4(x);
    }
}

/* The scale of a group: of its number of the largest size. */
static float scale_of(int32_t type, int32_t dtype, const void *numbers, int64_t first, int64_t end)
{
    float largest = 0;
    for (int64_t n = first; n < end; n++) {
        const float x = number(numbers, dtype, n);
        largest = fabs((double)x) > fabs((double)largest) ? x : largest;
    }
    return (type == MFA_KV_INT4 || largest > 0 ? largest : -largest) / largest_code(type);
}

static void quantize_row(int32_t type, int32_t dtype, int64_t columns, int64_t group, const void *numbers,
                         uint8_t *codes, float *scales)
{
    const int packs = mfa_kv_type_columns(type, MFA_KV_BLOCK) != MFA_KV_BLOCK;
    for (int64_t first = 0; first < columns; first += group) {
        const int64_t end = columns - first < group ? columns : first + group;
        const float scale = scales[first / group] = scale_of(type, dtype, numbers, first, end);
        for (int64_t n = first; n < end; n++) {
            const uint8_t code = encode(type, scale != 0 ? number(numbers, dtype, n) / scale : 0);
            if (!packs)
                codes[n] = code;
            else if (n % MFA_KV_BLOCK < MFA_KV_BLOCK / 2)
                codes[n / MFA_KV_BLOCK * (MFA_KV_BLOCK / 2) + n % MFA_KV_BLOCK] = code;
            else
                codes[n / MFA_KV_BLOCK * (MFA_KV_BLOCK / 2) + n % (MFA_KV_BLOCK / 2)] |= (uint8_t)(code << 4);
        }
    }
}

static mfa_status check(int32_t type, int32_t dtype, int64_t rows, int64_t columns, int64_t group)
{
    const int packs = mfa_kv_type_columns(type, MFA_KV_BLOCK) != MFA_KV_BLOCK;
    if (type == MFA_KV_SAME || !mfa_kv_type_name(type))
        return mfa_fail(MFA_INVALID, "type is %d; it must be 1 (int8), 2 (e4m3), 3 (e5m2), 4 (int4) or 5 (nf4)", type);
    if (!mfa_dtype_name(dtype))
        return mfa_fail(MFA_INVALID, "dtype is %d; it must be 0 (f32), 1 (f16), 2 (bf16) or 3 (f64)", dtype);
    if (rows < 0 || columns < 0 || group < 0)
        return mfa_fail(MFA_INVALID, "rows is %lld, columns %lld and group %lld; they must be 0 or more",
                        (long long)rows, (long long)columns, (long long)group);
    if (packs && (columns % MFA_KV_BLOCK != 0 || group % MFA_KV_BLOCK != 0))
        return mfa_fail(MFA_INVALID, "columns is %lld and group %lld; of %s they must be multiples of %d",
                        (long long)columns, (long long)group, mfa_kv_type_name(type), MFA_KV_BLOCK);
    return MFA_OK;
}

mfa_status mfa_kv_quantize_rows(int32_t type, int32_t dtype, int64_t rows, int64_t columns, int64_t group,
                                const void *numbers, int64_t numbers_row, void *codes, int64_t codes_row, float *scales,
                                int64_t scales_row)
{
    const mfa_status status = check(type, dtype, rows, columns, group);
    if (status != MFA_OK)
        return status;
    const int64_t bytes = (int64_t)mfa_dtype_size(dtype);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            if (!is_finite(number((const char *)numbers + r * numbers_row * bytes, dtype, c)))
                return mfa_fail(MFA_INVALID, "number %lld of row %lld is not finite as f32; it must be", (long long)c,
                                (long long)r);
    for (int64_t r = 0; r < rows && columns > 0; r++)
        quantize_row(type, dtype, columns, group ? group : columns, (const char *)numbers + r * numbers_row * bytes,
                     (uint8_t *)codes + r * codes_row, scales + r * scales_row);
    return MFA_OK;
}
