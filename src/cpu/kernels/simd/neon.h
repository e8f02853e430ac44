/* The vector API in NEON (arm64), 4 floats. scalar.h says what each name means. */
#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/kernels/simd/half.h"

typedef float real;
typedef float32x4_t vec;
#define LANES 4
#define TILE_ROWS_3 8
#define TILE_ROWS_2 12
#define TILE_ROWS_1 12

typedef uint64_t wide_vec __attribute__((vector_size(16)));

static inline wide_vec wide_mul(wide_vec a, uint32_t b)
{
    return (wide_vec)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
}

static inline vec vec_load(const real *p)
{
    return vld1q_f32(p);
}

static inline void vec_store(real *p, vec v)
{
    vst1q_f32(p, v);
}

static inline vec vec_set1(real x)
{
    return vdupq_n_f32(x);
}

static inline vec vec_add(vec a, vec b)
{
    return vaddq_f32(a, b);
}

static inline vec vec_sub(vec a, vec b)
{
    return vsubq_f32(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return vmulq_f32(a, b);
}

static inline vec vec_div(vec a, vec b)
{
    return vdivq_f32(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return vfmaq_f32(c, a, b);
}

static inline vec vec_select_less(vec a, vec b, vec x, vec y)
{
    return vbslq_f32(vcltq_f32(a, b), x, y);
}

static inline vec vec_max(vec a, vec b)
{
    return vec_select_less(b, a, a, b);
}

static inline int vec_any_less(vec a, vec b)
{
    return vmaxvq_u32(vcltq_f32(a, b)) != 0;
}

/* 2^(n + f); 0 where x < low. A product, not a sum of bits: NaN stays NaN. */
static inline vec vec_exp2(vec x)
{
    vec low = vec_set1(-126), y = vmaxq_f32(vminq_f32(x, vec_set1(127.4f)), low), n = vrndnq_f32(y), f = vec_sub(y, n);
    vec p = vec_fma(vec_set1(0x1.5bba14p-10f), f, vec_set1(0x1.3cea88p-7f));
    p = vec_fma(p, f, vec_set1(0x1.c6b752p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebf9bcp-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e42ap-1f));
    p = vec_fma(p, f, vec_set1(1));
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vec_select_less(x, low, vec_set1(0), vec_mul(p, vreinterpretq_f32_s32(power)));
}

static inline vec vec_exp(vec x)
{
    return vec_exp2(vec_mul(x, vec_set1((real)1.4426950408889634074)));
}

static inline vec vec_repeat(const real *p, int n)
{
    if (n == 1)
        return vld1q_dup_f32(p);
    return n == 2 ? vcombine_f32(vld1_f32(p), vld1_f32(p)) : vec_load(p);
}

static inline vec vec_add_neighbours(vec a, vec b)
{
    return vpaddq_f32(a, b);
}

static inline vec vec_load_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

#include "cpu/kernels/simd/codes.h"

static inline void vec_store_f16(uint16_t *p, vec v)
{
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    uint32x4_t x = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
    x = vbslq_u32(vceqq_f32(v, v), rounded, quiet);
    vst1_u16(p, vshrn_n_u32(x, 16));
}

static inline void vec_transpose(const real *from, int64_t from_stride, real *to, int64_t to_stride)
{
    float32x4x2_t top = vtrnq_f32(vec_load(from), vec_load(from + from_stride));
    float32x4x2_t low = vtrnq_f32(vec_load(from + 2 * from_stride), vec_load(from + 3 * from_stride));
    for (int i = 0; i < 2; i++) {
        vec_store(to + i * to_stride, vcombine_f32(vget_low_f32(top.val[i]), vget_low_f32(low.val[i])));
        vec_store(to + (i + 2) * to_stride, vcombine_f32(vget_high_f32(top.val[i]), vget_high_f32(low.val[i])));
    }
}
