/* The types of operands in memory, and their conversion to f32 and back.
 *
 * The host defines one of DTYPE_F32, DTYPE_F16, DTYPE_BF16; BF16_NATIVE if the GPU has bfloat: else a bf16 is handled
 * as bits, the upper half of a float; and OUT_F32 where O, dQ, dK and dV are f32 and the rest is not. Rounding is to
 * nearest, ties to even. Metal's default is fast math, under which a float is never infinite: infinities are read and
 * written as bits only. Numbers from OVERFLOWS on are rounded to infinity. */

#if defined(DTYPE_F32)
typedef float storage;
typedef float2 storage2;
typedef float4 storage4;
#define OVERFLOWS 3.40282347e38f
#elif defined(DTYPE_F16)
typedef half storage;
typedef half2 storage2;
typedef half4 storage4;
#define OVERFLOWS 65520.0f
#else
typedef ushort storage;
typedef ushort2 storage2;
typedef ushort4 storage4;
#define OVERFLOWS 3.39617753e38f
#endif

#define LOG2E 1.44269504f
#define NEGATIVE_INFINITY 0xff800000u /* the bits of a float */

METAL_FUNC float bf16_widen(ushort bits)
{
#if defined(BF16_NATIVE)
    return float(as_type<bfloat>(bits));
#else
    return as_type<float>(uint(bits) << 16);
#endif
}

METAL_FUNC ushort bf16_narrow(float x)
{
#if defined(BF16_NATIVE)
    return as_type<ushort>(bfloat(x));
#else
    uint bits = as_type<uint>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return ushort(bits >> 16 | 0x40u);
    return ushort((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

METAL_FUNC float widen(storage x)
{
#if defined(DTYPE_BF16)
    return bf16_widen(x);
#else
    return float(x);
#endif
}

METAL_FUNC float2 widen(storage2 x)
{
    return float2{widen(x[0]), widen(x[1])};
}

METAL_FUNC storage narrow(float x)
{
#if defined(DTYPE_F32)
    return x;
#elif defined(DTYPE_F16)
    return half(x);
#else
    return bf16_narrow(x);
#endif
}

/* O, dQ, dK and dV. */
#if defined(OUT_F32)
typedef float out_storage;
#else
typedef storage out_storage;
#endif

METAL_FUNC float widen_out(out_storage x)
{
#if defined(OUT_F32)
    return x;
#else
    return widen(x);
#endif
}

METAL_FUNC out_storage narrow_out(float x)
{
#if defined(OUT_F32)
    return x;
#else
    return narrow(x);
#endif
}

/* The rounding error x - narrow_out(x), narrowed; 0 where narrow_out(x) is not finite. */
METAL_FUNC out_storage narrow_rest(float x)
{
    return fabs(x) < OVERFLOWS ? narrow_out(x - widen_out(narrow_out(x))) : out_storage(0);
}

#if defined(MASK_BOOL)
typedef uchar mask_storage;

METAL_FUNC bool masks_out(mask_storage bits)
{
    return bits == 0;
}

METAL_FUNC bool changes_score(mask_storage bits)
{
    return bits == 0;
}
#elif defined(MASK_F32)
typedef uint mask_storage;

METAL_FUNC float mask_value(mask_storage bits)
{
    return as_type<float>(bits);
}

METAL_FUNC mask_storage mask_narrow(float x)
{
    return as_type<uint>(x);
}

#define MASK_MINUS_INFINITY NEGATIVE_INFINITY
#define MASK_MAGNITUDE 0x7fffffffu /* all bits but the sign */
#elif defined(MASK_F16)
typedef ushort mask_storage;

METAL_FUNC float mask_value(mask_storage bits)
{
    return float(as_type<half>(bits));
}

METAL_FUNC mask_storage mask_narrow(float x)
{
    return as_type<ushort>(half(x));
}

#define MASK_MINUS_INFINITY 0xfc00u
#define MASK_MAGNITUDE 0x7fffu
#elif defined(MASK_BF16)
typedef ushort mask_storage;

METAL_FUNC float mask_value(mask_storage bits)
{
    return bf16_widen(bits);
}

METAL_FUNC mask_storage mask_narrow(float x)
{
    return bf16_narrow(x);
}

#define MASK_MINUS_INFINITY 0xff80u
#define MASK_MAGNITUDE 0x7fffu
#else
typedef uchar mask_storage; /* of an argument that is not read */
#endif

#if defined(MASK_ADDITIVE)
METAL_FUNC bool masks_out(mask_storage bits)
{
    return bits == MASK_MINUS_INFINITY;
}

METAL_FUNC bool changes_score(mask_storage bits)
{
    return (bits & MASK_MAGNITUDE) != 0;
}
#endif

#if defined(MASK_BOOL) || defined(MASK_ADDITIVE)
#define MASKED
#endif
