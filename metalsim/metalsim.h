/* metalsim: a software Metal for Linux. It compiles Metal Shading Language with clang and executes it on
 * the CPU: address spaces, threadgroup memory, barriers, simdgroups and their matrices are real, and
 * Metal's limits are enforced. A checked library also finds races, accesses out of bounds, reads of
 * memory never written, and barriers with the wrong mem_flags; README.md says how far that goes.
 *
 * Functions may be called from several threads at once. Those that can fail return a metalsim_status, and
 * metalsim_last_error() then holds the calling thread's reason. */
#ifndef METALSIM_H
#define METALSIM_H

#include <stddef.h>
#include <stdint.h>

#define METALSIM_BUFFERS 31            /* buffer and threadgroup indices are 0 to 30 */
#define METALSIM_ARRAYS 31             /* THREADGROUP_ARRAYs of a kernel, at most */
#define METALSIM_BYTES_MAX 4096        /* of setBytes */
#define METALSIM_THREADGROUP_MAX 32768 /* bytes of threadgroup memory in all */
#define METALSIM_THREADS_MAX 1024      /* threads of a threadgroup */

typedef enum metalsim_status {
    METALSIM_OK,
    METALSIM_REFUSED,        /* a limit of Metal, or a wrong argument: nothing has run */
    METALSIM_COMPILE_FAILED, /* the compiler's messages are the error */
    METALSIM_FAULT           /* the kernel did what it must not; the error is a line per finding */
} metalsim_status;

/* How a library is compiled; combine with |. */
enum metalsim_build {
    METALSIM_CHECKED = 1,    /* accesses are watched; dispatches run on the calling thread alone */
    METALSIM_FAST_MATH = 2,  /* as Metal's compiler does by default */
    METALSIM_COVERAGE = 4,   /* counts for coverage.py, written when the process ends (LLVM_PROFILE_FILE) */
    METALSIM_UNOPTIMISED = 8 /* compiles faster, runs slower: for kernels that run briefly */
};

typedef struct metalsim_library metalsim_library;
typedef struct metalsim_kernel metalsim_kernel;

/* The calling thread's last error; "" if there was none. Valid until its next call that fails. */
const char *metalsim_last_error(void);

/* Compiles the text of a .metal file. name: what messages call it, until a #line says otherwise. defines:
 * a line each, "NAME" or "NAME value"; NULL for none. cache: a folder for compiled libraries, which is made
 * if it is not there. A library that is already in it is not compiled again. */
metalsim_status metalsim_library_create(const char *name, const char *source, const char *defines, const char *cache,
                                        unsigned build, metalsim_library **library);
void metalsim_library_destroy(metalsim_library *library); /* and its kernels; NULL is good */

/* The kernels of a library, in the order of the text. */
size_t metalsim_library_count(const metalsim_library *library);
const metalsim_kernel *metalsim_library_kernel(const metalsim_library *library, size_t i);

/* By name; NULL, and a sentence, if there is none. */
const metalsim_kernel *metalsim_library_find(const metalsim_library *library, const char *name);

const char *metalsim_kernel_name(const metalsim_kernel *kernel);

/* The most threads of a threadgroup: max_total_threads_per_threadgroup, or METALSIM_THREADS_MAX. */
size_t metalsim_kernel_threads(const metalsim_kernel *kernel);

/* Bytes of threadgroup memory: the arrays that the kernel declares, and its arguments with these lengths. Lengths at
 * other indices do not count. */
size_t metalsim_kernel_threadgroup_bytes(const metalsim_kernel *kernel, const size_t lengths[METALSIM_BUFFERS]);

enum metalsim_binding { METALSIM_NONE, METALSIM_BUFFER_BINDING, METALSIM_BYTES_BINDING };

/* What is bound at an index. A buffer is all of its memory, `length` bytes from `base`, of which the
 * kernel sees what begins at `offset`; the same base and length are the same buffer. Bytes are copied. */
struct metalsim_argument {
    enum metalsim_binding binding;
    const void *base;
    size_t length, offset;
    int unwritten; /* checked: what is there now counts as never written */
};

/* The order in which lanes, simdgroups and threadgroups take turns. Right kernels do not notice. */
enum metalsim_schedule { METALSIM_NATURAL, METALSIM_REVERSED, METALSIM_SHUFFLED };

struct metalsim_dispatch {
    size_t threadgroups[3]; /* of the grid; with a 0 nothing runs */
    size_t threads[3];      /* of a threadgroup */
    struct metalsim_argument buffers[METALSIM_BUFFERS];
    size_t threadgroup_lengths[METALSIM_BUFFERS]; /* of threadgroup arguments: bytes, multiples of 16; 0: none */
    enum metalsim_schedule schedule;
    uint64_t seed; /* of METALSIM_SHUFFLED */
    int cpus;      /* most CPU threads; 0: one for each that this process may use */
};

/* Runs all threadgroups and returns when they are done. Threadgroup memory and simdgroup matrices begin as
 * NaNs, in every threadgroup. */
metalsim_status metalsim_dispatch_run(const metalsim_kernel *kernel, const struct metalsim_dispatch *dispatch);

#endif
