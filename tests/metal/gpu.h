/* The substitute for an Apple GPU that executes kernels: metalsim (simulated.c) or an NVIDIA GPU (metalsim/cuda/gpu.c).
 * A test program is linked with one of them. */
#ifndef TESTS_METAL_GPU_H
#define TESTS_METAL_GPU_H

#include <stddef.h>
#include <stdint.h>

#include "metal/source.h"

/* A buffer is all of its memory; a kernel gets the part from the offset on. */
struct gpu_buffer {
    void *base; /* NULL: nothing is bound */
    size_t length, offset;
    int written;   /* by some kernel of the run */
    int unwritten; /* its contents are not valid yet */
    int scratch;   /* its contents are not used after the run */
};

struct gpu_launch {
    const char *name, *text, *function; /* the program, under a name for messages, and its kernel */
    int64_t groups;
    int32_t threads;
    struct mfa_metal_call call;
    struct gpu_buffer buffers[MFA_METAL_BUFFERS]; /* but for that of the call */
};

enum gpu_schedule { GPU_NATURAL, GPU_REVERSED, GPU_SHUFFLED };

/* Settings of the kernels that run next; an NVIDIA GPU ignores the schedule, and is always optimised for. */
struct gpu_settings {
    const char *cache; /* a folder for compiled programs */
    int checked, fast_math;
    int unoptimised; /* they run briefly: compiling them fast matters more */
    enum gpu_schedule schedule;
    uint64_t seed;
};

void gpu_set(const struct gpu_settings *settings);

/* Begins and ends the kernels of one run; in between, the host must not touch the memory. */
void gpu_begin(struct gpu_buffer *buffers, int count);
void gpu_end(struct gpu_buffer *buffers, int count);

/* Runs one kernel and waits. NULL, or an error message. */
const char *gpu_run(const struct gpu_launch *launch);

#endif
