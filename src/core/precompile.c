/* Fills a folder with the files that context.c looks for. Valid files that are there are kept. */
#include "core/precompile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "core/cache.h"
#include "core/plan.h"
#include "core/problem.h"

#define TEXTS 16 /* most of one key's program */

struct texts {
    int32_t count;
    char *paths[TEXTS];
};

static mfa_status cannot_write(const char *folder)
{
    return mfa_fail(MFA_INVALID, "folder is %s, where no file can be written; it must be one that can be", folder);
}

static mfa_status write_text(const char *folder, const char *name, const char *text, char **path)
{
    const size_t length = strlen(folder) + strlen(name) + 2;
    *path = malloc(length);
    if (!*path)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a path of %zu bytes", length);
    snprintf(*path, length, "%s/%s", folder, name);
    return mfa_file_write(*path, text, strlen(text)) ? MFA_OK : cannot_write(folder);
}

static mfa_status write_texts(const struct mfa_opened *opened, const struct mfa_key *key, const char *folder,
                              struct texts *texts)
{
    for (texts->count = 0; texts->count < TEXTS; texts->count++) {
        char *text = NULL, *name = NULL;
        mfa_status status = opened->backend->text(opened->state, key, texts->count, &text, &name);
        if (status != MFA_OK || !text)
            return status;
        status = write_text(folder, name, text, &texts->paths[texts->count]);
        free(text);
        free(name);
        if (status != MFA_OK)
            return status;
    }
    return mfa_fail(MFA_INTERNAL, "a program has more than %d texts", TEXTS);
}

static mfa_status make_library(const struct mfa_opened *opened, const struct mfa_key *key, const char *folder,
                               mfa_compiler compiler, void *argument, int *made)
{
    const struct mfa_cache_name name = mfa_context_library_file(opened, key);
    char path[MFA_FILE_PATH], line[MFA_KEY_TEXT];
    struct mfa_cache_draft draft;
    struct texts texts = {0, {NULL}};
    if (mfa_cache_find(folder, &name, path))
        return MFA_OK;
    if (!mfa_cache_draft_begin(folder, &name, &draft))
        return cannot_write(folder);
    mfa_key_print(key, line);
    mfa_status status = write_texts(opened, key, draft.folder, &texts);
    if (status == MFA_OK && compiler((const char *const *)texts.paths, texts.count, draft.path, argument) != 0)
        status = mfa_fail(MFA_COMPILE_FAILED, "%s: the compiler that was given failed", line);
    if (status == MFA_OK && !mfa_cache_draft_keep(folder, &name, &draft))
        status = mfa_fail(MFA_COMPILE_FAILED, "%s: the compiler that was given left no file that could be kept", line);
    *made = status == MFA_OK;
    for (int n = 0; n < TEXTS && texts.paths[n]; n++) {
        remove(texts.paths[n]);
        free(texts.paths[n]);
    }
    mfa_cache_draft_end(&draft);
    return status;
}

/* `anew`: even if it is there, because it was made from another library. */
static mfa_status make_kernel(const struct mfa_opened *opened, const struct mfa_key *key, const char *folder, int anew)
{
    const struct mfa_backend *backend = opened->backend;
    const struct mfa_cache_name name = mfa_context_file(opened, key);
    char library_path[MFA_FILE_PATH], path[MFA_FILE_PATH], line[MFA_KEY_TEXT];
    const char *library = NULL;
    struct mfa_cache_draft draft;
    const void *kernel;
    if (backend->library_suffix) {
        const struct mfa_cache_name library_name = mfa_context_library_file(opened, key);
        library = mfa_cache_find(folder, &library_name, library_path) ? library_path : NULL;
    }
    /* A file that a process made for itself may have a part of it only. */
    if (!anew && mfa_cache_find(folder, &name, path) &&
        backend->load(opened->state, key, library, path, 1, &kernel) == MFA_OK) {
        backend->unload(opened->state, kernel);
        return MFA_OK;
    }
    if (!mfa_cache_draft_begin(folder, &name, &draft))
        return cannot_write(folder);
    mfa_status status = backend->compile(opened->state, key, library, draft.path, 1, &kernel);
    if (status == MFA_OK) {
        backend->unload(opened->state, kernel);
        mfa_key_print(key, line);
        if (!mfa_cache_draft_keep(folder, &name, &draft))
            status = mfa_fail(MFA_COMPILE_FAILED, "%s: compiled, but the device gave no file that could be kept", line);
    }
    mfa_cache_draft_end(&draft);
    return status;
}

mfa_status mfa_precompile_problem(mfa_context *context, const mfa_problem *problem, const char *folder,
                                  mfa_compiler compiler, void *argument)
{
    mfa_problem canonical;
    struct mfa_choice choice;
    const struct mfa_opened *opened;
    mfa_status status = mfa_problem_check(problem, &canonical);
    if (status == MFA_OK)
        status = mfa_context_choose(context, &canonical, &opened);
    if (status != MFA_OK)
        return status;
    const struct mfa_backend *backend = opened->backend;
    char absolute[MFA_FILE_PATH];
    if (!backend->compile)
        return MFA_OK;
    if (folder && !mfa_file_absolute(folder, absolute))
        return cannot_write(folder);
    folder = folder ? absolute : context->cache;
    if (!folder)
        return mfa_fail(MFA_INVALID, "folder is NULL and this context has no cache folder; one must be given");
    mfa_lock_take(&context->loading);
    for (int simpler = 0; simpler < 2; simpler++) {
        int made = 0;
        status = MFA_OK;
        backend->choose(opened->state, &canonical, simpler, &choice);
        if (compiler && backend->library_suffix)
            status = make_library(opened, &choice.key, folder, compiler, argument, &made);
        if (status == MFA_OK)
            status = make_kernel(opened, &choice.key, folder, made);
        if (status != MFA_UNSUPPORTED)
            break;
    }
    mfa_lock_release(&context->loading);
    return status;
}
