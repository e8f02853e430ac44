/* x86 is asked through cpuid, and its operating system through xgetbv: registers that it does not save
 * may not be used. Every arm64 CPU has NEON; what else it has the operating system says, which also saves the
 * registers. */
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

static const char *const names[MFA_CPU_ISA_COUNT] = {
    [MFA_CPU_SCALAR] = "scalar",         [MFA_CPU_AVX2] = "avx2",       [MFA_CPU_AVX512] = "avx512",
    [MFA_CPU_AVX512BF16] = "avx512bf16", [MFA_CPU_AMXBF16] = "amxbf16", [MFA_CPU_NEON] = "neon",
    [MFA_CPU_NEONBF16] = "neonbf16"};

const char *mfa_cpu_isa_name(mfa_cpu_isa isa)
{
    return names[isa];
}

#if defined(__x86_64__) || defined(__i386__)
#define BIT(n) (UINT32_C(1) << (n))

enum {
    XMM_YMM = 0x06,         /* bits of the register XCR0: the state that the system saves */
    OPMASK_AND_ZMM = 0xe0
};

static uint32_t saved_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int x86_present(mfa_cpu_isa isa)
{
    const uint32_t fma_osxsave_avx_f16c = BIT(12) | BIT(27) | BIT(28) | BIT(29); /* leaf 1, ecx */
    const uint32_t avx2 = BIT(5), f_dq_bw_vl = BIT(16) | BIT(17) | BIT(30) | BIT(31); /* leaf 7, ebx */
    const uint32_t avx512_bf16 = BIT(5);                                               /* leaf 7.1, eax */
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & fma_osxsave_avx_f16c) != fma_osxsave_avx_f16c)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    const uint32_t need = isa == MFA_CPU_AVX2 ? avx2 : avx2 | f_dq_bw_vl;
    const uint32_t need_saved = isa == MFA_CPU_AVX2 ? XMM_YMM : XMM_YMM | OPMASK_AND_ZMM;
    if ((b & need) != need || (saved_state() & need_saved) != need_saved)
        return 0;
    if (isa < MFA_CPU_AVX512BF16)
        return 1;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16))
        return 0;
    return isa < MFA_CPU_AMXBF16 || mfa_cpu_amx_present();
}
#elif defined(__aarch64__)
static int bf16_present(void)
{
#if defined(__linux__)
    const unsigned long hwcap2_bf16 = 1ul << 14;
    return (getauxval(AT_HWCAP2) & hwcap2_bf16) != 0;
#elif defined(__APPLE__)
    int present = 0;
    size_t size = sizeof present;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, NULL, 0) == 0 && present;
#else
    return 0;
#endif
}
#endif

int mfa_cpu_isa_present(mfa_cpu_isa isa)
{
    switch (isa) {
    case MFA_CPU_SCALAR: return 1;
#if defined(__x86_64__) || defined(__i386__)
    case MFA_CPU_AVX2:
    case MFA_CPU_AVX512:
    case MFA_CPU_AVX512BF16:
    case MFA_CPU_AMXBF16: return x86_present(isa);
#elif defined(__aarch64__)
    case MFA_CPU_NEON: return 1;
    case MFA_CPU_NEONBF16: return bf16_present();
#endif
    default: return 0;
    }
}

mfa_cpu_isa mfa_cpu_isa_named(const char *name)
{
    int isa = 0;
    while (isa < MFA_CPU_ISA_COUNT && strcmp(name, names[isa]) != 0)
        isa++;
    return (mfa_cpu_isa)isa;
}

static mfa_status choose_named(const char *name, const char *field, mfa_cpu_isa *isa)
{
    const mfa_cpu_isa named = mfa_cpu_isa_named(name);
    if (named == MFA_CPU_ISA_COUNT)
        return mfa_fail(MFA_INVALID,
                        "%s is \"%s\"; it must be scalar, avx2, avx512, avx512bf16, amxbf16, neon or neonbf16", field,
                        name);
    if (mfa_cpu_isa_present(named)) {
        *isa = named;
        return MFA_OK;
    }
    char present[64] = "";
    for (int i = 0; i < MFA_CPU_ISA_COUNT; i++)
        if (mfa_cpu_isa_present((mfa_cpu_isa)i)) {
            const size_t length = strlen(present);
            snprintf(present + length, sizeof present - length, "%s%s", length ? ", " : "", names[i]);
        }
    return mfa_fail(MFA_UNAVAILABLE, "%s is %s; this machine has %s", field, name, present);
}

mfa_status mfa_cpu_isa_choose(const char *mask, mfa_cpu_isa *isa)
{
    if (mask)
        return choose_named(mask, "isa", isa);
    const char *environment = getenv("MFA_ISA");
    if (environment && *environment)
        return choose_named(environment, "MFA_ISA", isa);
    int best = MFA_CPU_ISA_COUNT - 1;
    while (!mfa_cpu_isa_present((mfa_cpu_isa)best))
        best--;
    *isa = (mfa_cpu_isa)best;
    return MFA_OK;
}
