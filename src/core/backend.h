/* The interface between core and a backend. `supports` refuses every problem that the backend cannot run, so `launch`
 * never gets one. */
#ifndef MFA_CORE_BACKEND_H
#define MFA_CORE_BACKEND_H

#include "core/args.h"
#include "core/key.h"
#include "mfa.h"

/* How a backend divides the work of a run: a struct of the backend's own, which its tiles.h declares and copies in and
 * out, and of which the core knows nothing but that it fits in here. */
struct mfa_tiling {
    _Alignas(8) unsigned char bytes[32];
};

/* What `choose` decides for one problem. */
struct mfa_choice {
    struct mfa_key key;          /* which kernel */
    int threads;                 /* maximum number of threads of a run */
    uint64_t shared, per_thread; /* workspace bytes: of the run, and of each thread */
    struct mfa_tiling tiling;
};

struct mfa_backend {
    const char *name; /* as in the key's machine family: "cpu", "metal" */
    int32_t device;   /* the mfa_device whose memory it reads */

    mfa_status (*open)(const mfa_context_options *options, void **state);
    void (*close)(void *state);
    mfa_status (*set_threads)(void *state, int32_t threads); /* NULL: has none */

    /* The instruction sets that `open` takes as options->isa; NULL: it takes none. isa_name gives the name of number n,
     * NULL if there is none of that number; isa_supported says what `open` would say of the name. */
    const char *(*isa_name)(int n);
    mfa_status (*isa_supported)(const char *isa);

    mfa_status (*supports)(void *state, const mfa_problem *problem);
    /* `simpler`: 0; or 1, if the device could not run the kernel that 0 gave: then a kernel that needs less, or the
     * same one if there is no other. choice->tiling is for this backend's `launch`. */
    void (*choose)(void *state, const mfa_problem *problem, int simpler, struct mfa_choice *choice);

    /* Kernels that are built in have `load` and `unload`, which get no paths; the rest of these is NULL. Compiled ones
     * may be made in two steps, text -> library -> kernel, where a library serves every device. A file that cannot be
     * read or written is no failure: then its kernel is made from the step before it. */
    const char *library_suffix; /* of a library's file; NULL: there are none */
    /* Hashes of everything that a file depends on: a kernel's (texts, device, driver) and a library's (texts). */
    uint64_t (*stamp)(void *state, const struct mfa_key *key);
    uint64_t (*library_stamp)(void *state, const struct mfa_key *key);
    /* Text number `n` of the key's program and the name of its file, both to be freed; NULL after the last. */
    mfa_status (*text)(void *state, const struct mfa_key *key, int n, char **text, char **name);
    /* The kernel, and its file at `path` (NULL: none). `library`: a library's file, or NULL. `whole`: all that any run
     * of the key needs, for a file that is made ahead; else what every run needs, and `launch` makes the rest. */
    mfa_status (*compile)(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                          const void **kernel);
    /* The kernel from its file only; `compile` makes it from its text or library. */
    mfa_status (*load)(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                       const void **kernel);
    void (*unload)(void *state, const void *kernel);

    /* Length in bytes of the buffer at `base`; NULL: buffers have no known length. */
    uint64_t (*buffer_length)(void *state, const void *base);

    /* `workspace` holds choice->shared + choice->threads * choice->per_thread bytes, 64-byte aligned. If the
     * backend keeps scratch memory of its own, it is NULL, and buffers->workspace is the caller's, if any. */
    int keeps_workspace;
    mfa_status (*launch)(void *state, const void *kernel, const mfa_problem *problem, const struct mfa_choice *choice,
                         const mfa_buffers *buffers, void *workspace, void *stream);
};

/* The backends built into this library, best first; NULL ends the list (backends.c). */
extern const struct mfa_backend *const mfa_backends[];

#endif
