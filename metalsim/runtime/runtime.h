/* metalsim's runtime: an Objective-C runtime and a Metal in one shared library, for tests of a host that drives Metal
 * through objc_msgSend. The host opens it in place of libobjc and Metal.framework; kernels run on metalsim. What a Mac
 * would end the process for is a finding here. This header is the interface for tests: properties of the
 * machine, injected faults, counts, findings. All functions may be called from any thread. */
#ifndef METALSIM_RUNTIME_H
#define METALSIM_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define METALSIM_EXPORT __attribute__((visibility("default")))

/* What can be made to go wrong (faults.inc). */
enum metalsim_fault {
#define FAULT(name, text) METALSIM_FAULT_##name,
#include "faults.inc"
#undef FAULT
    METALSIM_FAULT_COUNT
};

/* The machine, and how the kernels run on it. */
struct metalsim_settings {
    int family;           /* of the GPU: the n of MTLGPUFamilyApple; METALSIM_FAMILY, 7 */
    int macos;            /* 14 and so on: newer selectors are unknown; METALSIM_MACOS, 14 */
    const char *name;     /* of the device */
    const char *build;    /* of the system, as sysctl's kern.osversion; METALSIM_BUILD */
    const char *function; /* only this function's pipelines are faulty; NULL: any */
    uint64_t threads;     /* of LIMITED_THREADS */
    uint64_t memory;      /* bytes: maxBufferLength */
    const char *cache;    /* folder of metalsim's own for compiled kernels; METALSIM_CACHE. It stands for no cache of
                             Metal's: what is counted as compiled is so even if it lies here */
    int checked;          /* kernels are checked for races and more; METALSIM_CHECKED */
    int unoptimised;      /* they are compiled faster, and run slower; METALSIM_UNOPTIMISED */
    int idle;             /* kernels do not run: commands are counted and recorded, no more */
    int schedule;         /* an enum metalsim_schedule, with its seed */
    uint64_t seed;
    int aborts;                /* a finding ends the process, as it does on a Mac; METALSIM_ABORT */
    enum metalsim_fault fault; /* METALSIM_FAULT, as "no_pipeline", or "no_pipeline:2" */
    unsigned after;            /* so many times all goes well, then it fails ... */
    unsigned times;            /* ... so often; 0: from then on */
};

/* What has been done (counts.inc). */
struct metalsim_counts {
#define COUNT(name) uint64_t name;
#include "counts.inc"
#undef COUNT
};

/* The defaults and the environment's settings; those in force from now on. Strings are kept, not copied. */
METALSIM_EXPORT void metalsim_runtime_defaults(struct metalsim_settings *settings);
METALSIM_EXPORT void metalsim_runtime_set(const struct metalsim_settings *settings);
METALSIM_EXPORT const char *metalsim_runtime_fault_name(enum metalsim_fault fault);

/* Counts and findings, since the process began or they were last cleared. A process with METALSIM_REPORT leaves both in
 * that file when it ends. */
METALSIM_EXPORT void metalsim_runtime_count(struct metalsim_counts *counts);
METALSIM_EXPORT size_t metalsim_runtime_findings(void);
METALSIM_EXPORT const char *metalsim_runtime_finding(size_t i); /* NULL: there are fewer */
METALSIM_EXPORT void metalsim_runtime_clear(void);

/* Describes objects that are alive; returns how many. */
METALSIM_EXPORT size_t metalsim_runtime_leaks(char *text, size_t capacity);

/* An MTLBuffer over the caller's memory, which stays the caller's, as an allocator of shared memory gives it; to be
 * released. `unwritten`: what is there now means nothing. */
METALSIM_EXPORT void *metalsim_runtime_buffer(void *bytes, size_t length, int unwritten);
METALSIM_EXPORT void metalsim_runtime_release(void *object);

/* A dispatch as it was encoded: newest first, i = 0. */
struct metalsim_recorded {
    const char *function;
    uint64_t threadgroups[3], threads[3];
    struct {
        void *buffer; /* NULL with bytes: they came by setBytes */
        const void *bytes;
        uint64_t length, offset;
    } buffers[31];
    uint64_t threadgroup_lengths[31];
};
#define METALSIM_RECORDED 32 /* kept */

METALSIM_EXPORT const struct metalsim_recorded *metalsim_runtime_dispatch(size_t i); /* NULL: none */

/* Whether the caller runs on that dispatch queue. */
METALSIM_EXPORT int metalsim_runtime_on_queue(const void *queue);

/* What `xcrun metal -fno-fast-math` does: makes a library for newLibraryWithURL from files of text. 0 if it did. */
METALSIM_EXPORT int32_t metalsim_runtime_compile(const char *const *texts, int32_t count, const char *library,
                                                 void *unused);

/* The facts that every message is held to. */
struct metalsim_fact {
    const char *class_name;
    char kind; /* '-' instance, '+' class; 'f': a C function */
    const char *selector;
    char ownership;                 /* 'o' the caller owns the result, 'b' it is borrowed, 'v' it is a value */
    int since;                      /* macOS: 1400 is 14.0 */
    const char *result, *arguments; /* C types; "(SELF, NSUInteger length)" */
    const char *source;
    void (*function)(void);
};
METALSIM_EXPORT const struct metalsim_fact *metalsim_runtime_fact(size_t i); /* NULL: there are fewer */

#endif
