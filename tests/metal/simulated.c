/* Kernels on metalsim. Compiled programs are kept for the life of the process. */
#include <stdlib.h>
#include <string.h>

#include "metal/gpu.h"
#include "metalsim/metalsim.h"

static struct gpu_settings settings;

static struct program {
    struct program *next;
    char *text;
    unsigned build;
    metalsim_library *library;
} *programs;

void gpu_set(const struct gpu_settings *given)
{
    settings = *given;
}

void gpu_begin(struct gpu_buffer *buffers, int count)
{
    (void)buffers, (void)count;
}

void gpu_end(struct gpu_buffer *buffers, int count)
{
    (void)buffers, (void)count;
}

static metalsim_library *find_library(const struct gpu_launch *launch)
{
    const unsigned build = (settings.checked ? METALSIM_CHECKED : 0) | (settings.fast_math ? METALSIM_FAST_MATH : 0) |
                           (settings.unoptimised ? METALSIM_UNOPTIMISED : 0) |
                           (getenv("LLVM_PROFILE_FILE") ? METALSIM_COVERAGE : 0);
    for (struct program *p = programs; p; p = p->next)
        if (p->build == build && !strcmp(p->text, launch->text))
            return p->library;
    metalsim_library *library;
    struct program *program = malloc(sizeof *program);
    if (!program || metalsim_library_create(launch->name, launch->text, NULL, settings.cache, build, &library)) {
        free(program);
        return NULL;
    }
    *program = (struct program){programs, strdup(launch->text), build, library};
    programs = program;
    return library;
}

const char *gpu_run(const struct gpu_launch *launch)
{
    struct metalsim_dispatch dispatch = {
        .threadgroups = {(size_t)launch->groups, 1, 1},
        .threads = {(size_t)launch->threads, 1, 1},
        .schedule = (enum metalsim_schedule)settings.schedule,
        .seed = settings.seed,
    };
    dispatch.buffers[MFA_METAL_BUFFER_CALL] =
        (struct metalsim_argument){METALSIM_BYTES_BINDING, &launch->call, sizeof launch->call, 0, 0};
    for (int n = MFA_METAL_BUFFER_BLOCK_MASK; n < MFA_METAL_BUFFERS; n++) {
        const struct gpu_buffer *b = &launch->buffers[n];
        if (b->base)
            dispatch.buffers[n] =
                (struct metalsim_argument){METALSIM_BUFFER_BINDING, b->base, b->length, b->offset, b->unwritten};
    }
    metalsim_library *library = find_library(launch);
    const metalsim_kernel *kernel = library ? metalsim_library_find(library, launch->function) : NULL;
    if (!kernel || metalsim_dispatch_run(kernel, &dispatch) != METALSIM_OK)
        return metalsim_last_error();
    return NULL;
}
