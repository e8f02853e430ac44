/* The context: opening and closing it, its list of kernels, its blocks of memory. */
#define _GNU_SOURCE
#include "core/context.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/sized.h"
#include "core/cache.h"

#define FIRST_SIZE (offsetof(mfa_context_options, host) + sizeof(mfa_parallel_for)) /* in version 0.1 */

static mfa_status check_threads(int32_t threads)
{
    if (threads >= 0)
        return MFA_OK;
    return mfa_fail(MFA_INVALID, "threads is %d; it must be 0 (as many as this process may use) or more", threads);
}

static mfa_status read_options(const mfa_context_options *given, mfa_context_options *options)
{
    *options = (mfa_context_options){.size = sizeof *options};
    if (!given)
        return MFA_OK;
    const mfa_status status = mfa_sized_copy("mfa_context_options", given, FIRST_SIZE, options, sizeof *options);
    if (status != MFA_OK)
        return status;
    if (options->reserved != 0)
        return mfa_fail(MFA_INVALID, "reserved is %d; it must be 0", options->reserved);
    return check_threads(options->threads);
}

static mfa_status out_of_memory(void)
{
    return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a context");
}

/* Opens one backend. That a device is not on this machine is no failure, except for the CPU, which always
 * is: there it means that an option asks for what this CPU does not have. */
static mfa_status open_backend(const struct mfa_backend *backend, const mfa_context_options *options,
                               struct mfa_opened *opened)
{
    opened->backend = backend;
    const mfa_status status = backend->open(options, &opened->state);
    if (status != MFA_UNAVAILABLE || backend->device == MFA_DEVICE_CPU)
        return status;
    snprintf(opened->refusal, sizeof opened->refusal, "%s", mfa_last_error());
    return MFA_OK;
}

mfa_status mfa_context_open(const struct mfa_backend *const *backends, const mfa_context_options *given,
                            mfa_context **context)
{
    mfa_context_options options;
    mfa_status status = read_options(given, &options);
    if (status != MFA_OK)
        return status;
    size_t count = 0;
    while (backends[count])
        count++;
    mfa_context *made = calloc(1, sizeof *made + count * sizeof *made->backends);
    if (!made)
        return out_of_memory();

    char folder[MFA_FILE_PATH];
    if (!options.cache && mfa_file_cache_folder(folder))
        options.cache = folder;
    if (options.cache && !(made->cache = strdup(options.cache)))
        status = out_of_memory();
    for (size_t i = 0; i < count && status == MFA_OK; i++) {
        status = open_backend(backends[i], &options, &made->backends[i]);
        if (status == MFA_OK)
            made->backend_count++;
    }
    if (status == MFA_OK)
        *context = made;
    else
        mfa_context_close(made);
    return status;
}

void mfa_context_close(mfa_context *context)
{
    const struct mfa_loaded *loaded = atomic_load(&context->loaded);
    while (loaded) {
        const struct mfa_loaded *next = loaded->next;
        loaded->opened->backend->unload(loaded->opened->state, loaded->kernel);
        free((void *)loaded);
        loaded = next;
    }
    for (size_t i = 0; i < context->backend_count; i++)
        if (!context->backends[i].refusal[0])
            context->backends[i].backend->close(context->backends[i].state);
    for (int i = 0; i < MFA_CONTEXT_BLOCKS; i++)
        free(atomic_load(&context->blocks[i]));
    free(context->cache);
    free(context);
}

mfa_status mfa_context_limit(mfa_context *context, int32_t threads)
{
    mfa_status status = check_threads(threads);
    for (size_t i = 0; i < context->backend_count && status == MFA_OK; i++) {
        const struct mfa_opened *opened = &context->backends[i];
        if (!opened->refusal[0] && opened->backend->set_threads)
            status = opened->backend->set_threads(opened->state, threads);
    }
    return status;
}

mfa_status mfa_context_choose(const mfa_context *context, const mfa_problem *problem, const struct mfa_opened **chosen)
{
    const struct mfa_opened *unavailable = NULL;
    mfa_status refused = MFA_OK;
    for (size_t i = 0; i < context->backend_count; i++) {
        const struct mfa_opened *opened = &context->backends[i];
        if (opened->backend->device != problem->device)
            continue;
        if (opened->refusal[0]) {
            unavailable = opened;
            continue;
        }
        refused = opened->backend->supports(opened->state, problem);
        if (refused == MFA_OK) {
            *chosen = opened;
            return MFA_OK;
        }
    }
    if (refused != MFA_OK) /* its sentence is the last one */
        return refused;
    if (unavailable)
        return mfa_fail(MFA_UNAVAILABLE, "%s", unavailable->refusal);
    return mfa_fail(MFA_UNAVAILABLE, "device is %d; this library has no backend for it", problem->device);
}

