/* The tile registers are 8 KiB of state that Linux saves only for processes that have requested it, once for all their
 * threads (Linux's Documentation/arch/x86/xstate.rst). No such call is known for other systems. */
#define _GNU_SOURCE /* for syscall */
#include "cpu/amx.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    ARCH_REQUEST_STATE = 0x1023, /* ARCH_REQ_XCOMP_PERM */
    TILE_DATA = 18               /* XFEATURE_XTILEDATA */
};

int mfa_cpu_amx_present(void)
{
    const uint32_t amx_bf16 = UINT32_C(1) << 22, amx_tile = UINT32_C(1) << 24; /* leaf 7, edx */
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile))
        return 0;
    return syscall(SYS_arch_prctl, ARCH_REQUEST_STATE, TILE_DATA) == 0;
}
#else
int mfa_cpu_amx_present(void)
{
    return 0;
}
#endif
