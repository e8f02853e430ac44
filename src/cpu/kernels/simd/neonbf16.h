/* NEON with dot products of pairs of bf16 (FEAT_BF16). What products multiply are pairs, and all else is as in
 * neon.h. avx512bf16.h says what each name means. The instruction rounds its sums to odd and takes
 * subnormal numbers for 0. */
#include "cpu/kernels/simd/neon.h"

#define K_PACK 2

/* a is read from the register it was loaded into. For the intrinsic that says so, vbfdotq_laneq_f32, compilers copy
 * it to all lanes first: an instruction for every three that multiply. */
static inline vec vec_dot(real a, vec b, vec sum)
{
    __asm__("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(sum) : "w"(b), "w"(a));
    return sum;
}

static inline vec vec_dots(vec a, vec b, vec sum)
{
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}

static inline vec vec_pair(vec even, vec odd)
{
    uint16x8_t e = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(even));
    return vreinterpretq_f32_u16(vzip1q_u16(e, vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(odd))));
}

static inline void vec_store_packed(real *to, vec v)
{
    vst1_f32(to, vreinterpret_f32_bf16(vcvt_bf16_f32(v)));
}

static inline vec vec_zip_low(vec even, vec odd)
{
    return vreinterpretq_f32_u16(vzip1q_u16(vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd)));
}

static inline vec vec_zip_high(vec even, vec odd)
{
    return vreinterpretq_f32_u16(vzip2q_u16(vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd)));
}