/* From the cache if it is there, else compiled and kept. */
static mfa_status load_from_disk(const mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                                 const void **kernel)
{
    const struct mfa_backend *backend = opened->backend;
    const uint64_t stamp = backend->stamp(opened->state);
    char path[MFA_FILE_PATH];
    if (mfa_cache_find(context->cache, key, stamp, path) && backend->load(opened->state, key, path, kernel) == MFA_OK)
        return MFA_OK;
    struct mfa_cache_draft draft;
    mfa_status status = mfa_cache_draft_begin(context->cache, key, &draft);
    if (status != MFA_OK)
        return status;
    status = backend->compile(opened->state, key, draft.path);
    if (status == MFA_OK) {
        mfa_cache_draft_keep(context->cache, key, stamp, &draft);
        status = backend->load(opened->state, key, draft.path, kernel);
    }
    mfa_cache_draft_end(&draft);
    return status;
}

static const struct mfa_loaded *find_loaded(mfa_context *context, const struct mfa_opened *opened,
                                            const struct mfa_key *key)
{
    const struct mfa_loaded *loaded = atomic_load_explicit(&context->loaded, memory_order_acquire);
    while (loaded && (loaded->opened != opened || memcmp(&loaded->key, key, sizeof *key) != 0))
        loaded = loaded->next;
    return loaded;
}

/* Loads a kernel and puts it into the list. The caller holds the lock. */
static mfa_status load(mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                       const struct mfa_loaded **result)
{
    struct mfa_loaded *made = malloc(sizeof *made);
    if (!made)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory to load a kernel");
    *made = (struct mfa_loaded){atomic_load(&context->loaded), opened, *key, NULL};
    const mfa_status status = opened->backend->compile ? load_from_disk(context, opened, key, &made->kernel)
                                                       : opened->backend->load(opened->state, key, NULL, &made->kernel);
    if (status != MFA_OK) {
        free(made);
        return status;
    }
    atomic_store_explicit(&context->loaded, made, memory_order_release);
    *result = made;
    return MFA_OK;
}

mfa_status mfa_context_kernel(mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                              const void **kernel)
{
    const struct mfa_loaded *loaded = find_loaded(context, opened, key);
    if (!loaded) {
        mfa_lock_take(&context->loading);
        loaded = find_loaded(context, opened, key); /* another thread may have been quicker */
        const mfa_status status = loaded ? MFA_OK : load(context, opened, key, &loaded);
        mfa_lock_release(&context->loading);
        if (status != MFA_OK)
            return status;
    }
    *kernel = loaded->kernel;
    return MFA_OK;
}

/* A block's head; the memory that is lent follows it. */
struct mfa_block {
    _Alignas(64) size_t bytes;
};

static struct mfa_block *make_block(size_t bytes)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
    bytes = (bytes + 63) / 64 * 64;
    struct mfa_block *block = aligned_alloc(64, sizeof *block + bytes);
    if (block)
        block->bytes = bytes;
    return block;
}

void *mfa_context_borrow(mfa_context *context, size_t bytes)
{
    size_t wanted = bytes;
    for (int i = 0; i < MFA_CONTEXT_BLOCKS; i++) {
        if (!atomic_load_explicit(&context->blocks[i], memory_order_relaxed))
            continue;
        struct mfa_block *block = atomic_exchange_explicit(&context->blocks[i], NULL, memory_order_acquire);
        if (!block)
            continue;
        if (block->bytes >= bytes)
            return block + 1;
        /* Replace it by a larger one, with room for problems that grow from call to call. */
        wanted = block->bytes / 4 > bytes - block->bytes ? block->bytes + block->bytes / 4 : bytes;
        free(block);
        break;
    }
    struct mfa_block *block = make_block(wanted);
    return block ? block + 1 : NULL;
}

void mfa_context_return(mfa_context *context, void *memory)
{
    struct mfa_block *block = (struct mfa_block *)memory - 1;
    for (int i = 0; i < MFA_CONTEXT_BLOCKS; i++) {
        struct mfa_block *empty = NULL;
        if (atomic_compare_exchange_strong_explicit(&context->blocks[i], &empty, block, memory_order_release,
                                                    memory_order_relaxed))
            return;
    }
    free(block);
}
