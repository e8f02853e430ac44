/* The floating-point mode of a thread: how it rounds, whether subnormal numbers count as 0, which exceptions trap. The
 * kernels need rounding to nearest (exp2 rounds by adding a large number), and compute infinities and NaNs on purpose.
 * So a run has a mode of its own: to nearest, no traps, and the caller's setting for subnormals, which are slow on some
 * CPUs. */
#ifndef MFA_CPU_FLOAT_MODE_H
#define MFA_CPU_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>

typedef uint32_t mfa_cpu_float_mode; /* MXCSR without the exception flags */
#define MFA_CPU_FLOAT_PLAIN 0x1f80u  /* to nearest, nothing traps */
#define MFA_CPU_FLOAT_FLUSH 0x8040u  /* FTZ, DAZ */
#define MFA_CPU_FLOAT_FLAGS 0x003fu

static inline mfa_cpu_float_mode mfa_cpu_float_mode_get(void)
{
    return _mm_getcsr() & ~MFA_CPU_FLOAT_FLAGS;
}

static inline void mfa_cpu_float_mode_set(mfa_cpu_float_mode mode)
{
    _mm_setcsr(mode | (_mm_getcsr() & MFA_CPU_FLOAT_FLAGS));
}
#elif defined(__aarch64__)
typedef uint64_t mfa_cpu_float_mode; /* FPCR */
#define MFA_CPU_FLOAT_PLAIN UINT64_C(0)
#define MFA_CPU_FLOAT_FLUSH (UINT64_C(1) << 24) /* FZ */

static inline mfa_cpu_float_mode mfa_cpu_float_mode_get(void)
{
    mfa_cpu_float_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

static inline void mfa_cpu_float_mode_set(mfa_cpu_float_mode mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}
#else
#include <fenv.h>

typedef int mfa_cpu_float_mode; /* how it rounds */
#define MFA_CPU_FLOAT_PLAIN FE_TONEAREST
#define MFA_CPU_FLOAT_FLUSH 0

static inline mfa_cpu_float_mode mfa_cpu_float_mode_get(void)
{
    return fegetround();
}

static inline void mfa_cpu_float_mode_set(mfa_cpu_float_mode mode)
{
    fesetround(mode);
}
#endif

/* The mode of a run whose caller has `mode`. */
static inline mfa_cpu_float_mode mfa_cpu_float_mode_of_run(mfa_cpu_float_mode mode)
{
    return MFA_CPU_FLOAT_PLAIN | (mode & MFA_CPU_FLOAT_FLUSH);
}

#endif
