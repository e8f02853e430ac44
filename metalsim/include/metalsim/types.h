/* Scalars and vectors of MSL. Vectors are clang's own; float4(...) is a macro, because clang takes only
 * braces for what MSL writes as a constructor. */
#ifndef METALSIM_TYPES_H
#define METALSIM_TYPES_H

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using size_t = unsigned long;
using ptrdiff_t = long;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
typedef _Float16 half;
#if defined(METALSIM_COUNTED) /* the target has no bfloat: conversions cost the same, values are wrong */
typedef _Float16 bfloat;
#else
typedef __bf16 bfloat;
#endif

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX ((half)0x1.ffcp15f)
#define HALF_MIN ((half)0x1p-14f)
#define HALF_EPSILON ((half)0x1p-10f)
#define INT_MAX 0x7fffffff
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 0xffffffffu
#define LONG_MAX 0x7fffffffffffffffL
#define LONG_MIN (-LONG_MAX - 1)
#define ULONG_MAX 0xffffffffffffffffUL
#define SHRT_MAX 0x7fff
#define USHRT_MAX 0xffff
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_PI_F 3.14159265358979323846f

#if !defined(METALSIM_COUNTED)
/* What the compiler calls to round a float to bfloat: to nearest, ties to even. */
extern "C" METALSIM_UNWATCHED __attribute__((used)) bfloat __truncsfbf2(float x)
{
    uint u = __builtin_bit_cast(uint, x);
    ushort rounded = x != x ? ushort(u >> 16 | 0x40) : ushort((u + 0x7fff + (u >> 16 & 1)) >> 16);
    return __builtin_bit_cast(bfloat, rounded);
}
#endif

namespace metal
{

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

template <class T, class U> struct is_same {
    static constexpr bool value = false;
};
template <class T> struct is_same<T, T> {
    static constexpr bool value = true;
};
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;
template <bool condition, class T, class U> struct conditional {
    typedef T type;
};
template <class T, class U> struct conditional<false, T, U> {
    typedef U type;
};
template <bool condition, class T, class U> using conditional_t = typename conditional<condition, T, U>::type;

} // namespace metal

template <class To, class From> METAL_FUNC To as_type(From from)
{
    static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
    return __builtin_bit_cast(To, from);
}

#define METALSIM_VECTORS(T)        \
    typedef metal::vec<T, 2> T##2; \
    typedef metal::vec<T, 3> T##3; \
    typedef metal::vec<T, 4> T##4;
METALSIM_VECTORS(char)
METALSIM_VECTORS(uchar)
METALSIM_VECTORS(short)
METALSIM_VECTORS(ushort)
METALSIM_VECTORS(int)
METALSIM_VECTORS(uint)
METALSIM_VECTORS(long)
METALSIM_VECTORS(ulong)
METALSIM_VECTORS(half)
METALSIM_VECTORS(bfloat)
METALSIM_VECTORS(float)
#undef METALSIM_VECTORS
typedef float packed_float2 __attribute__((ext_vector_type(2), aligned(4)));
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef half packed_half2 __attribute__((ext_vector_type(2), aligned(2)));
typedef half packed_half4 __attribute__((ext_vector_type(4), aligned(2)));

namespace metalsim
{

template <class V> struct element_of {
    typedef V type;
};
template <class T, int N> struct element_of<metal::vec<T, N>> {
    typedef T type;
};

/* The constructor of a vector: one scalar for all elements, or scalars and vectors one after another. */
template <class T, int N> struct make {
    typedef metal::vec<T, N> V;

    static METAL_FUNC V from(T all)
    {
        return V(all);
    }
    template <class U> static METAL_FUNC V from(metal::vec<U, N> other)
    {
        return __builtin_convertvector(other, V);
    }
    template <class A, class B, class... More> static METAL_FUNC V from(A a, B b, More... more)
    {
        V v;
        put<0>(v, a, b, more...);
        return v;
    }

  private:
    template <int at> static METAL_FUNC void put(V &)
    {
        static_assert(at == N, "the wrong number of elements for this vector");
    }
    template <int at, class... More> static METAL_FUNC void put(V &v, T first, More... more)
    {
        v[at] = first;
        put<at + 1>(v, more...);
    }
    template <int at, class U, int M, class... More>
    static METAL_FUNC void put(V &v, metal::vec<U, M> first, More... more)
    {
        for (int i = 0; i < M; i++)
            v[at + i] = T(first[i]);
        put<at + M>(v, more...);
    }
};

} // namespace metalsim

#define char2(...) metalsim::make<char, 2>::from(__VA_ARGS__)
#define char4(...) metalsim::make<char, 4>::from(__VA_ARGS__)
#define uchar2(...) metalsim::make<uchar, 2>::from(__VA_ARGS__)
#define uchar4(...) metalsim::make<uchar, 4>::from(__VA_ARGS__)
#define short2(...) metalsim::make<short, 2>::from(__VA_ARGS__)
#define short4(...) metalsim::make<short, 4>::from(__VA_ARGS__)
#define ushort2(...) metalsim::make<ushort, 2>::from(__VA_ARGS__)
#define ushort3(...) metalsim::make<ushort, 3>::from(__VA_ARGS__)
#define ushort4(...) metalsim::make<ushort, 4>::from(__VA_ARGS__)
#define int2(...) metalsim::make<int, 2>::from(__VA_ARGS__)
#define int3(...) metalsim::make<int, 3>::from(__VA_ARGS__)
#define int4(...) metalsim::make<int, 4>::from(__VA_ARGS__)
#define uint2(...) metalsim::make<uint, 2>::from(__VA_ARGS__)
#define uint3(...) metalsim::make<uint, 3>::from(__VA_ARGS__)
#define uint4(...) metalsim::make<uint, 4>::from(__VA_ARGS__)
#define long2(...) metalsim::make<long, 2>::from(__VA_ARGS__)
#define long4(...) metalsim::make<long, 4>::from(__VA_ARGS__)
#define ulong2(...) metalsim::make<ulong, 2>::from(__VA_ARGS__)
#define ulong4(...) metalsim::make<ulong, 4>::from(__VA_ARGS__)
#define half2(...) metalsim::make<half, 2>::from(__VA_ARGS__)
#define half3(...) metalsim::make<half, 3>::from(__VA_ARGS__)
#define half4(...) metalsim::make<half, 4>::from(__VA_ARGS__)
#define bfloat2(...) metalsim::make<bfloat, 2>::from(__VA_ARGS__)
#define bfloat4(...) metalsim::make<bfloat, 4>::from(__VA_ARGS__)
#define float2(...) metalsim::make<float, 2>::from(__VA_ARGS__)
#define float3(...) metalsim::make<float, 3>::from(__VA_ARGS__)
#define float4(...) metalsim::make<float, 4>::from(__VA_ARGS__)

#endif
