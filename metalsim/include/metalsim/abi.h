/* What a compiled kernel library and the runtime that executes it share. C for the runtime, C++ for the
 * library; a library is compiled against the very file that the runtime was. */
#ifndef METALSIM_ABI_H
#define METALSIM_ABI_H

#define METALSIM_SIMD_WIDTH 32
#define METALSIM_STACK (128 * 1024) /* bytes of a lane's stack, and its alignment */
#define METALSIM_SLOTS 1024         /* bytes that the lanes of a simdgroup exchange in one operation */

/* Values as in metal::mem_flags. */
enum metalsim_memory { METALSIM_MEMORY_DEVICE = 1, METALSIM_MEMORY_THREADGROUP = 2 };

enum metalsim_parameter_kind { METALSIM_BUFFER, METALSIM_THREADGROUP, METALSIM_POSITION, METALSIM_ARRAY };

struct metalsim_coord {
    unsigned x, y, z;
};

/* What is the same for all threads of a threadgroup. */
struct metalsim_grid {
    struct metalsim_coord position;     /* threadgroup_position_in_grid */
    struct metalsim_coord threads;      /* threads_per_threadgroup */
    struct metalsim_coord threadgroups; /* threadgroups_per_grid */
};

/* The lanes of a simdgroup meet for every operation that they do together. Each puts what it gives into
 * the slots of this meeting and takes its result from there. Slots alternate, since a lane may be at the
 * next meeting while others still read the results of this one. */
struct metalsim_simdgroup {
    unsigned char slots[2][METALSIM_SLOTS] __attribute__((aligned(64)));
    unsigned meetings; /* that have taken place: also the gate at which lanes wait for one */
};

/* A GPU thread. It lies at the upper end of its own stack, where any of its code finds it. */
struct metalsim_lane {
    void *stack_pointer;           /* while another lane runs */
    const volatile unsigned *gate; /* may go on as soon as *gate != ticket */
    unsigned ticket;
    unsigned index;                 /* thread_index_in_threadgroup */
    unsigned lane;                  /* thread_index_in_simdgroup */
    struct metalsim_coord position; /* thread_position_in_threadgroup */
    struct metalsim_simdgroup *simdgroup;
    const struct metalsim_grid *grid;
    struct metalsim_lane *next; /* of its simdgroup, in the order in which they take turns */
};

#if defined(__cplusplus)
#define METALSIM_FIND METALSIM_OURS
#else
#define METALSIM_FIND static inline
#endif

/* The lane that is running. */
METALSIM_FIND struct metalsim_lane *metalsim_self(void)
{
    unsigned long stack;
#if defined(__x86_64__)
    __asm__("movq %%rsp, %0" : "=r"(stack));
#elif defined(__aarch64__)
    __asm__("mov %0, sp" : "=r"(stack));
#endif
    return (struct metalsim_lane *)((stack | (METALSIM_STACK - 1)) + 1) - 1;
}

/* What a library asks of the runtime. A site is a return address: the place in the kernel's code. */
struct metalsim_runtime {
    /* `operate` is called once, when all lanes are there; NULL: it is enough that they are. */
    void (*meet)(void (*operate)(unsigned char *slots), const void *site);
    void (*simdgroup_barrier)(unsigned memory, const void *site);
    void (*threadgroup_barrier)(unsigned memory, const void *site);
    void *(*threadgroup_array)(const char *name); /* of the running kernel */
    /* A checked library reports every access to memory, and what the language leaves undefined. */
    void (*read)(const void *address, unsigned long bytes, const void *site);
    void (*write)(const void *address, unsigned long bytes, const void *site);
    void (*atomic)(const void *address, unsigned long bytes, const void *site);
    void (*undefined)(const char *what, const void *site); /* NULL: where the lanes have met */
};

/* A parameter of a kernel, or an array in threadgroup memory that it declares. */
struct metalsim_parameter {
    const char *name;
    int kind;            /* enum metalsim_parameter_kind */
    unsigned index;      /* n of [[buffer(n)]], [[threadgroup(n)]]; the number of an array among the kernel's */
    int constant;        /* a buffer in the constant address space */
    unsigned long bytes; /* of an array; else those that must be there, of what a reference refers to or one element */
};

struct metalsim_entry {
    const char *name;
    void (*enter)(void *const *buffers, void *const *threadgroup); /* the arguments, by their index */
    const struct metalsim_parameter *parameters;
    unsigned parameter_count;
    unsigned max_threads; /* max_total_threads_per_threadgroup; 0: not said */
};

/* The one symbol that a library exports. */
struct metalsim_object {
    struct metalsim_runtime *runtime; /* for the runtime to fill in */
    const struct metalsim_entry *entries;
    unsigned entry_count;
    const void *begin, *end; /* of the library in memory */
};

#endif
