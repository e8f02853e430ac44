/* Arithmetic functions of MSL, for scalars and vectors of float, half and integers. fast:: and precise::
 * are the same here: this machine is always precise. */
#ifndef METALSIM_MATH_H
#define METALSIM_MATH_H

namespace metal
{

#define METALSIM_UNARY(name, builtin)         \
    template <class T> METAL_FUNC T name(T x) \
    {                                         \
        return builtin(x);                    \
    }
METALSIM_UNARY(abs, __builtin_elementwise_abs)
METALSIM_UNARY(fabs, __builtin_elementwise_abs)
METALSIM_UNARY(ceil, __builtin_elementwise_ceil)
METALSIM_UNARY(floor, __builtin_elementwise_floor)
METALSIM_UNARY(trunc, __builtin_elementwise_trunc)
METALSIM_UNARY(rint, __builtin_elementwise_rint)
METALSIM_UNARY(round, __builtin_elementwise_round)
#undef METALSIM_UNARY

METAL_FUNC uint clz(uint x)
{
    return x ? uint(__builtin_clz(x)) : 32u;
}

METAL_FUNC uint popcount(uint x)
{
    return uint(__builtin_popcount(x));
}

METAL_FUNC uint ctz(uint x)
{
    return x ? uint(__builtin_ctz(x)) : 32u;
}

#if defined(METALSIM_COUNTED)
extern "C" __attribute__((const, nothrow)) uint cost_mulhi(uint x, uint y);
METAL_FUNC uint mulhi(uint x, uint y)
{
    return cost_mulhi(x, y);
}
#else
METAL_FUNC uint mulhi(uint x, uint y)
{
    return uint(ulong(x) * y >> 32);
}
#endif

template <class T> METAL_FUNC T max(T x, T y)
{
    return __builtin_elementwise_max(x, y);
}

template <class T> METAL_FUNC T min(T x, T y)
{
    return __builtin_elementwise_min(x, y);
}

template <class T> METAL_FUNC T fmax(T x, T y)
{
    return __builtin_elementwise_max(x, y);
}

template <class T> METAL_FUNC T fmin(T x, T y)
{
    return __builtin_elementwise_min(x, y);
}

template <class T> METAL_FUNC T max3(T x, T y, T z)
{
    return max(x, max(y, z));
}

template <class T> METAL_FUNC T clamp(T x, T low, T high)
{
    return min(max(x, low), high);
}

template <class T> METAL_FUNC T fma(T x, T y, T z)
{
    return __builtin_elementwise_fma(x, y, z);
}

template <class T> METAL_FUNC T mix(T x, T y, T a)
{
    return x + (y - x) * a;
}

METAL_FUNC float select(float no, float yes, bool condition)
{
    return condition ? yes : no;
}

METAL_FUNC half select(half no, half yes, bool condition)
{
    return condition ? yes : no;
}

METAL_FUNC int select(int no, int yes, bool condition)
{
    return condition ? yes : no;
}

METAL_FUNC uint select(uint no, uint yes, bool condition)
{
    return condition ? yes : no;
}

METAL_FUNC bool isnan(float x)
{
    uint u = as_type<uint>(x);
    return (u & 0x7fffffffu) > 0x7f800000u;
}

METAL_FUNC bool isinf(float x)
{
    uint u = as_type<uint>(x);
    return (u & 0x7fffffffu) == 0x7f800000u;
}

METAL_FUNC bool isfinite(float x)
{
    uint u = as_type<uint>(x);
    return (u & 0x7fffffffu) < 0x7f800000u;
}

template <class T, int N> METAL_FUNC T dot(metal::vec<T, N> x, metal::vec<T, N> y)
{
    T sum = x[0] * y[0];
    for (int i = 1; i < N; i++)
        sum += x[i] * y[i];
    return sum;
}

/* A comparison of vectors gives clang a vector of integers. */
template <class T, int N> METAL_FUNC bool all(metal::vec<T, N> x)
{
    bool every = true;
    for (int i = 0; i < N; i++)
        every = every && x[i];
    return every;
}

template <class T, int N> METAL_FUNC bool any(metal::vec<T, N> x)
{
    bool some = false;
    for (int i = 0; i < N; i++)
        some = some || x[i];
    return some;
}

/* Each exists as metal::, metal::fast:: and metal::precise::. */
#define METALSIM_FLOATING(name, builtin)      \
    template <class T> METAL_FUNC T name(T x) \
    {                                         \
        return builtin(x);                    \
    }                                         \
    namespace fast                            \
    {                                         \
    using metal::name;                        \
    }                                         \
    namespace precise                         \
    {                                         \
    using metal::name;                        \
    }
METALSIM_FLOATING(exp, __builtin_elementwise_exp)
METALSIM_FLOATING(exp2, __builtin_elementwise_exp2)
METALSIM_FLOATING(log, __builtin_elementwise_log)
METALSIM_FLOATING(log2, __builtin_elementwise_log2)
METALSIM_FLOATING(sin, __builtin_elementwise_sin)
METALSIM_FLOATING(cos, __builtin_elementwise_cos)
METALSIM_FLOATING(tanh, __builtin_elementwise_tanh)
METALSIM_FLOATING(sqrt, __builtin_elementwise_sqrt)
METALSIM_FLOATING(rsqrt, T(1) / __builtin_elementwise_sqrt)
#undef METALSIM_FLOATING

template <class T> METAL_FUNC T divide(T x, T y)
{
    return x / y;
}

template <class T> METAL_FUNC T pow(T x, T y)
{
    return __builtin_elementwise_pow(x, y);
}

namespace fast
{
using metal::clamp;
using metal::divide;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
using metal::pow;
} // namespace fast
namespace precise
{
using metal::clamp;
using metal::divide;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
using metal::pow;
} // namespace precise

} // namespace metal
#endif
