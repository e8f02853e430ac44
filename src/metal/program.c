#define _GNU_SOURCE /* strdup */
#include "metal/program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "core/cache.h"
#include "metal/dispatch.h"
#include "metal/source.h"

#define BIT MFA_METAL_KERNEL_BIT

static int is_masked(const struct mfa_key *key)
{
    return (key->features & (MFA_FEATURE_MASK_ADDITIVE | MFA_FEATURE_MASK_BOOL)) != 0;
}

/* The first kernel whose text is compiled; layout_test is in that text, too. */
static enum mfa_metal_kernel first_of(const struct mfa_key *key)
{
    return key->pass == MFA_FORWARD ? mfa_metal_tiles_named(key) : MFA_METAL_BACKWARD_PREPROCESS;
}

uint32_t mfa_metal_program_always(const struct mfa_key *key)
{
    uint32_t kernels = BIT(first_of(key));
    if (key->pass == MFA_BACKWARD)
        kernels |= BIT(MFA_METAL_BACKWARD_DQ) | BIT(MFA_METAL_BACKWARD_DKV);
    return is_masked(key) ? kernels | BIT(MFA_METAL_BLOCK_MASK) : kernels;
}

uint32_t mfa_metal_program_all(const struct mfa_key *key)
{
    uint32_t kernels = mfa_metal_program_always(key);
    if (key->pass == MFA_FORWARD)
        kernels |= BIT(MFA_METAL_MERGE);
    if (key->features & MFA_FEATURE_VARLEN)
        kernels |= BIT(MFA_METAL_UNUSED_QUERIES) | (key->pass == MFA_BACKWARD ? BIT(MFA_METAL_UNUSED_KEYS) : 0);
    if (key->pass == MFA_BACKWARD && (key->features & MFA_FEATURE_MASK_ADDITIVE))
        kernels |= BIT(MFA_METAL_DBIAS) | BIT(MFA_METAL_DBIAS_SUM);
    if (key->pass == MFA_BACKWARD && (key->features & MFA_FEATURE_SINKS))
        kernels |= BIT(MFA_METAL_DSINKS);
    return kernels;
}

/* --- Texts ---------------------------------------------------------------------------------------- */

static mfa_status write_text(const struct mfa_key *key, enum mfa_metal_kernel kernel, char **text)
{
    return kernel == first_of(key) ? mfa_metal_source_write_with_test(key, kernel, text)
                                   : mfa_metal_source_write(key, kernel, NULL, text);
}

uint64_t mfa_metal_program_library_stamp(const struct mfa_key *key)
{
    const uint32_t kernels = mfa_metal_program_all(key);
    uint64_t hash = MFA_HASH_EMPTY;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++) {
        char *text;
        if (!(kernels & BIT(kernel)) || write_text(key, kernel, &text) != MFA_OK)
            continue;
        hash = mfa_hash_bytes(hash, text, strlen(text) + 1);
        free(text);
    }
    return hash;
}

uint64_t mfa_metal_program_stamp(const struct mfa_metal_device *device, const struct mfa_key *key)
{
    uint64_t hash = mfa_metal_program_library_stamp(key);
    hash = mfa_hash_bytes(hash, device->name, strlen(device->name) + 1);
    hash = mfa_hash_bytes(hash, device->build, strlen(device->build) + 1);
    return mfa_hash_bytes(hash, &device->family, sizeof device->family);
}

mfa_status mfa_metal_program_text(const struct mfa_key *key, int n, char **text, char **name)
{
    const uint32_t kernels = mfa_metal_program_all(key);
    int kernel = 0;
    while (kernel < MFA_METAL_KERNELS && (!(kernels & BIT(kernel)) || n-- > 0))
        kernel++;
    *text = *name = NULL;
    if (kernel == MFA_METAL_KERNELS)
        return MFA_OK;
    const char *function = mfa_metal_source_function(kernel);
    const size_t length = strlen(function) + sizeof ".metal";
    const mfa_status status = write_text(key, kernel, text);
    if (status != MFA_OK)
        return status;
    *name = malloc(length);
    if (*name) {
        snprintf(*name, length, "%s.metal", function);
        return MFA_OK;
    }
    free(*text);
    *text = NULL;
    return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for the name of a text");
}

/* --- Archives ------------------------------------------------------------------------------------- */

static const char no_archive[] = "no archive\n"; /* in the place of one */

