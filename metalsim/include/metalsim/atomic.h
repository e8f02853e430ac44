/* Atomics of MSL: relaxed, on int and uint in device and threadgroup memory. */
#ifndef METALSIM_ATOMIC_H
#define METALSIM_ATOMIC_H

namespace metal
{

enum memory_order { memory_order_relaxed };

typedef _Atomic(int) atomic_int;
typedef _Atomic(uint) atomic_uint;

#define METALSIM_ATOMIC(space, A, T)                                                                      \
    METAL_FUNC T atomic_load_explicit(const volatile space A *p, memory_order)                            \
    {                                                                                                     \
        return __c11_atomic_load((const space A *)p, __ATOMIC_RELAXED);                                   \
    }                                                                                                     \
    METAL_FUNC void atomic_store_explicit(volatile space A *p, T x, memory_order)                         \
    {                                                                                                     \
        __c11_atomic_store(p, x, __ATOMIC_RELAXED);                                                       \
    }                                                                                                     \
    METAL_FUNC T atomic_exchange_explicit(volatile space A *p, T x, memory_order)                         \
    {                                                                                                     \
        return __c11_atomic_exchange(p, x, __ATOMIC_RELAXED);                                             \
    }                                                                                                     \
    METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile space A *p, T *old, T x, memory_order, \
                                                          memory_order)                                   \
    {                                                                                                     \
        return __c11_atomic_compare_exchange_weak(p, old, x, __ATOMIC_RELAXED, __ATOMIC_RELAXED);         \
    }                                                                                                     \
    METALSIM_FETCH(space, A, T, add)                                                                      \
    METALSIM_FETCH(space, A, T, sub)                                                                      \
    METALSIM_FETCH(space, A, T, and)                                                                      \
    METALSIM_FETCH(space, A, T, or)                                                                       \
    METALSIM_FETCH(space, A, T, xor)
#define METALSIM_FETCH(space, A, T, operation)                                               \
    METAL_FUNC T atomic_fetch_##operation##_explicit(volatile space A *p, T x, memory_order) \
    {                                                                                        \
        return __c11_atomic_fetch_##operation(p, x, __ATOMIC_RELAXED);                       \
    }
METALSIM_ATOMIC(device, atomic_int, int)
METALSIM_ATOMIC(device, atomic_uint, uint)
METALSIM_ATOMIC(threadgroup, atomic_int, int)
METALSIM_ATOMIC(threadgroup, atomic_uint, uint)
#undef METALSIM_ATOMIC
#undef METALSIM_FETCH

} // namespace metal
#endif
