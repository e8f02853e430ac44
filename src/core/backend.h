/* What a backend is to the core. Everything that can be refused is refused by `supports`,
 * so `launch` meets only problems that it can run. */
#ifndef MFA_CORE_BACKEND_H
#define MFA_CORE_BACKEND_H

#include "core/args.h"
#include "core/key.h"
#include "mfa.h"

/* What `choose` decides for one problem. */
struct mfa_choice {
    struct mfa_key key;           /* which kernel: does not depend on q_len or kv_len */
    int64_t splits;               /* parts that the kv range of a forward row is cut into */
    int few;                      /* forward: by the kernel for few queries */
    int64_t panels;               /* tiles of queries that share one visit of K and V */
    int threads;                  /* most threads of a run */
    uint64_t shared, per_thread;  /* workspace bytes: of the run, and of each thread */
};

struct mfa_backend {
    const char *name; /* as in the key's machine family: "cpu", "metal" */
    int32_t device;   /* the mfa_device whose memory it reads */

    mfa_status (*open)(const mfa_context_options *options, void **state);
    void (*close)(void *state);
    mfa_status (*set_threads)(void *state, int32_t threads); /* NULL: has none */

    mfa_status (*supports)(void *state, const mfa_problem *problem);
    void (*choose)(void *state, const mfa_problem *problem, struct mfa_choice *choice);

    /* key -> file at `path`. NULL: kernels are built in, and `path` below is NULL. */
    mfa_status (*compile)(void *state, const struct mfa_key *key, const char *path);
    /* A hash of all that makes a compiled file stale: kernel sources, device, driver. NULL if compile is. */
    uint64_t (*stamp)(void *state);
    mfa_status (*load)(void *state, const struct mfa_key *key, const char *path, const void **kernel);
    void (*unload)(void *state, const void *kernel);

    /* `workspace` holds choice->shared + choice->threads * choice->per_thread bytes, 64-byte aligned. */
    mfa_status (*launch)(void *state, const void *kernel, const mfa_problem *problem, const struct mfa_choice *choice,
                         const mfa_buffers *buffers, void *workspace, void *stream);
};

/* The backends built into this library, best first; NULL ends the list (backends.c). */
extern const struct mfa_backend *const mfa_backends[];

#endif
