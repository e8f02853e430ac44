/* On x86, cpuid says what the CPU has, and xgetbv which registers the operating system saves: others must not be used.
 * Every arm64 CPU has NEON; the operating system, which also saves the registers, says what else it has. */
#include "cpu/device.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cpu/amx.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

enum feature {
    AVX2 = 1,   /* AVX2, FMA and F16C */
    AVX512 = 2, /* AVX-512 F, DQ, BW and VL */
    AVX512_VNNI = 4,
    AVX512_BF16 = 8,
    AMX_BF16 = 16, /* AMX_TILE and AMX_BF16 */
    NEON = 32,
    NEON_BF16 = 64, /* FEAT_BF16 */
    NEON_I8MM = 128 /* FEAT_I8MM */
};

static const struct {
    const char *name;
    unsigned needs; /* a set of enum feature */
} isas[MFA_CPU_ISA_COUNT] = {
#define ISA(constant, name, needs) {#name, needs},
#include "cpu/isas.inc"
#undef ISA
};

const char *mfa_cpu_isa_name(int isa)
{
    return isa >= 0 && isa < MFA_CPU_ISA_COUNT ? isas[isa].name : NULL;
}

#if defined(__x86_64__) || defined(__i386__)
#define BIT(n) (UINT32_C(1) << (n))

enum {
    XMM_YMM = 0x06, /* bits of the register XCR0: the state that the system saves */
    OPMASK_AND_ZMM = 0xe0
};

static uint32_t saved_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has_feature(enum feature feature)
{
    const uint32_t fma_osxsave_avx_f16c = BIT(12) | BIT(27) | BIT(28) | BIT(29);      /* leaf 1, ecx */
    const uint32_t avx2 = BIT(5), f_dq_bw_vl = BIT(16) | BIT(17) | BIT(30) | BIT(31); /* leaf 7, ebx */
    const uint32_t avx512_vnni = BIT(11);                                             /* leaf 7, ecx */
    const uint32_t avx512_bf16 = BIT(5);                                              /* leaf 7.1, eax */
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & fma_osxsave_avx_f16c) != fma_osxsave_avx_f16c)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    switch (feature) {
    case AVX2: return (b & avx2) && (saved_state() & XMM_YMM) == XMM_YMM;
    case AVX512: return (b & f_dq_bw_vl) == f_dq_bw_vl && (saved_state() & OPMASK_AND_ZMM) == OPMASK_AND_ZMM;
    case AVX512_VNNI: return (c & avx512_vnni) != 0;
    case AVX512_BF16: return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16);
    case AMX_BF16: return mfa_cpu_amx_present();
    default: return 0;
    }
}
#elif defined(__aarch64__)
#if defined(__linux__)
static int has_hwcap2(int bit)
{
    return (getauxval(AT_HWCAP2) >> bit & 1) != 0;
}

#define PRESENT(bit, name) has_hwcap2(bit)
#elif defined(__APPLE__)
static int has_optional(const char *name)
{
    int present = 0;
    size_t size = sizeof present;
    return sysctlbyname(name, &present, &size, NULL, 0) == 0 && present;
}

#define PRESENT(bit, name) has_optional("hw.optional.arm." name)
#else
#define PRESENT(bit, name) 0
#endif

static int has_feature(enum feature feature)
{
    switch (feature) {
    case NEON: return 1;
    case NEON_BF16: return PRESENT(14, "FEAT_BF16");
    case NEON_I8MM: return PRESENT(13, "FEAT_I8MM");
    default: return 0;
    }
}
#else
static int has_feature(enum feature feature)
{
    (void)feature;
    return 0;
}
#endif

int mfa_cpu_isa_present(mfa_cpu_isa isa)
{
    for (unsigned left = isas[isa].needs; left; left &= left - 1) /* AMX last, which a process has to ask for */
        if (!has_feature((enum feature)(left & -left)))
            return 0;
    return 1;
}

mfa_cpu_isa mfa_cpu_isa_named(const char *name)
{
    int isa = 0;
    while (isa < MFA_CPU_ISA_COUNT && strcmp(name, isas[isa].name) != 0)
        isa++;
    return (mfa_cpu_isa)isa;
}

enum { LIST = 128 }; /* bytes of all names, and what stands between them */

/* "scalar, avx2": those present, or all. `last` is what stands before the last one. */
static void list_isas(int all, const char *last, char text[LIST])
{
    int count = 0, length = 0;
    for (int isa = 0; isa < MFA_CPU_ISA_COUNT; isa++)
        count += all || mfa_cpu_isa_present((mfa_cpu_isa)isa);
    text[0] = '\0';
    for (int isa = 0, n = 0; isa < MFA_CPU_ISA_COUNT && length < LIST; isa++)
        if (all || mfa_cpu_isa_present((mfa_cpu_isa)isa)) {
            const char *between = n == 0 ? "" : n == count - 1 ? last : ", ";
            length += snprintf(text + length, (size_t)(LIST - length), "%s%s", between, isas[isa].name);
            n++;
        }
}

static mfa_status choose_named(const char *name, const char *field, mfa_cpu_isa *isa)
{
    const mfa_cpu_isa named = mfa_cpu_isa_named(name);
    char list[LIST];
    if (named == MFA_CPU_ISA_COUNT) {
        list_isas(1, " or ", list);
        return mfa_fail(MFA_INVALID, "%s is \"%s\"; it must be %s", field, name, list);
    }
    if (!mfa_cpu_isa_present(named)) {
        list_isas(0, ", ", list);
        return mfa_fail(MFA_UNAVAILABLE, "%s is %s; this machine has %s", field, name, list);
    }
    *isa = named;
    return MFA_OK;
}

mfa_status mfa_cpu_isa_choose(const char *cap, mfa_cpu_isa *isa)
{
    if (cap)
        return choose_named(cap, "isa", isa);
    const char *environment = getenv("MFA_ISA");
    if (environment && *environment)
        return choose_named(environment, "MFA_ISA", isa);
    int best = MFA_CPU_ISA_COUNT - 1;
    while (!mfa_cpu_isa_present((mfa_cpu_isa)best))
        best--;
    *isa = (mfa_cpu_isa)best;
    return MFA_OK;
}
