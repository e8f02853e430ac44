/* The way from a kernel's code to the runtime: the lane that is running, and the runtime's functions.
 * In a checked library this code must neither be instrumented nor be inlined into code that is. */
#ifndef METALSIM_LANE_H
#define METALSIM_LANE_H

#if defined(METALSIM_CHECKED)
#define METALSIM_UNWATCHED __attribute__((disable_sanitizer_instrumentation, no_sanitize("undefined")))
#define METALSIM_OURS METALSIM_UNWATCHED __attribute__((noinline))
#else
#define METALSIM_UNWATCHED
#define METALSIM_OURS inline __attribute__((always_inline))
#endif

extern "C" {
#include "metalsim/abi.h"
}

/* Where a lane calls from tells whether all lanes are at the same operation. So a call is neither copied, as into both
 * branches before it, nor merged with another, nor made to depend on more conditions than in the text. The function is
 * weak lest it be inlined: clang forgets noinline where it sees noduplicate. */
#define METALSIM_TOGETHER METALSIM_UNWATCHED __attribute__((weak, convergent, nomerge, noduplicate))

static metalsim_runtime metalsim_functions;

namespace metalsim
{

METALSIM_OURS metalsim_lane *lane()
{
    return metalsim_self();
}

METALSIM_TOGETHER void meet(void (*operate)(unsigned char *slots))
{
    metalsim_functions.meet(operate, __builtin_return_address(0));
}

METALSIM_TOGETHER void simdgroup_barrier(unsigned memory)
{
    metalsim_functions.simdgroup_barrier(memory, __builtin_return_address(0));
}

METALSIM_TOGETHER void threadgroup_barrier(unsigned memory)
{
    metalsim_functions.threadgroup_barrier(memory, __builtin_return_address(0));
}

METALSIM_OURS void *find_array(const char *name)
{
    return metalsim_functions.threadgroup_array(name);
}

/* The slots of the lane's next meeting, and of its last. */
METALSIM_OURS unsigned char *slots_to_give()
{
    metalsim_simdgroup *s = lane()->simdgroup;
    return s->slots[s->meetings & 1];
}

METALSIM_OURS unsigned char *slots_to_take()
{
    metalsim_simdgroup *s = lane()->simdgroup;
    return s->slots[(s->meetings - 1) & 1];
}

} // namespace metalsim

#if defined(METALSIM_CHECKED)
#include "metalsim/instrument.h"
#endif
#endif
