/* The vector API in AVX2, FMA and F16C, 8 floats. scalar.h says what each name means. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/kernels/simd/half.h"

typedef float real;
typedef __m256 vec;
#define LANES 8
#define TILE_ROWS_3 4
#define TILE_ROWS_2 4
#define TILE_ROWS_1 8

typedef uint64_t wide_vec __attribute__((vector_size(32)));

static inline wide_vec wide_mul(wide_vec a, uint32_t b)
{
    return (wide_vec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}

static inline vec vec_load(const real *p)
{
    return _mm256_loadu_ps(p);
}

static inline void vec_store(real *p, vec v)
{
    _mm256_storeu_ps(p, v);
}

static inline vec vec_set1(real x)
{
    return _mm256_set1_ps(x);
}

static inline vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

static inline vec vec_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

static inline vec vec_div(vec a, vec b)
{
    return _mm256_div_ps(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline vec vec_select_less(vec a, vec b, vec x, vec y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

static inline vec vec_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}

static inline int vec_any_less(vec a, vec b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0;
}

/* 2^(n + f), where t holds n in its low bits; 0 where `shown` is. A product, not a sum of bits: NaN stays NaN. */
static inline vec exp2_of_parts(vec t, vec f, vec shown)
{
    vec p = vec_fma(vec_set1(0x1.5bba14p-10f), f, vec_set1(0x1.3cea88p-7f));
    p = vec_fma(p, f, vec_set1(0x1.c6b752p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebf9bcp-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e42ap-1f));
    p = vec_fma(p, f, vec_set1(1));
    __m256i n = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23), _mm256_set1_epi32(127 << 23));
    p = vec_mul(p, _mm256_castsi256_ps(n));
    return _mm256_and_ps(p, shown);
}

/* Below the lowest exponent n is nonsense, but the result 0. */
static inline vec vec_exp2(vec x)
{
    vec magic = vec_set1(0x1.8p23f), y = _mm256_min_ps(vec_set1(127.4f), x), t = vec_add(y, magic);
    return exp2_of_parts(t, vec_sub(y, vec_sub(t, magic)), _mm256_cmp_ps(x, vec_set1(-126), _CMP_NLT_UQ));
}

static inline vec vec_exp(vec x)
{
    vec log2e = vec_set1(0x1.715476p0f), magic = vec_set1(0x1.8p23f), y = _mm256_min_ps(vec_set1(88.3f), x);
    vec t = vec_fma(y, log2e, magic), f = _mm256_fmsub_ps(y, log2e, vec_sub(t, magic));
    return exp2_of_parts(t, f, _mm256_cmp_ps(x, vec_set1(-87.33f), _CMP_NLT_UQ));
}

static inline vec vec_repeat(const real *p, int n)
{
    switch (n) {
    case 1: return _mm256_broadcast_ss(p);
    case 2: return _mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)p));
    case 4: return _mm256_broadcast_ps((const __m128 *)(const void *)p);
    default: return _mm256_loadu_ps(p);
    }
}

static inline vec vec_add_neighbours(vec a, vec b)
{
    __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a, b));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8));
}

static inline vec vec_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline vec vec_load_int8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* An 8-bit float is the high byte of an f16, or with a bit more of the fraction a part of one. */
static inline vec vec_load_e5m2(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p)), 8));
}

static inline vec vec_load_e4m3(const uint8_t *p)
{
    __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)); /* the sign in all high bits */
    __m128i half = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16((short)0xbf80));
    __m128i ones = _mm_or_si128(half, _mm_set1_epi16((short)0xc07f)); /* -1: all bits but the sign are set */
    __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(ones, _mm_set1_epi16(-1)), _mm_set1_epi16(0x7e00));
    return _mm256_cvtph_ps(_mm_or_si128(half, nan));
}

struct code_table {
    vec low, high;
};

static inline struct code_table vec_code_table(const float *numbers, real scale)
{
    const vec factor = vec_set1(scale);
    return (struct code_table){vec_mul(vec_load(numbers), factor), vec_mul(vec_load(numbers + 8), factor)};
}

/* A permutation reads 3 bits of an index; the fourth says which half of the table. */
static inline vec vec_load_nibbles(const uint8_t *p, int half, struct code_table table)
{
    __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    x = half ? _mm256_srli_epi32(x, 4) : x;
    vec low = _mm256_permutevar8x32_ps(table.low, x), high = _mm256_permutevar8x32_ps(table.high, x);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));
}

/* LANES / n floats, each n times: n divides LANES. */
static inline vec vec_spread(const float *p, int n)
{
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256 some = _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(8 / n), lane));
    return _mm256_permutevar8x32_ps(some, _mm256_srlv_epi32(lane, _mm256_set1_epi32(__builtin_ctz((unsigned)n))));
}

static inline void vec_store_f16(uint16_t *p, vec v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    __m256i x = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    x = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    x = _mm256_srli_epi32(x, 16);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}

/* Pairs, then fours by shuffles within 128 bits; then the 128-bit halves change places. */
static inline void vec_transpose(const real *from, int64_t from_stride, real *to, int64_t to_stride)
{
    vec a[8], b[8];
    for (int r = 0; r < 8; r++)
        a[r] = vec_load(from + r * from_stride);
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int i = 0; i < 2; i++) {
            a[r + 2 * i] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0x44);
            a[r + 2 * i + 1] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        vec_store(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        vec_store(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
