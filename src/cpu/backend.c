/* The CPU backend: the functions of core/backend.h. */
#include "cpu/backend.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "base/error.h"
#include "cpu/device.h"
#include "cpu/launch.h"
#include "cpu/program.h"
#include "cpu/threads.h"
#include "cpu/tiles.h"

struct cpu {
    mfa_cpu_isa isa;
    mfa_cpu_threads *threads;
    atomic_int limit; /* maximum number of threads of a run */
};

/* The named instruction set, which must have been built; with NULL, the best that this machine has and that was built.
 * */
static mfa_status choose_isa(const char *cap, mfa_cpu_isa *isa)
{
    mfa_status status = mfa_cpu_isa_choose(cap, isa);
    if (status != MFA_OK)
        return status;
    if (cap && !mfa_cpu_program_has(*isa))
        return mfa_fail(MFA_UNAVAILABLE, "isa is %s; this library was built without kernels for it", cap);
    while (!mfa_cpu_program_has(*isa) || !mfa_cpu_isa_present(*isa))
        *isa = (mfa_cpu_isa)(*isa - 1); /* scalar, the first, is always there */
    return MFA_OK;
}

static mfa_status isa_supported(const char *isa)
{
    mfa_cpu_isa chosen;
    return choose_isa(isa, &chosen);
}

static mfa_status set_threads(void *state, int32_t threads)
{
    struct cpu *cpu = state;
    if (threads == 0)
        threads = mfa_cpu_threads_available();
    atomic_store(&cpu->limit, threads < MFA_CPU_THREADS_MAX ? threads : MFA_CPU_THREADS_MAX);
    return MFA_OK;
}

static mfa_status open_cpu(const mfa_context_options *options, void **state)
{
    mfa_cpu_isa isa;
    mfa_cpu_threads *threads;
    mfa_status status = choose_isa(options->isa, &isa);
    if (status != MFA_OK)
        return status;
    struct cpu *cpu = malloc(sizeof *cpu);
    if (!cpu)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a context");
    status = mfa_cpu_threads_open(options->host, &threads);
    if (status != MFA_OK) {
        free(cpu);
        return status;
    }
    cpu->isa = isa, cpu->threads = threads;
    set_threads(cpu, options->threads);
    *state = cpu;
    return MFA_OK;
}

static void close_cpu(void *state)
{
    struct cpu *cpu = state;
    mfa_cpu_threads_close(cpu->threads);
    free(cpu);
}

/* The core has refused the problems that no kernel can run; the CPU's kernels run all others. */
static mfa_status supports(void *state, const mfa_problem *problem)
{
    (void)state, (void)problem;
    return MFA_OK;
}

static void choose(void *state, const mfa_problem *problem, int simpler, struct mfa_choice *choice)
{
    struct cpu *cpu = state;
    (void)simpler;
    choice->threads = atomic_load(&cpu->limit);
    mfa_cpu_isa isa = mfa_cpu_program_isa(cpu->isa, problem);
    const struct mfa_cpu_kernels *kernels = mfa_cpu_program_find(isa, problem->dtype, MFA_VARIANT_TILED);
    enum mfa_variant variant = mfa_cpu_tiles_variant(kernels, problem);
    const mfa_cpu_isa int8 = mfa_cpu_program_int8(cpu->isa, problem);
    if (variant == MFA_VARIANT_TILED && int8 != MFA_CPU_ISA_COUNT) {
        isa = int8, variant = MFA_VARIANT_INT8;
        kernels = mfa_cpu_program_find(isa, problem->dtype, variant);
    }
    mfa_cpu_tiles_choose(isa, kernels, variant, problem, choice);
    mfa_cpu_launch_measure(kernels, problem, choice);
}

static mfa_status load(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                       const void **kernel)
{
    (void)state, (void)library, (void)path, (void)whole;
    *kernel = mfa_cpu_program_find(mfa_cpu_isa_named(key->machine), key->dtype, key->variant);
    return MFA_OK;
}

static void unload(void *state, const void *kernel)
{
    (void)state, (void)kernel;
}

static mfa_status launch(void *state, const void *kernel, const mfa_problem *problem, const struct mfa_choice *choice,
                         const mfa_buffers *buffers, void *workspace, void *stream)
{
    struct cpu *cpu = state;
    const int limit = atomic_load(&cpu->limit); /* may be less now than when the choice was made */
    (void)stream;
    return mfa_cpu_launch(cpu->threads, choice->threads < limit ? choice->threads : limit, kernel, problem, choice,
                          buffers, workspace);
}

const struct mfa_backend mfa_cpu_backend = {
    .name = "cpu",
    .device = MFA_DEVICE_CPU,
    .open = open_cpu,
    .close = close_cpu,
    .isa_name = mfa_cpu_isa_name,
    .isa_supported = isa_supported,
    .set_threads = set_threads,
    .supports = supports,
    .choose = choose,
    .load = load,
    .unload = unload,
    .launch = launch,
};
