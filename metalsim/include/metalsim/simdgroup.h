/* Barriers, and what the 32 lanes of a simdgroup do together. Every lane must take part: an operation
 * that some lanes do not reach is reported, though Metal would let inactive lanes be absent. */
#ifndef METALSIM_SIMDGROUP_H
#define METALSIM_SIMDGROUP_H

namespace metalsim
{

struct add {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return a + b;
    }
};
struct multiply {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return a * b;
    }
};
struct larger {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return __builtin_elementwise_max(a, b);
    }
};
struct smaller {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return __builtin_elementwise_min(a, b);
    }
};
struct both {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return a & b;
    }
};
struct either {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return a | b;
    }
};
struct differ {
    template <class T> METALSIM_OURS T operator()(T a, T b) const
    {
        return a ^ b;
    }
};

} // namespace metalsim

#if defined(METALSIM_COUNTED)
#include "metalsim/counted.h"
#else
namespace metalsim
{

template <class T> struct may_shuffle {
    static constexpr bool value = sizeof(typename element_of<T>::type) <= 4 && sizeof(T) <= 16;
};

template <class T> METALSIM_OURS void give(T x)
{
    __builtin_memcpy(slots_to_give() + lane()->lane * 16, &x, sizeof x);
}

template <class T> METALSIM_OURS T take(uint from)
{
    T x;
    __builtin_memcpy(&x, slots_to_take() + (from & 31) * 16, sizeof x);
    return x;
}

/* Every lane gives x and takes what lane `from` gave. */
template <class T> METAL_FUNC T exchange(T x, uint from)
{
    static_assert(may_shuffle<T>::value, "simdgroup functions take scalars and vectors of at most 32 bits an element");
    give(x);
    meet(nullptr);
    return take<T>(from);
}

/* The same from the lane whose number differs in the bits of the mask. */
template <class T> METAL_FUNC T exchange_xor(T x, uint mask)
{
    return exchange(x, lane()->lane ^ mask);
}

template <class T, class F> METALSIM_OURS T reduce_lanes(F f, T first, uint count)
{
    T x = first;
    for (uint i = 0; i < count; i++)
        x = f(x, take<T>(i));
    return x;
}

/* Reduces by halves, as the GPU does: (0 16) (1 17) ..., then (0 8) ... */
template <class T, class F> METALSIM_OURS T reduce_halves(F f)
{
    T x[32];
    for (uint i = 0; i < 32; i++)
        x[i] = take<T>(i);
    for (uint half_of = 16; half_of; half_of /= 2)
        for (uint i = 0; i < half_of; i++)
            x[i] = f(x[i], x[i + half_of]);
    return x[0];
}

template <class T, class F> METAL_FUNC T reduce(T x, F f)
{
    static_assert(may_shuffle<T>::value, "simdgroup functions take scalars and vectors of at most 32 bits an element");
    give(x);
    meet(nullptr);
    return reduce_halves<T>(f);
}

METALSIM_OURS uint vote()
{
    uint votes = 0;
    for (uint i = 0; i < 32; i++)
        votes |= uint(take<bool>(i)) << i;
    return votes;
}

METAL_FUNC uint ballot(bool x)
{
    give(x);
    meet(nullptr);
    return vote();
}

METALSIM_OURS uint own_lane()
{
    return lane()->lane;
}

} // namespace metalsim
#endif

namespace metalsim
{

/* As exchange for lanes 0 to 31; the others keep their own. */
template <class T> METAL_FUNC T exchange_or_keep(T x, int from)
{
    T other = exchange(x, uint(from));
    return from >= 0 && from < 32 ? other : x;
}

} // namespace metalsim

namespace metal
{

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b)
{
    return mem_flags(uint(a) | uint(b));
}

METAL_FUNC void threadgroup_barrier(mem_flags flags)
{
    metalsim::threadgroup_barrier(uint(flags));
}

METAL_FUNC void simdgroup_barrier(mem_flags flags)
{
    metalsim::simdgroup_barrier(uint(flags));
}

template <class T> METAL_FUNC T simd_shuffle(T x, ushort from)
{
    return metalsim::exchange(x, from);
}

template <class T> METAL_FUNC T simd_shuffle_xor(T x, ushort mask)
{
    return metalsim::exchange_xor(x, mask);
}

template <class T> METAL_FUNC T simd_shuffle_up(T x, ushort delta)
{
    return metalsim::exchange_or_keep(x, int(metalsim::own_lane()) - int(delta));
}

template <class T> METAL_FUNC T simd_shuffle_down(T x, ushort delta)
{
    return metalsim::exchange_or_keep(x, int(metalsim::own_lane()) + int(delta));
}

template <class T> METAL_FUNC T simd_shuffle_rotate_up(T x, ushort delta)
{
    return metalsim::exchange(x, metalsim::own_lane() - delta);
}

template <class T> METAL_FUNC T simd_shuffle_rotate_down(T x, ushort delta)
{
    return metalsim::exchange(x, metalsim::own_lane() + delta);
}

template <class T> METAL_FUNC T simd_broadcast(T x, ushort from)
{
    return metalsim::exchange(x, from);
}

template <class T> METAL_FUNC T simd_broadcast_first(T x)
{
    return metalsim::exchange(x, 0u);
}

template <class T> METAL_FUNC T simd_sum(T x)
{
    return metalsim::reduce(x, metalsim::add());
}

template <class T> METAL_FUNC T simd_product(T x)
{
    return metalsim::reduce(x, metalsim::multiply());
}

template <class T> METAL_FUNC T simd_max(T x)
{
    return metalsim::reduce(x, metalsim::larger());
}

template <class T> METAL_FUNC T simd_min(T x)
{
    return metalsim::reduce(x, metalsim::smaller());
}

template <class T> METAL_FUNC T simd_and(T x)
{
    return metalsim::reduce(x, metalsim::both());
}

template <class T> METAL_FUNC T simd_or(T x)
{
    return metalsim::reduce(x, metalsim::either());
}

template <class T> METAL_FUNC T simd_xor(T x)
{
    return metalsim::reduce(x, metalsim::differ());
}

#if !defined(METALSIM_COUNTED)
template <class T> METAL_FUNC T simd_prefix_exclusive_sum(T x)
{
    metalsim::give(x);
    metalsim::meet(nullptr);
    return metalsim::reduce_lanes(metalsim::add(), T(0), metalsim::own_lane());
}

template <class T> METAL_FUNC T simd_prefix_inclusive_sum(T x)
{
    metalsim::give(x);
    metalsim::meet(nullptr);
    return metalsim::reduce_lanes(metalsim::add(), T(0), metalsim::own_lane() + 1);
}
#endif

METAL_FUNC bool simd_all(bool x)
{
    return metalsim::ballot(x) == ~0u;
}

METAL_FUNC bool simd_any(bool x)
{
    return metalsim::ballot(x) != 0;
}

METAL_FUNC bool simd_is_first()
{
    return metalsim::own_lane() == 0;
}

} // namespace metal
#endif
