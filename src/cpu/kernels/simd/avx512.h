/* The vector API in AVX-512 (F, DQ, BW, VL), 16 floats. scalar.h says what each name means. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/kernels/simd/half.h"

typedef float real;
typedef __m512 vec;
#define LANES 16
#define TILE_ROWS_3 8
#define TILE_ROWS_2 12
#define TILE_ROWS_1 12
#define SHORT_ROWS 6
#define SHORT_K_PACKS 16
#define DECODE_ACCUMULATORS 16
/* clang would then keep sums in memory. */
#ifndef __clang__
#define TILE_UNROLL _Pragma("GCC unroll 4") /* processors foresee the end of a loop of few rounds */
#define PART_UNROLL _Pragma("GCC unroll 2")
#endif

typedef uint64_t wide_vec __attribute__((vector_size(64)));

static inline wide_vec wide_mul(wide_vec a, uint32_t b)
{
    return (wide_vec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}

static inline vec vec_load(const real *p)
{
    return _mm512_loadu_ps(p);
}

static inline void vec_store(real *p, vec v)
{
    _mm512_storeu_ps(p, v);
}

static inline vec vec_set1(real x)
{
    return _mm512_set1_ps(x);
}

static inline vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

static inline vec vec_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

static inline vec vec_div(vec a, vec b)
{
    return _mm512_div_ps(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline vec vec_select_less(vec a, vec b, vec x, vec y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

static inline vec vec_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}

static inline int vec_any_less(vec a, vec b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0;
}

/* 2^f = ((f + SHIFT)^2 + ABOVE) / (SHIFT^2 + ABOVE) for |f| <= 1/64, a relative error of 5e-8; here is 2^(i / 32) over
 * that divisor. */
#define SHIFT 0x1.7155cep+0f
#define ABOVE 0x1.0a684cp+1f
static const float exp2_table[32] __attribute__((aligned(64))) = {
    0x1.ebfbfp-3f,  0x1.f6c1d6p-3f, 0x1.00e21p-2f,  0x1.06821p-2f,  0x1.0c419ap-2f, 0x1.12215ap-2f, 0x1.18220ap-2f,
    0x1.1e446p-2f,  0x1.248918p-2f, 0x1.2af0f2p-2f, 0x1.317cb6p-2f, 0x1.382d2cp-2f, 0x1.3f0322p-2f, 0x1.45ff68p-2f,
    0x1.4d22d8p-2f, 0x1.546e4cp-2f, 0x1.5be2a4p-2f, 0x1.6380c6p-2f, 0x1.6b499ap-2f, 0x1.733e12p-2f, 0x1.7b5f22p-2f,
    0x1.83adc4p-2f, 0x1.8c2af8p-2f, 0x1.94d7cp-2f,  0x1.9db52ap-2f, 0x1.a6c446p-2f, 0x1.b0062ap-2f, 0x1.b97bf4p-2f,
    0x1.c326c4p-2f, 0x1.cd07c6p-2f, 0x1.d72028p-2f, 0x1.e17122p-2f,
};

/* 2^(n + f); t holds 32 n in its low bits. Multiplications are what an exponential costs beside a product: so there is
 * a table, and a square for want of a multiply-add. */
static inline vec exp2_of_parts(vec t, vec n, vec f, __mmask16 shown)
{
    vec g = vec_add(f, vec_set1(SHIFT)), p = vec_fma(g, g, vec_set1(ABOVE));
    vec root = _mm512_permutex2var_ps(vec_load(exp2_table), _mm512_castps_si512(t), vec_load(exp2_table + 16));
    return _mm512_maskz_scalef_ps(shown, vec_mul(p, root), n);
}

static inline vec vec_exp2(vec x)
{
    vec magic = vec_set1(0x1.8p18f), t = vec_add(x, magic), n = vec_sub(t, magic);
    return exp2_of_parts(t, n, vec_sub(x, n), _mm512_cmp_ps_mask(x, vec_set1(-126), _CMP_NLT_UQ));
}

static inline vec vec_exp(vec x)
{
    vec log2e = vec_set1(0x1.715476p0f), magic = vec_set1(0x1.8p18f);
    vec t = vec_fma(x, log2e, magic), n = vec_sub(t, magic), f = _mm512_fmsub_ps(x, log2e, n);
    return exp2_of_parts(t, n, f, _mm512_cmp_ps_mask(x, vec_set1(-87.33f), _CMP_NLT_UQ));
}

static inline vec vec_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline vec vec_load_int8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* An 8-bit float is the high byte of an f16, or with a bit more of the fraction a part of one. */
static inline vec vec_load_e5m2(const uint8_t *p)
{
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm512_cvtph_ps(_mm256_slli_epi16(x, 8));
}

static inline vec vec_load_e4m3(const uint8_t *p)
{
    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); /* the sign in all high bits */
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbf80));
    __m256i ones = _mm256_or_si256(half, _mm256_set1_epi16((short)0xc07f)); /* -1: all bits but the sign are set */
    __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(ones, _mm256_set1_epi16(-1)), _mm256_set1_epi16(0x7e00));
    return _mm512_cvtph_ps(_mm256_or_si256(half, nan));
}

struct code_table {
    vec all;
};

static inline struct code_table vec_code_table(const float *numbers, real scale)
{
    return (struct code_table){vec_mul(_mm512_loadu_ps(numbers), vec_set1(scale))};
}

/* The permutation reads the low 4 bits of each index. */
static inline vec vec_load_nibbles(const uint8_t *p, int half, struct code_table table)
{
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_ps(half ? _mm512_srli_epi32(x, 4) : x, table.all);
}

/* LANES / n floats, each n times: n divides LANES. */
static inline vec vec_spread(const float *p, int n)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 some = _mm512_maskz_loadu_ps((__mmask16)(0xffff >> (16 - 16 / n)), p);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(lane, _mm512_set1_epi32(__builtin_ctz((unsigned)n))), some);
}

static inline void vec_store_f16(uint16_t *p, vec v)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    __m512i x = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(x, _mm512_set1_epi32(0x400000));
    x = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}

static inline vec vec_repeat(const real *p, int n)
{
    switch (n) {
    case 1: return _mm512_set1_ps(*p);
    case 2: return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd((const double *)(const void *)p)));
    case 4: return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    case 8: return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    default: return _mm512_loadu_ps(p);
    }
}

static inline vec vec_add_neighbours(vec a, vec b)
{
    __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return vec_add(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

/* Pairs, then fours by shuffles within 128 bits; then the 128-bit parts change places. */
static inline void vec_transpose(const real *from, int64_t from_stride, real *to, int64_t to_stride)
{
    vec a[16], b[16];
    for (int r = 0; r < 16; r++)
        a[r] = vec_load(from + r * from_stride);
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4)
        for (int i = 0; i < 2; i++) {
            a[r + 2 * i] = _mm512_shuffle_ps(b[r + i], b[r + i + 2], 0x44);
            a[r + 2 * i + 1] = _mm512_shuffle_ps(b[r + i], b[r + i + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        vec_store(to + i * to_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        vec_store(to + (i + 8) * to_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        vec_store(to + (i + 4) * to_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        vec_store(to + (i + 12) * to_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
