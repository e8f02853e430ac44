/* Something that executes Metal kernels: metalsim (simulated.c), or an NVIDIA GPU (metalsim/cuda/device.c). A program
 * of tests is linked with one of them. */
#ifndef TESTS_METAL_DEVICE_H
#define TESTS_METAL_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "metal/kernels/contract.h"

/* A buffer is all of its memory, of which a kernel sees what begins at the offset. */
struct device_buffer {
    void *base; /* NULL: nothing is bound */
    size_t length, offset;
    int written;   /* by some kernel of the run */
    int unwritten; /* what is there now means nothing */
    int scratch;   /* nor what will be there at the end */
};

struct device_launch {
    const char *name, *text, *function; /* the program, under a name for messages, and its kernel */
    int64_t groups;
    int32_t threads, threadgroup_bytes[2];
    struct mfa_metal_call call;
    struct device_buffer buffers[MFA_METAL_BUFFERS]; /* but for that of the call */
};

enum device_schedule { DEVICE_NATURAL, DEVICE_REVERSED, DEVICE_SHUFFLED };

/* How kernels run from now on; a GPU knows no schedules. */
struct device_settings {
    const char *cache; /* a folder for compiled programs */
    int checked, fast_math;
    enum device_schedule schedule;
    uint64_t seed;
};

void device_set(const struct device_settings *settings);

/* Begins and ends the kernels of one run: between them, memory is the device's. */
void device_begin(struct device_buffer *buffers, int count);
void device_end(struct device_buffer *buffers, int count);

/* Runs one kernel and waits. NULL, or why it could not. */
const char *device_run(const struct device_launch *launch);

#endif