static int is_marked(const char *path)
{
    char *bytes;
    size_t length;
    if (!mfa_file_read(path, &bytes, &length))
        return 0;
    const int marked = length == sizeof no_archive - 1 && !memcmp(bytes, no_archive, length);
    free(bytes);
    return marked;
}

static void mark(const char *path)
{
    (void)mfa_file_write(path, no_archive, sizeof no_archive - 1);
}

static id open_archive(const struct mfa_metal_device *device, const char *path, id *error)
{
    id description = mfa_metal_objc_new("MTLBinaryArchiveDescriptor");
    if (path)
        SEND_WITH(archive_set_url, description, mfa_metal_objc_url(path));
    id archive = SEND_WITH(new_archive, device->device, description, error);
    mfa_metal_objc_release(description);
    return archive;
}

/* Describes the pipeline of a function, owned. `archive`: where its code is looked for; or nil. */
static id describe(id function, id archive)
{
    id description = mfa_metal_objc_new("MTLComputePipelineDescriptor");
    SEND_WITH(description_set_function, description, function);
    if (archive)
        SEND_WITH(description_set_archives, description,
                  SEND_WITH(array_of, mfa_metal_objc.class_named("NSArray"), archive));
    return description;
}

static id new_pipeline(const struct mfa_metal_device *device, id function, id archive, NSUInteger options, id *error)
{
    id description = describe(function, archive);
    id pipeline = SEND_WITH(new_pipeline, device->device, description, options, NULL, error);
    mfa_metal_objc_release(description);
    return pipeline;
}

/* --- From text to pipeline ------------------------------------------------------------------------ */

/* Fast math would lose NaNs, by which a training run detects that it has diverged. Fast operations are called by name:
 * fast::exp2. */
static id compile_options(void)
{
    id options = mfa_metal_objc_new("MTLCompileOptions");
    SEND_WITH(options_set_language, options, (NSUInteger)MTL_LANGUAGE_3_1);
    if (mfa_metal_objc_has(options, MFA_METAL_METHOD_options_set_math))
        SEND_WITH(options_set_math, options, (NSInteger)MTL_MATH_SAFE);
    else
        SEND_WITH(options_set_fast_math, options, (BOOL)0);
    return options;
}

/* What making some pipelines of a program holds. All objects are owned; nil: there is none. */
struct maker {
    struct mfa_metal_program *program;
    uint32_t kernels;
    id first;                        /* the library of the first kernel, once it is made */
    id functions[MFA_METAL_KERNELS]; /* that the archive is to have */
    int grown;                       /* the archive, by one of them */
    int missed;                      /* the archive does not have the first kernel, which all archives have */
    enum {
        MAKE,   /* what the archive does not have */
        EXPECT, /* all but layout_test of the archive */
        ADD     /* to the archive, which is new */
    } how;
};

static void end(struct maker *maker)
{
    mfa_metal_objc_release(maker->first);
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++)
        mfa_metal_objc_release(maker->functions[kernel]);
}

/* The library of a text, owned. */
static mfa_status make_library(const struct maker *maker, enum mfa_metal_kernel kernel, id *library)
{
    const struct mfa_metal_program *program = maker->program;
    char *text;
    id error = NULL;
    const mfa_status status = write_text(&program->key, kernel, &text);
    if (status != MFA_OK)
        return status;
    id options = compile_options();
    *library = SEND_WITH(new_library, program->device->device, mfa_metal_objc_string(text), options, &error);
    mfa_metal_objc_release(options);
    free(text);
    return *library ? MFA_OK : mfa_metal_objc_fail(MFA_COMPILE_FAILED, mfa_metal_source_function(kernel), error);
}

/* From the metallib, else from the text; that of layout_test is in the text of the first kernel. */
static mfa_status make_function(struct maker *maker, enum mfa_metal_kernel kernel, id *function)
{
    const enum mfa_metal_kernel first = first_of(&maker->program->key);
    const char *name = mfa_metal_source_function(kernel);
    const int shares = kernel == first || kernel == MFA_METAL_LAYOUT_TEST;
    *function = SEND_WITH(new_function, maker->program->metallib, mfa_metal_objc_string(name));
    if (*function)
        return MFA_OK;
    id library = shares ? maker->first : NULL;
    if (!library) {
        const mfa_status status = make_library(maker, shares ? first : kernel, &library);
        if (status != MFA_OK)
            return status;
    }
    *function = SEND_WITH(new_function, library, mfa_metal_objc_string(name));
    if (shares)
        maker->first = library;
    else
        mfa_metal_objc_release(library); /* the function retains what it needs */
    return *function ? MFA_OK : mfa_fail(MFA_COMPILE_FAILED, "%s: Metal finds no such function in its library", name);
}

