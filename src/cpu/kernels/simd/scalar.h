/* The vector API without intrinsics: vectors are the compiler's own, of VECTOR_BYTES bytes (16 unless defined
 * otherwise), which any machine lowers to what it has. It also serves f64 everywhere: define REAL double and the width
 * before including it.
 *
 * Every file of this folder gives: real, vec, LANES, TILE_ROWS_{3,2,1} (rows of a register tile of that many vectors),
 * and the functions below. It may give TILE_UNROLL and PART_UNROLL, pragmas for the loops of tiles and of their parts;
 * SHORT_ROWS, rows of the tile with fused exponentials where it has at most SHORT_K_PACKS packs along k: there are more
 * exponentials for each multiply-add then, and they want registers; K_PACK = 2 with dot products (avx512bf16.h); and
 * USE_AMX with PANEL_VECTORS, QUERY_VECTORS, KEY_UNIT and MASK_GRANULE (amxbf16.h). */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/kernels/simd/half.h"

#ifndef REAL
#define REAL float
#endif
#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

typedef REAL real;
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
#define LANES ((int)(VECTOR_BYTES / sizeof(real)))
#define WIDENS_CODES 0 /* its kernels would be a third of the set, and gain nothing */

#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define TILE_ROWS_3 8
#define TILE_ROWS_2 12
#define TILE_ROWS_1 12
#else
#define TILE_ROWS_3 4
#define TILE_ROWS_2 4
#define TILE_ROWS_1 8
#endif

/* As many bits as a real; comparisons give vectors of it, all ones where true. */
typedef __typeof__(_Generic((real)0, double: (int64_t)0, float: (int32_t)0)) bits;
typedef bits bits_vec __attribute__((vector_size(VECTOR_BYTES)));

/* Unsigned integers of 64 bits. */
typedef uint64_t wide_vec __attribute__((vector_size(VECTOR_BYTES)));

/* The low 32 bits of each, times b. */
static inline wide_vec wide_mul(wide_vec a, uint32_t b)
{
    return (a & 0xffffffff) * b;
}

static inline vec vec_load(const real *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vec_store(real *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

static inline vec vec_set1(real x)
{
    return x - (vec){0};
}

static inline vec vec_add(vec a, vec b)
{
    return a + b;
}

static inline vec vec_sub(vec a, vec b)
{
    return a - b;
}

static inline vec vec_mul(vec a, vec b)
{
    return a * b;
}

static inline vec vec_div(vec a, vec b)
{
    return a / b;
}

/* a * b + c */
static inline vec vec_fma(vec a, vec b, vec c)
{
    return a * b + c;
}

/* a < b ? x : y */
static inline vec vec_select_less(vec a, vec b, vec x, vec y)
{
    bits_vec m = a < b;
    return (vec)((m & (bits_vec)x) | (~m & (bits_vec)y));
}

/* The larger one; b where either is NaN. */
static inline vec vec_max(vec a, vec b)
{
    return vec_select_less(b, a, a, b);
}

static inline int vec_any_less(vec a, vec b)
{
    bits_vec m = a < b;
    bits any = 0;
    for (int i = 0; i < LANES; i++)
        any |= m[i];
    return any != 0;
}

/* 2^(n + f), |f| <= 1/2 or little more, where t holds n in its low bits: 2^n is made of
 * bits, and multiplied with, so that NaN stays NaN.
 * f32: a minimax polynomial (relative error 1e-7); f64: Taylor's (4e-18). */
static inline vec exp2_of_parts(vec t, vec f)
{
    int is_double = sizeof(real) == 8;
    vec p;
    if (is_double) {
        static const double c[] = {0x1.62e42fefa39efp-1,  0x1.ebfbdff82c58fp-3,  0x1.c6b08d704a0cp-5,
                                   0x1.3b2ab6fba4e77p-7,  0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13,
                                   0x1.ffcbfc588b0c7p-17, 0x1.62c0223a5c824p-20, 0x1.b5253d395e7c4p-24,
                                   0x1.e4cf5158b8ecap-28, 0x1.e8cac7351bb25p-32, 0x1.c3bd650fc2986p-36,
                                   0x1.816193166d0f9p-40};
        p = vec_set1((real)c[12]);
        for (int i = 11; i >= 0; i--)
            p = p * f + (real)c[i];
    } else {
        p = vec_set1((real)0x1.5bba14p-10) * f + (real)0x1.3cea88p-7;
        p = (p * f + (real)0x1.c6b752p-5) * f + (real)0x1.ebf9bcp-3;
        p = p * f + (real)0x1.62e42ap-1;
    }
    p = p * f + (real)1;
    bits one = is_double ? (bits)1023 : (bits)127;
    return p * (vec)(((bits_vec)t + one) << (is_double ? 52 : 23));
}

static inline vec vec_clamp(vec x, vec low, real high) /* NaN stays */
{
    return vec_select_less(x, low, low, vec_select_less(vec_set1(high), x, vec_set1(high), x));
}

/* 2^x: 0 below the smallest normal number, NaN for NaN. */
static inline vec vec_exp2(vec x)
{
    int is_double = sizeof(real) == 8;
    vec low = vec_set1(is_double ? -1022 : -126), magic = vec_set1(is_double ? (real)0x1.8p52 : (real)0x1.8p23);
    vec y = vec_clamp(x, low, is_double ? (real)1023.4 : (real)127.4), t = y + magic;
    return vec_select_less(x, low, (vec){0}, exp2_of_parts(t, y - (t - magic)));
}

/* e^x, likewise. */
static inline vec vec_exp(vec x)
{
    return vec_exp2(vec_mul(x, vec_set1((real)1.4426950408889634074)));
}

/* n numbers, over and over. */
static inline vec vec_repeat(const real *p, int n)
{
    vec v;
    for (int i = 0; i < LANES; i++)
        v[i] = p[i % n];
    return v;
}

/* a[0] + a[1], a[2] + a[3], and so on, then those of b. */
static inline vec vec_add_neighbours(vec a, vec b)
{
    vec v;
    for (int i = 0; i < LANES / 2; i++) {
        v[i] = a[2 * i] + a[2 * i + 1];
        v[i + LANES / 2] = b[2 * i] + b[2 * i + 1];
    }
    return v;
}

static inline vec vec_load_f16(const uint16_t *p)
{
    vec v;
    for (int i = 0; i < LANES; i++)
        v[i] = f16_to_float(p[i]);
    return v;
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    vec v;
    for (int i = 0; i < LANES; i++)
        v[i] = bf16_to_float(p[i]);
    return v;
}

#include "cpu/kernels/simd/codes.h"

static inline void vec_store_f16(uint16_t *p, vec v)
{
    for (int i = 0; i < LANES; i++)
        p[i] = f16_of_float((float)v[i]);
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    for (int i = 0; i < LANES; i++)
        p[i] = bf16_of_float((float)v[i]);
}

/* A square of LANES x LANES: to[c][r] = from[r][c], rows `from_stride` and `to_stride` apart. */
static inline void vec_transpose(const real *from, int64_t from_stride, real *to, int64_t to_stride)
{
    for (int r = 0; r < LANES; r++)
        for (int c = 0; c < LANES; c++)
            to[c * to_stride + r] = from[r * from_stride + c];
}
