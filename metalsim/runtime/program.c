#include "runtime/program.h"

#include "metalsim.h"
#include "runtime/object.h"

struct program *metalsim_program_open(const char *text, int fast_math, const char **why)
{
    metalsim_library *library = NULL;
    const unsigned build = (metalsim_now.checked ? METALSIM_CHECKED : 0U) |
                           (metalsim_now.unoptimised ? METALSIM_UNOPTIMISED : 0U) |
                           (fast_math ? (unsigned)METALSIM_FAST_MATH : 0U);
    if (metalsim_library_create("program_source", text, NULL, metalsim_now.cache, build, &library) != METALSIM_OK)
        *why = metalsim_last_error();
    return (struct program *)library;
}

void metalsim_program_close(struct program *program)
{
    metalsim_library_destroy((metalsim_library *)program);
}

uint64_t metalsim_program_threads(const struct program *program, const char *kernel)
{
    const metalsim_kernel *found = metalsim_library_find((const metalsim_library *)program, kernel);
    return found ? metalsim_kernel_threads(found) : 0;
}

uint64_t metalsim_program_threadgroup_bytes(const struct program *program, const char *kernel,
                                            const uint64_t lengths[PROGRAM_BUFFERS])
{
    size_t own[METALSIM_BUFFERS];
    for (int i = 0; i < PROGRAM_BUFFERS; i++)
        own[i] = lengths[i];
    const metalsim_kernel *found = metalsim_library_find((const metalsim_library *)program, kernel);
    return found ? metalsim_kernel_threadgroup_bytes(found, own) : 0;
}

const char *metalsim_program_run(struct program *program, const struct program_run *run)
{
    struct metalsim_dispatch d = {.schedule = (enum metalsim_schedule)metalsim_now.schedule, .seed = metalsim_now.seed};
    for (int i = 0; i < 3; i++)
        d.threadgroups[i] = run->threadgroups[i], d.threads[i] = run->threads[i];
    for (int i = 0; i < PROGRAM_BUFFERS; i++) {
        const struct program_argument *a = &run->arguments[i];
        d.threadgroup_lengths[i] = run->threadgroup_lengths[i];
        if (a->base)
            d.buffers[i] = (struct metalsim_argument){a->is_bytes ? METALSIM_BYTES_BINDING : METALSIM_BUFFER_BINDING,
                                                      a->base, a->length, a->offset, a->unwritten};
    }
    const metalsim_kernel *kernel = metalsim_library_find((metalsim_library *)program, run->kernel);
    return kernel && metalsim_dispatch_run(kernel, &d) == METALSIM_OK ? NULL : metalsim_last_error();
}