static mfa_status check_pipeline(id pipeline, enum mfa_metal_kernel kernel, int32_t threads)
{
    const char *name = mfa_metal_source_function(kernel);
    const NSUInteger width = SEND(pipeline_width, pipeline), most = SEND(pipeline_threads, pipeline);
    if (width != 32)
        return mfa_fail(MFA_UNSUPPORTED, "%s: a simdgroup of this device has %lu threads; the kernels need 32", name,
                        width);
    if (most < (NSUInteger)threads)
        return mfa_fail(MFA_UNSUPPORTED, "%s: this device runs at most %lu threads a threadgroup of it; it needs %d",
                        name, most, threads);
    return MFA_OK;
}

/* Adds a function to the archive. If that cannot be done, the program goes on without one. */
static void add(struct maker *maker, enum mfa_metal_kernel kernel, id function)
{
    struct mfa_metal_program *program = maker->program;
    id error = NULL, description = describe(function, NULL);
    if (SEND_WITH(archive_add, program->archive, description, &error)) {
        maker->functions[kernel] = SEND(retain, function);
        maker->grown = 1;
    } else {
        mfa_metal_objc_release(program->archive);
        program->archive = NULL;
    }
    mfa_metal_objc_release(description);
}

static mfa_status make_pipeline(struct maker *maker, enum mfa_metal_kernel kernel, id *pipeline)
{
    const struct mfa_metal_program *program = maker->program;
    const int expected = maker->how == EXPECT && kernel != MFA_METAL_LAYOUT_TEST;
    id function, error = NULL;
    mfa_status status = make_function(maker, kernel, &function);
    if (status != MFA_OK)
        return status;
    *pipeline = NULL;
    if (program->archive && maker->how != ADD)
        *pipeline = new_pipeline(program->device, function, program->archive, MTL_FAIL_ON_ARCHIVE_MISS, &error);
    maker->missed |= !*pipeline && expected && kernel == first_of(&program->key);
    if (!*pipeline && !expected) {
        if (program->archive)
            add(maker, kernel, function);
        *pipeline = new_pipeline(program->device, function, program->archive, 0, &error);
    }
    mfa_metal_objc_release(function);
    if (!*pipeline)
        return mfa_metal_objc_fail(MFA_COMPILE_FAILED, mfa_metal_source_function(kernel), error);
    return check_pipeline(*pipeline, kernel, mfa_metal_dispatch_threads(kernel, &program->key));
}

static mfa_status make_pipelines(struct maker *maker)
{
    mfa_status status = MFA_OK;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS && status == MFA_OK; kernel++)
        if (maker->kernels & BIT(kernel)) {
            id pipeline = NULL;
            status = make_pipeline(maker, kernel, &pipeline);
            if (status == MFA_OK)
                atomic_store_explicit(&maker->program->made[kernel].pipeline, pipeline, memory_order_release);
            else
                mfa_metal_objc_release(pipeline);
        }
    return status;
}

/* Writes the archive to `path`, and opens that file once: what was added must be found there, else a mark takes its
 * place, so that later processes do not compile for an archive in vain. */
static void write_archive(const struct maker *maker, const char *path)
{
    const struct mfa_metal_program *program = maker->program;
    id error = NULL, reopened = NULL;
    if (SEND_WITH(archive_write, program->archive, mfa_metal_objc_url(path), &error))
        reopened = open_archive(program->device, path, &error);
    if (!reopened)
        remove(path); /* it may be incomplete */
    int missing = 0;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS && reopened; kernel++)
        if (maker->functions[kernel]) {
            id pipeline =
                new_pipeline(program->device, maker->functions[kernel], reopened, MTL_FAIL_ON_ARCHIVE_MISS, &error);
            missing += !pipeline;
            mfa_metal_objc_release(pipeline);
        }
    if (missing)
        mark(path);
    mfa_metal_objc_release(reopened);
}

/* --- Programs ------------------------------------------------------------------------------------- */

