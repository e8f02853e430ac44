/* What rows of K and V consist of: elements of the problem's dtype, or codes of 8 or 4 bits with scales (enum
 * mfa_kv_type in include/mfa.h), one for each row or for groups of its columns. The host defines K_TYPE and V_TYPE, one
 * of the types below each; rows of Q and dO are KV_SAME.
 *
 * A run is four neighbours of a row, from a multiple of four on, as they are loaded; kv_source.h loads runs, and here
 * they become numbers. A number is code * scale in f32, and is not rounded to 16 bits: where K or V has codes, tiles
 * are f32. */
#include "core/codes.h"

#define KV_SAME 0
#define KV_INT8 1
#define KV_E4M3 2
#define KV_E5M2 3
#define KV_INT4 4 /* from here on, 4 bits */
#define KV_NF4 5

#if K_TYPE != KV_SAME || V_TYPE != KV_SAME
#define CODES
#endif

METAL_FUNC void clear_run(thread storage4 &run)
{
    run = storage4{0, 0, 0, 0};
}

METAL_FUNC float4 run_numbers(storage4 run)
{
    return float4{widen(storage(run[0])), widen(storage(run[1])), widen(storage(run[2])), widen(storage(run[3]))};
}

/* Elements of tiles in threadgroup memory. */
#if defined(CODES)
typedef float tile_element;
typedef float2 tile_element2;
typedef float4 tile_element4;
#else
typedef storage tile_element;
typedef storage2 tile_element2;
typedef storage4 tile_element4;

METAL_FUNC tile_element4 tile_run(storage4 run)
{
    return run;
}
#endif

/* Of rows of a type: `place` is where a row begins, `scales` says how its scales lie; addresses count units. */
struct no_scales {
};

METAL_FUNC bool are_regular(no_scales)
{
    return true;
}

template <int TYPE> struct row_type;

template <> struct row_type<KV_SAME> {
    typedef storage unit;
    typedef device const storage *place;
    typedef no_scales scales;
    typedef storage4 run;
};

/* Where a column is, in units: of 4 bits, columns c and c + 16 of 32 share a byte. */
template <int TYPE> METAL_FUNC int unit_of(int column)
{
    constexpr uint HALF = MFA_KV_BLOCK / 2;
    return TYPE >= KV_INT4 ? int(uint(column) / MFA_KV_BLOCK * HALF + uint(column) % HALF) : column;
}

#if defined(CODES)
#if !defined(CONSTANT_ARRAY) /* outside functions */
#define CONSTANT_ARRAY(type, name, count) constant type name[count]
#endif

CONSTANT_ARRAY(float, NF4, 16) = {MFA_NF4_VALUES};

#if !defined(DTYPE_F32) /* else they are those of element.h */
METAL_FUNC float widen(float x)
{
    return x;
}

METAL_FUNC float2 widen(float2 x)
{
    return x;
}
#endif

struct code_place {
    device const uchar *codes;
    device const float *scales;
};

struct code_scales {
    long row_stride, column_stride, page_stride;
    uint divisor; /* the group of column c is c * divisor >> DIVISOR_BITS, for columns below 2^10 */
    bool given;   /* else they are 1 */
    bool regular; /* a run has one scale, and 32 bits hold offsets within a stretch */
};

#define DIVISOR_BITS 20

METAL_FUNC bool are_regular(thread const code_scales &scales)
{
    return scales.regular;
}

METAL_FUNC int group_of(thread const code_scales &scales, int column)
{
    return int(uint(column) * scales.divisor >> DIVISOR_BITS);
}

/* Four codes with one scale, a byte each; of 4 bits the low half of it, and the high half may be anything. */
template <int TYPE> struct code_run {
    uint codes;
    float scale;
};

template <int TYPE> struct row_type {
    typedef uchar unit;
    typedef code_place place;
    typedef code_scales scales;
    typedef code_run<TYPE> run;
};

template <int TYPE> METAL_FUNC void clear_run(thread code_run<TYPE> &run)
{
    run.codes = 0;
    run.scale = 0.0f;
}

/* The bit of its byte where the code of a column begins. */
template <int TYPE> METAL_FUNC uint bit_of(int column)
{
    return TYPE >= KV_INT4 ? (uint(column) & MFA_KV_BLOCK / 2) / 4 : 0;
}

/* Halves that were made of bytes 0 and 2, and of bytes 1 and 3, in the order of the bytes. */
METAL_FUNC float4 in_order(half2 even, half2 odd, half less, half times)
{
    return float4{float(half((even[0] - less) * times)), float(half((odd[0] - less) * times)),
                  float(half((even[1] - less) * times)), float(half((odd[1] - less) * times))};
}

/* Integers: with the exponent of 1024, the low bits of a half count ones. `flip`: bits that are changed before, so that
 * `zero` stands for 0. */
METAL_FUNC float4 integers(uint codes, uint mask, uint flip, int zero)
{
    uint even = (codes & mask) ^ (0x64006400u | flip), odd = (codes >> 8 & mask) ^ (0x64006400u | flip);
    return in_order(as_type<half2>(even), as_type<half2>(odd), half(1024 + zero), half(1));
}

/* An 8-bit float is the upper byte of a half, or with a bit more of the fraction a part of one: then it lacks a factor
 * of 2^8, and 0x7f is a NaN. Subnormal ones need subnormal halves, which Apple's GPUs keep. */
METAL_FUNC uint half_of_e4m3(uint upper)
{
    return (upper & 0x80008000u) | (upper >> 1 & 0x3f803f80u);
}

METAL_FUNC float nan_of_e4m3(float x)
{
    return fabs(x) > 448.0f ? as_type<float>(0x7fc00000u) : x;
}

METAL_FUNC float4 e4m3(uint even, uint odd)
{
    float4 x = in_order(as_type<half2>(half_of_e4m3(even)), as_type<half2>(half_of_e4m3(odd)), half(0), half(256));
    return float4{nan_of_e4m3(x[0]), nan_of_e4m3(x[1]), nan_of_e4m3(x[2]), nan_of_e4m3(x[3])};
}

METAL_FUNC float4 nf4(uint codes)
{
    return float4{NF4[codes & 15], NF4[codes >> 8 & 15], NF4[codes >> 16 & 15], NF4[codes >> 24 & 15]};
}

template <int TYPE> METAL_FUNC float4 run_numbers(code_run<TYPE> run)
{
    uint codes = run.codes, even = codes << 8 & 0xff00ff00u, odd = codes & 0xff00ff00u;
    float4 x = TYPE == KV_INT8   ? integers(codes, 0x00ff00ffu, 0x00800080u, 128)
               : TYPE == KV_INT4 ? integers(codes, 0x000f000fu, 0, 8)
               : TYPE == KV_NF4  ? nf4(codes)
               : TYPE == KV_E4M3 ? e4m3(even, odd)
                                 : in_order(as_type<half2>(even), as_type<half2>(odd), half(0), half(1));
    return x * run.scale;
}

METAL_FUNC tile_element4 tile_run(storage4 run)
{
    return run_numbers(run);
}

template <int TYPE> METAL_FUNC tile_element4 tile_run(code_run<TYPE> run)
{
    return run_numbers(run);
}
#endif
