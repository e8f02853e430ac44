/* What the compiler's instrumentation calls in a checked library, sent on to the runtime. It is clang's
 * for its thread and undefined-behaviour sanitizers, whose own runtimes are not linked. */
#ifndef METALSIM_INSTRUMENT_H
#define METALSIM_INSTRUMENT_H

#define METALSIM_SITE __builtin_return_address(0)

extern "C" {

METALSIM_OURS void __tsan_init()
{
}

#define METALSIM_ACCESS(name, bytes)                        \
    METALSIM_OURS void __tsan_##name##read##bytes(void *p)  \
    {                                                       \
        metalsim_functions.read(p, bytes, METALSIM_SITE);   \
    }                                                       \
    METALSIM_OURS void __tsan_##name##write##bytes(void *p) \
    {                                                       \
        metalsim_functions.write(p, bytes, METALSIM_SITE);  \
    }
METALSIM_ACCESS(, 1)
METALSIM_ACCESS(, 2)
METALSIM_ACCESS(, 4)
METALSIM_ACCESS(, 8)
METALSIM_ACCESS(, 16)
METALSIM_ACCESS(unaligned_, 2)
METALSIM_ACCESS(unaligned_, 4)
METALSIM_ACCESS(unaligned_, 8)
METALSIM_ACCESS(unaligned_, 16)
#undef METALSIM_ACCESS

METALSIM_OURS void *__tsan_memcpy(void *to, const void *from, unsigned long bytes)
{
    metalsim_functions.read(from, bytes, METALSIM_SITE);
    metalsim_functions.write(to, bytes, METALSIM_SITE);
    return __builtin_memcpy(to, from, bytes);
}

METALSIM_OURS void *__tsan_memmove(void *to, const void *from, unsigned long bytes)
{
    metalsim_functions.read(from, bytes, METALSIM_SITE);
    metalsim_functions.write(to, bytes, METALSIM_SITE);
    return __builtin_memmove(to, from, bytes);
}

METALSIM_OURS void *__tsan_memset(void *to, int byte, unsigned long bytes)
{
    metalsim_functions.write(to, bytes, METALSIM_SITE);
    return __builtin_memset(to, byte, bytes);
}

METALSIM_OURS unsigned __tsan_atomic32_load(const volatile unsigned *p, int)
{
    metalsim_functions.atomic((const void *)p, 4, METALSIM_SITE);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

METALSIM_OURS void __tsan_atomic32_store(volatile unsigned *p, unsigned x, int)
{
    metalsim_functions.atomic((const void *)p, 4, METALSIM_SITE);
    __atomic_store_n(p, x, __ATOMIC_RELAXED);
}

/* A counter of coverage: a kernel has no atomics of 64 bits. */
METALSIM_OURS unsigned long __tsan_atomic64_fetch_add(volatile unsigned long *p, unsigned long x, int)
{
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}

#define METALSIM_ATOMIC(name, builtin)                                                   \
    METALSIM_OURS unsigned __tsan_atomic32_##name(volatile unsigned *p, unsigned x, int) \
    {                                                                                    \
        metalsim_functions.atomic((const void *)p, 4, METALSIM_SITE);                    \
        return builtin(p, x, __ATOMIC_RELAXED);                                          \
    }
METALSIM_ATOMIC(exchange, __atomic_exchange_n)
METALSIM_ATOMIC(fetch_add, __atomic_fetch_add)
METALSIM_ATOMIC(fetch_sub, __atomic_fetch_sub)
METALSIM_ATOMIC(fetch_and, __atomic_fetch_and)
METALSIM_ATOMIC(fetch_or, __atomic_fetch_or)
METALSIM_ATOMIC(fetch_xor, __atomic_fetch_xor)
#undef METALSIM_ATOMIC

METALSIM_OURS unsigned __tsan_atomic32_compare_exchange_val(volatile unsigned *p, unsigned old, unsigned x, int, int)
{
    metalsim_functions.atomic((const void *)p, 4, METALSIM_SITE);
    __atomic_compare_exchange_n(p, &old, x, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return old;
}

#define METALSIM_HANDLER(name, what)                       \
    METALSIM_OURS void __ubsan_handle_##name()             \
    {                                                      \
        metalsim_functions.undefined(what, METALSIM_SITE); \
    }
METALSIM_HANDLER(type_mismatch_v1, "an access that is not aligned for its type, or through a null pointer")
METALSIM_HANDLER(add_overflow, "an addition of signed integers overflows")
METALSIM_HANDLER(sub_overflow, "a subtraction of signed integers overflows")
METALSIM_HANDLER(mul_overflow, "a product of signed integers overflows")
METALSIM_HANDLER(negate_overflow, "the negative of a signed integer overflows")
METALSIM_HANDLER(divrem_overflow, "a division of integers by 0, or one that overflows")
METALSIM_HANDLER(shift_out_of_bounds, "a shift by as many bits as the type has or more, or by less than 0")
METALSIM_HANDLER(out_of_bounds, "an index beyond the end of an array")
METALSIM_HANDLER(float_cast_overflow, "a floating-point number that its integer type cannot hold")
#undef METALSIM_HANDLER

} // extern "C"
#endif
