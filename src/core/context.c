/* The context: opening and closing it, its list of kernels, its blocks of memory. */
#define _GNU_SOURCE
#include "core/context.h"

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

/* Opens one backend. A device that this machine does not have is no failure, except for the CPU, which is always there:
 * then an option asks for something that this CPU does not have. */
static mfa_status open_backend(const struct mfa_backend *backend, const mfa_context_options *options,
                               struct mfa_opened *opened)
{
    opened->backend = backend;
    const mfa_status status = backend->open(options, &opened->state);
    if (status != MFA_UNAVAILABLE || backend->device == MFA_DEVICE_CPU)
        return status;
    mfa_error_copy(opened->unavailable_reason, sizeof opened->unavailable_reason, mfa_last_error());
    return MFA_OK;
}

/* Returns 0 if there is no memory. A folder whose path is too long counts as no folder. */
static int find_folders(mfa_context_options *options, mfa_context *context)
{
    char users[MFA_FILE_PATH], folder[MFA_FILE_PATH];
    const char *cache = options->cache;
    if (!cache && mfa_file_cache_folder(users))
        cache = users;
    if (cache && mfa_file_absolute(cache, folder) && !(context->cache = strdup(folder)))
        return 0;
    options->cache = context->cache;
    return !mfa_file_shipped_folder(folder) || (context->shipped = strdup(folder));
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

    if (!find_folders(&options, made))
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
        if (loaded->status == MFA_OK)
            loaded->opened->backend->unload(loaded->opened->state, loaded->kernel);
        free(loaded->error);
        free((void *)loaded);
        loaded = next;
    }
    for (size_t i = 0; i < context->backend_count; i++)
        if (!context->backends[i].unavailable_reason[0])
            context->backends[i].backend->close(context->backends[i].state);
    for (int i = 0; i < MFA_CONTEXT_BLOCKS; i++)
        free(atomic_load(&context->blocks[i]));
    free(context->cache);
    free(context->shipped);
    free(context);
}

/* The backend that has instruction sets to choose from: the CPU's. */
static const struct mfa_backend *with_isas(const struct mfa_backend *const *backends)
{
    while (*backends && !(*backends)->isa_name)
        backends++;
    return *backends;
}

const char *mfa_context_isa_name(const struct mfa_backend *const *backends, int32_t n)
{
    const struct mfa_backend *backend = with_isas(backends);
    return backend ? backend->isa_name(n) : NULL;
}

mfa_status mfa_context_isa_supported(const struct mfa_backend *const *backends, const char *isa)
{
    const struct mfa_backend *backend = with_isas(backends);
    return backend ? backend->isa_supported(isa)
                   : mfa_fail(MFA_UNAVAILABLE, "isa is %s; this library has no backend with instruction sets", isa);
}

mfa_status mfa_context_limit(mfa_context *context, int32_t threads)
{
    mfa_status status = check_threads(threads);
    for (size_t i = 0; i < context->backend_count && status == MFA_OK; i++) {
        const struct mfa_opened *opened = &context->backends[i];
        if (!opened->unavailable_reason[0] && opened->backend->set_threads)
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
        if (opened->unavailable_reason[0]) {
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
        return mfa_fail(MFA_UNAVAILABLE, "%s", unavailable->unavailable_reason);
    return mfa_fail(MFA_UNAVAILABLE, "device is %d; this library has no backend for it", problem->device);
}

struct mfa_cache_name mfa_context_file(const struct mfa_opened *opened, const struct mfa_key *key)
{
    return (struct mfa_cache_name){key, opened->backend->stamp(opened->state, key), ""};
}

struct mfa_cache_name mfa_context_library_file(const struct mfa_opened *opened, const struct mfa_key *key)
{
    const struct mfa_backend *backend = opened->backend;
    return (struct mfa_cache_name){key, backend->library_stamp(opened->state, key), backend->library_suffix};
}

/* The library's file, or NULL. */
static const char *find_library(const mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                                char path[MFA_FILE_PATH])
{
    if (!opened->backend->library_suffix)
        return NULL;
    const struct mfa_cache_name name = mfa_context_library_file(opened, key);
    return mfa_cache_find(context->cache, &name, path) || mfa_cache_find(context->shipped, &name, path) ? path : NULL;
}

/* From a valid file if there is one, else compiled and kept. */
static mfa_status load_from_disk(const mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                                 const void **kernel)
{
    const struct mfa_backend *backend = opened->backend;
    const char *const folders[2] = {context->cache, context->shipped};
    char library_path[MFA_FILE_PATH], path[MFA_FILE_PATH];
    const char *library = find_library(context, opened, key, library_path);
    const struct mfa_cache_name name = mfa_context_file(opened, key);
    for (int n = 0; n < 2; n++)
        if (mfa_cache_find(folders[n], &name, path) &&
            backend->load(opened->state, key, library, path, 0, kernel) == MFA_OK)
            return MFA_OK;
    struct mfa_cache_draft draft;
    const int written = mfa_cache_draft_begin(context->cache, &name, &draft);
    const mfa_status status = backend->compile(opened->state, key, library, written ? draft.path : NULL, 0, kernel);
    if (status == MFA_OK)
        (void)mfa_cache_draft_keep(context->cache, &name, &draft);
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

/* Whether another attempt would end in the same way. */
static int is_final(mfa_status status)
{
    return status == MFA_OK || status == MFA_UNSUPPORTED || status == MFA_COMPILE_FAILED;
}

/* Loads a kernel and puts it into the list. The caller holds the lock. */
static mfa_status load(mfa_context *context, const struct mfa_opened *opened, const struct mfa_key *key,
                       const struct mfa_loaded **result)
{
    struct mfa_loaded *made = calloc(1, sizeof *made);
    if (!made)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory to load a kernel");
    made->next = atomic_load(&context->loaded), made->opened = opened, made->key = *key;
    const mfa_status status = opened->backend->compile
                                  ? load_from_disk(context, opened, key, &made->kernel)
                                  : opened->backend->load(opened->state, key, NULL, NULL, 0, &made->kernel);
    made->status = status;
    if (!is_final(status) || (status != MFA_OK && !(made->error = strdup(mfa_last_error())))) {
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
    if (loaded->status != MFA_OK)
        return mfa_fail(loaded->status, "%s", loaded->error);
    *kernel = loaded->kernel;
    return MFA_OK;
}

/* The header of a block; the memory that is lent follows it. */
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
        /* Replaced by a larger one, with a reserve for problems that grow from call to call. */
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
