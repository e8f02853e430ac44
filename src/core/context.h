/* What is kept between calls: opened backends, loaded kernels, blocks of scratch memory. Reading them takes no lock,
 * and remains possible in a child process after a fork() during which other threads were running. */
#ifndef MFA_CORE_CONTEXT_H
#define MFA_CORE_CONTEXT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base/sync.h"
#include "core/backend.h"
#include "core/cache.h"
#include "mfa.h"

/* A backend of this context. */
struct mfa_opened {
    const struct mfa_backend *backend;
    void *state;
    char unavailable_reason[256]; /* a sentence; "" if it is available on this machine */
};

/* A kernel that has been loaded, or that this device and its compiler cannot make: it stays so until the context is
 * destroyed. */
struct mfa_loaded {
    const struct mfa_loaded *next;
    const struct mfa_opened *opened;
    struct mfa_key key;
    mfa_status status; /* MFA_OK, MFA_UNSUPPORTED or MFA_COMPILE_FAILED */
    char *error;       /* the sentence of a status other than MFA_OK */
    const void *kernel;
};

struct mfa_block; /* scratch memory, see context.c */

#define MFA_CONTEXT_BLOCKS 16 /* kept for later runs: about as many as run at once */

struct mfa_context {
    char *cache;   /* folder; NULL: there is none */
    char *shipped; /* a folder to be read only, beside the library; NULL: there is none */
    struct mfa_lock loading;
    _Atomic(const struct mfa_loaded *) loaded; /* the newest first; only ever prepended to */
    _Atomic(struct mfa_block *) blocks[MFA_CONTEXT_BLOCKS];
    size_t backend_count;
    struct mfa_opened backends[];
};

/* `backends` is a list like mfa_backends. Fails as mfa_context_create does. Plans must be destroyed before the context
 * is closed. */
mfa_status mfa_context_open(const struct mfa_backend *const *backends, const mfa_context_options *options,
                            mfa_context **context);
void mfa_context_close(mfa_context *context);

/* The bodies of mfa_isa_name and mfa_isa_supported. */
const char *mfa_context_isa_name(const struct mfa_backend *const *backends, int32_t n);
mfa_status mfa_context_isa_supported(const struct mfa_backend *const *backends, const char *isa);

/* The body of mfa_context_set_threads. */
mfa_status mfa_context_limit(mfa_context *context, int32_t threads);

/* The backend that runs this canonical problem. MFA_UNSUPPORTED or MFA_UNAVAILABLE: there is none. */
mfa_status mfa_context_choose(const mfa_context *context, const mfa_problem *problem, const struct mfa_opened **opened);

/* The loaded kernel of that key: from memory, from the cache, or compiled. Fails as the backend's compile or load does;
 * MFA_UNSUPPORTED and MFA_COMPILE_FAILED are remembered. */
mfa_status mfa_context_kernel(mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                              const void **kernel);

/* The cache files of a kernel, and of its library if the backend has libraries. */
struct mfa_cache_name mfa_context_file(const struct mfa_opened *opened, const struct mfa_key *key);
struct mfa_cache_name mfa_context_library_file(const struct mfa_opened *opened, const struct mfa_key *key);

/* `bytes` bytes of 64-byte aligned memory, to be given back by mfa_context_return; NULL: out of memory. */
void *mfa_context_borrow(mfa_context *context, size_t bytes);
void mfa_context_return(mfa_context *context, void *memory);

#endif
