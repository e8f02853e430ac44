/* NEON with products of bf16 (FEAT_BF16): BFMMLA for matrices, and BFDOT, dot products of pairs, where there are few
 * queries. What products multiply are pairs, and all else is as in neon.h. avx512bf16.h says what each name means;
 * beside it there are
 *     vec_mmla(a, b, sum)           sum + a b^T: a and b have two rows of K_STEP packs; of the sums, those of a's first
 *                                   row with both rows of b come first
 *     vec_blocks_low(a, b)          the first halves of a and b; vec_blocks_high the second ones
 *     vec_packs_low(even, odd)      packs of even and odd by turns, the first LANES; vec_packs_high the others
 *     vec_packs_even(low, high)     what even was
 * Both instructions round their sums to odd and take subnormal numbers for 0. */
#include "cpu/kernels/simd/neon.h"

#define K_PACK 2
#define USE_MMLA 1

/* a is read from the register it was loaded into. For the intrinsic that says so, vbfdotq_laneq_f32, compilers copy
 * it to all lanes first. */
static inline vec vec_dot(real a, vec b, vec sum)
{
    __asm__("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(sum) : "w"(b), "w"(a));
    return sum;
}

static inline vec vec_dots(vec a, vec b, vec sum)
{
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}

static inline vec vec_mmla(vec a, vec b, vec sum)
{
    return vbfmmlaq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}

static inline vec vec_blocks_low(vec a, vec b)
{
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

static inline vec vec_blocks_high(vec a, vec b)
{
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

static inline vec vec_packs_low(vec even, vec odd)
{
    return vzip1q_f32(even, odd);
}

static inline vec vec_packs_high(vec even, vec odd)
{
    return vzip2q_f32(even, odd);
}

static inline vec vec_packs_even(vec low, vec high)
{
    return vuzp1q_f32(low, high);
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
