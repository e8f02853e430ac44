/* From what a dispatch binds to the arguments of a kernel. The generated end of every library names, for
 * each parameter, what its attribute said; types are the compiler's own knowledge. */
#ifndef METALSIM_BINDING_H
#define METALSIM_BINDING_H

namespace metalsim
{

template <class F> struct signature;
template <class... A> struct signature<void(A...)> {
    template <int i, class First, class... More> struct pick {
        typedef typename pick<i - 1, More...>::type type;
    };
    template <class First, class... More> struct pick<0, First, More...> {
        typedef First type;
    };
    template <int i> using argument = typename pick<i, A...>::type;
};

enum space { no_space, device_space, threadgroup_space, constant_space };

/* A parameter's address space, and the bytes that it reaches at least. */
template <class T> struct reach {
    static constexpr space where = no_space;
    static constexpr ulong bytes = 0;
};
#define METALSIM_REACH(qualifier, place)             \
    template <class T> struct reach<qualifier T *> { \
        static constexpr space where = place;        \
        static constexpr ulong bytes = sizeof(T);    \
        static METAL_FUNC qualifier T *bind(void *p) \
        {                                            \
            return (qualifier T *)p;                 \
        }                                            \
    };                                               \
    template <class T> struct reach<qualifier T &> { \
        static constexpr space where = place;        \
        static constexpr ulong bytes = sizeof(T);    \
        static METAL_FUNC qualifier T &bind(void *p) \
        {                                            \
            return *(qualifier T *)p;                \
        }                                            \
    };
METALSIM_REACH(device, device_space)
METALSIM_REACH(threadgroup, threadgroup_space)
METALSIM_REACH(constant, constant_space)
#undef METALSIM_REACH

template <class T> METAL_FUNC decltype(auto) buffer(void *p)
{
    static_assert(reach<T>::where == device_space || reach<T>::where == constant_space,
                  "a [[buffer(n)]] is a device or constant pointer, or a reference");
    return reach<T>::bind(p);
}

template <class T> METAL_FUNC decltype(auto) threadgroup_memory(void *p)
{
    static_assert(reach<T>::where == threadgroup_space, "a TG_ARG(n) is a threadgroup pointer");
    return reach<T>::bind(p);
}

/* A position in the type that the parameter has. */
template <class T> struct position {
    static METAL_FUNC T from(metalsim_coord p)
    {
        return T(p.x);
    }
};
template <class T> struct position<metal::vec<T, 2>> {
    static METAL_FUNC metal::vec<T, 2> from(metalsim_coord p)
    {
        return metal::vec<T, 2>{T(p.x), T(p.y)};
    }
};
template <class T> struct position<metal::vec<T, 3>> {
    static METAL_FUNC metal::vec<T, 3> from(metalsim_coord p)
    {
        return metal::vec<T, 3>{T(p.x), T(p.y), T(p.z)};
    }
};

METAL_FUNC metalsim_coord times(metalsim_coord a, metalsim_coord b)
{
    return {a.x * b.x, a.y * b.y, a.z * b.z};
}

METAL_FUNC uint simdgroups(metalsim_coord threads)
{
    return (threads.x * threads.y * threads.z + METALSIM_SIMD_WIDTH - 1) / METALSIM_SIMD_WIDTH;
}

/* The positions, by the names of their attributes. */
METALSIM_OURS metalsim_coord thread_position_in_threadgroup()
{
    return lane()->position;
}
METALSIM_OURS metalsim_coord threadgroup_position_in_grid()
{
    return lane()->grid->position;
}
METALSIM_OURS metalsim_coord threads_per_threadgroup()
{
    return lane()->grid->threads;
}
METALSIM_OURS metalsim_coord threadgroups_per_grid()
{
    return lane()->grid->threadgroups;
}
METALSIM_OURS metalsim_coord threads_per_grid()
{
    return times(lane()->grid->threadgroups, lane()->grid->threads);
}
METALSIM_OURS metalsim_coord thread_position_in_grid()
{
    metalsim_coord group = times(lane()->grid->position, lane()->grid->threads), own = lane()->position;
    return {group.x + own.x, group.y + own.y, group.z + own.z};
}
METALSIM_OURS metalsim_coord thread_index_in_threadgroup()
{
    return {lane()->index, 0, 0};
}
METALSIM_OURS metalsim_coord thread_index_in_simdgroup()
{
    return {lane()->lane, 0, 0};
}
METALSIM_OURS metalsim_coord simdgroup_index_in_threadgroup()
{
    return {lane()->index / METALSIM_SIMD_WIDTH, 0, 0};
}
METALSIM_OURS metalsim_coord threads_per_simdgroup()
{
    return {METALSIM_SIMD_WIDTH, 0, 0};
}
METALSIM_OURS metalsim_coord simdgroups_per_threadgroup()
{
    return {simdgroups(lane()->grid->threads), 0, 0};
}

} // namespace metalsim
#endif