static mfa_status new_program(const struct mfa_metal_origin *origin, struct mfa_metal_program **program)
{
    id error = NULL;
    *program = calloc(1, sizeof **program);
    if (!*program)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a kernel");
    (*program)->key = *origin->key, (*program)->device = origin->device, (*program)->cache = origin->cache;
    if (origin->library)
        (*program)->metallib =
            SEND_WITH(new_library_of_file, origin->device->device, mfa_metal_objc_url(origin->library), &error);
    return MFA_OK;
}

mfa_status mfa_metal_program_compile(const struct mfa_metal_origin *origin, const char *path,
                                     struct mfa_metal_program **result)
{
    struct mfa_metal_program *program;
    id error = NULL;
    mfa_status status = new_program(origin, &program);
    if (status != MFA_OK)
        return status;
    struct maker maker = {.program = program, .kernels = origin->kernels, .how = ADD};
    if (path && !origin->misses)
        program->archive = open_archive(origin->device, NULL, &error);
    status = make_pipelines(&maker);
    if (status == MFA_OK && program->archive)
        write_archive(&maker, path);
    else if (status == MFA_OK && path && origin->misses)
        mark(path);
    end(&maker);
    if (status == MFA_OK)
        *result = program;
    else
        mfa_metal_program_free(program);
    return status;
}

/* Keeps the archive in the cache. */
static void keep_archive(const struct maker *maker)
{
    const struct mfa_metal_program *program = maker->program;
    const struct mfa_cache_name name = {&program->key, mfa_metal_program_stamp(program->device, &program->key), ""};
    struct mfa_cache_draft draft;
    if (!mfa_cache_draft_begin(program->cache, &name, &draft))
        return;
    write_archive(maker, draft.path);
    (void)mfa_cache_draft_keep(program->cache, &name, &draft);
    mfa_cache_draft_end(&draft);
}

mfa_status mfa_metal_program_load(struct mfa_metal_origin *origin, const char *path, struct mfa_metal_program **result)
{
    struct mfa_metal_program *program;
    const int marked = is_marked(path);
    id error = NULL;
    mfa_status status = new_program(origin, &program);
    if (status != MFA_OK)
        return status;
    if (!marked)
        program->archive = open_archive(origin->device, path, &error);
    if (!marked && !program->archive) {
        mfa_metal_program_free(program);
        return mfa_metal_objc_fail(MFA_COMPILE_FAILED, path, error);
    }
    struct maker maker = {.program = program, .kernels = origin->kernels, .how = marked ? MAKE : EXPECT};
    status = make_pipelines(&maker);
    if (status == MFA_OK && maker.grown && program->archive)
        keep_archive(&maker);
    end(&maker);
    if (status == MFA_OK) {
        *result = program;
        return MFA_OK;
    }
    origin->misses = maker.missed && (!origin->library || program->metallib); /* else it may be of that metallib */
    mfa_metal_program_free(program);
    return status;
}

static mfa_status make_later(struct mfa_metal_program *program, enum mfa_metal_kernel kernel)
{
    struct mfa_metal_made *made = &program->made[kernel];
    struct maker maker = {.program = program, .kernels = BIT(kernel), .how = MAKE};
    if (made->status != MFA_OK)
        return mfa_fail(made->status, "%s", made->sentence);
    const mfa_status status = make_pipelines(&maker);
    if (status == MFA_OK && maker.grown && program->archive)
        keep_archive(&maker);
    end(&maker);
    if (status == MFA_UNSUPPORTED || status == MFA_COMPILE_FAILED) {
        made->sentence = strdup(mfa_last_error());
        made->status = made->sentence ? status : MFA_OK;
    }
    return status;
}

mfa_status mfa_metal_program_pipeline(struct mfa_metal_program *program, enum mfa_metal_kernel kernel, id *pipeline)
{
    _Atomic(id) *made = &program->made[kernel].pipeline;
    mfa_status status = MFA_OK;
    *pipeline = atomic_load_explicit(made, memory_order_acquire);
    if (*pipeline)
        return MFA_OK;
    mfa_lock_take(&program->making);
    if (!atomic_load(made))
        status = make_later(program, kernel);
    *pipeline = atomic_load(made);
    mfa_lock_release(&program->making);
    return status;
}

void mfa_metal_program_free(struct mfa_metal_program *program)
{
    if (!program)
        return;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++) {
        mfa_metal_objc_release(atomic_load(&program->made[kernel].pipeline));
        free(program->made[kernel].sentence);
    }
    mfa_metal_objc_release(program->archive);
    mfa_metal_objc_release(program->metallib);
    free(program);
}
