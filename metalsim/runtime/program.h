/* The kernels of one text, compiled and executed by metalsim. */
#ifndef METALSIM_RUNTIME_PROGRAM_H
#define METALSIM_RUNTIME_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

#define PROGRAM_BUFFERS 31

struct program;

struct program_argument {
    const void *base; /* NULL: nothing is bound */
    size_t length, offset;
    int is_bytes, unwritten;
};

struct program_run {
    const char *kernel;
    uint64_t threadgroups[3], threads[3], threadgroup_lengths[PROGRAM_BUFFERS];
    struct program_argument arguments[PROGRAM_BUFFERS];
};

/* NULL, and why: the compiler's messages, valid until the thread's next call. */
struct program *metalsim_program_open(const char *text, int fast_math, const char **why);
void metalsim_program_close(struct program *program);

/* The most threads that a kernel's text allows; 0: there is no such kernel. */
uint64_t metalsim_program_threads(const struct program *program, const char *kernel);

/* Bytes of threadgroup memory that a dispatch of the kernel has, with these lengths set. */
uint64_t metalsim_program_threadgroup_bytes(const struct program *program, const char *kernel,
                                            const uint64_t lengths[PROGRAM_BUFFERS]);

/* NULL, or what went wrong: valid until the thread's next call. */
const char *metalsim_program_run(struct program *program, const struct program_run *run);

#endif
