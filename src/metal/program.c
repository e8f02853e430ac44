#include "metal/program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/hash.h"
#include "metal/dispatch.h"
#include "metal/source.h"

/* Whether the key's program has this kernel. All have the layout test, for any may be the first of a process. */
static int has(const struct mfa_key *key, enum mfa_metal_kernel kernel)
{
    const int additive = key->features & MFA_FEATURE_MASK_ADDITIVE;
    switch (kernel) {
    case MFA_METAL_FORWARD:
    case MFA_METAL_DECODE:
    case MFA_METAL_DECODE_VECTOR: return kernel == mfa_metal_tiles_named(key);
    case MFA_METAL_MERGE: return key->pass == MFA_FORWARD;
    case MFA_METAL_BACKWARD_PREPROCESS:
    case MFA_METAL_BACKWARD_DQ:
    case MFA_METAL_BACKWARD_DKV: return key->pass == MFA_BACKWARD;
    case MFA_METAL_DBIAS:
    case MFA_METAL_DBIAS_SUM: return key->pass == MFA_BACKWARD && additive;
    case MFA_METAL_BLOCK_MASK: return additive || (key->features & MFA_FEATURE_MASK_BOOL);
    case MFA_METAL_LAYOUT_TEST: return 1;
    case MFA_METAL_KERNELS: break;
    }
    return 0;
}

/* --- Texts ---------------------------------------------------------------------------------------- */

uint64_t mfa_metal_program_library_stamp(const struct mfa_key *key)
{
    uint64_t hash = MFA_HASH_EMPTY;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++) {
        char *text;
        if (!has(key, kernel) || mfa_metal_source_write(key, kernel, NULL, &text) != MFA_OK)
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
    int kernel = 0;
    while (kernel < MFA_METAL_KERNELS && (!has(key, kernel) || n-- > 0))
        kernel++;
    *text = *name = NULL;
    if (kernel == MFA_METAL_KERNELS)
        return MFA_OK;
    const char *function = mfa_metal_source_function(kernel);
    const size_t length = strlen(function) + sizeof ".metal";
    const mfa_status status = mfa_metal_source_write(key, kernel, NULL, text);
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

/* --- From text to pipeline ------------------------------------------------------------------------ */

/* Inputs and state of making pipelines. Objects are owned; nil: there is none. */
struct maker {
    const struct mfa_metal_device *device;
    const struct mfa_key *key;
    id metallib, options, archive;
    int adds; /* 1: pipelines are added to the new archive; 0: the archive must have all of them */
};

static id open_archive(const struct mfa_metal_device *device, const char *path, id *error)
{
    id description = mfa_metal_objc_new("MTLBinaryArchiveDescriptor");
    if (path)
        SEND_WITH(archive_set_url, description, mfa_metal_objc_url(path));
    id archive = SEND_WITH(new_archive, device->device, description, error);
    mfa_metal_objc_release(description);
    return archive;
}

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

static struct maker begin(const struct mfa_metal_device *device, const struct mfa_key *key, const char *library)
{
    struct maker maker = {.device = device, .key = key, .options = compile_options()};
    id error = NULL;
    if (library)
        maker.metallib = SEND_WITH(new_library_of_file, device->device, mfa_metal_objc_url(library), &error);
    return maker;
}

static void end(struct maker *maker)
{
    mfa_metal_objc_release(maker->archive);
    mfa_metal_objc_release(maker->options);
    mfa_metal_objc_release(maker->metallib);
}

/* From the metallib, else from the text. */
static mfa_status make_function(const struct maker *maker, enum mfa_metal_kernel kernel, id *function)
{
    const char *name = mfa_metal_source_function(kernel);
    char *text;
    id error = NULL;
    *function = SEND_WITH(new_function, maker->metallib, mfa_metal_objc_string(name));
    if (*function)
        return MFA_OK;
    const mfa_status status = mfa_metal_source_write(maker->key, kernel, NULL, &text);
    if (status != MFA_OK)
        return status;
    id library = SEND_WITH(new_library, maker->device->device, mfa_metal_objc_string(text), maker->options, &error);
    free(text);
    if (!library)
        return mfa_metal_objc_fail(MFA_COMPILE_FAILED, name, error);
    *function = SEND_WITH(new_function, library, mfa_metal_objc_string(name));
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

/* Describes the pipeline, owned. If a new archive cannot add it, the archive is dropped, and no file is written. */
static id describe(struct maker *maker, id function)
{
    id description = mfa_metal_objc_new("MTLComputePipelineDescriptor"), error = NULL;
    SEND_WITH(description_set_function, description, function);
    if (maker->archive && maker->adds && !SEND_WITH(archive_add, maker->archive, description, &error)) {
        mfa_metal_objc_release(maker->archive);
        maker->archive = NULL;
    }
    if (maker->archive)
        SEND_WITH(description_set_archives, description,
                  SEND_WITH(array_of, mfa_metal_objc.class_named("NSArray"), maker->archive));
    return description;
}

static mfa_status make_pipeline(struct maker *maker, enum mfa_metal_kernel kernel, id *pipeline)
{
    const NSUInteger options = maker->archive && !maker->adds ? MTL_FAIL_ON_ARCHIVE_MISS : 0;
    id function, error = NULL;
    mfa_status status = make_function(maker, kernel, &function);
    if (status != MFA_OK)
        return status;
    id description = describe(maker, function);
    *pipeline = SEND_WITH(new_pipeline, maker->device->device, description, options, NULL, &error);
    mfa_metal_objc_release(description);
    mfa_metal_objc_release(function);
    if (!*pipeline)
        return mfa_metal_objc_fail(MFA_COMPILE_FAILED, mfa_metal_source_function(kernel), error);
    return check_pipeline(*pipeline, kernel, mfa_metal_dispatch_threads(kernel, maker->key));
}

static mfa_status make_program(struct maker *maker, struct mfa_metal_program **result)
{
    struct mfa_metal_program *program = calloc(1, sizeof *program);
    mfa_status status = program ? MFA_OK : mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a kernel");
    for (int kernel = 0; kernel < MFA_METAL_KERNELS && status == MFA_OK; kernel++)
        if (has(maker->key, kernel))
            status = make_pipeline(maker, kernel, &program->pipelines[kernel]);
    if (status == MFA_OK)
        *result = program;
    else
        mfa_metal_program_free(program);
    return status;
}

mfa_status mfa_metal_program_compile(const struct mfa_metal_device *device, const struct mfa_key *key,
                                     const char *library, const char *path, struct mfa_metal_program **program)
{
    struct maker maker = begin(device, key, library);
    id error = NULL;
    maker.adds = 1;
    if (path)
        maker.archive = open_archive(device, NULL, &error);
    const mfa_status status = make_program(&maker, program);
    if (status == MFA_OK && maker.archive && !SEND_WITH(archive_write, maker.archive, mfa_metal_objc_url(path), &error))
        remove(path); /* it may be incomplete */
    end(&maker);
    return status;
}

mfa_status mfa_metal_program_load(const struct mfa_metal_device *device, const struct mfa_key *key, const char *library,
                                  const char *path, struct mfa_metal_program **program)
{
    id error = NULL, archive = open_archive(device, path, &error);
    if (!archive)
        return mfa_metal_objc_fail(MFA_COMPILE_FAILED, path, error);
    struct maker maker = begin(device, key, library);
    maker.archive = archive;
    const mfa_status status = make_program(&maker, program);
    end(&maker);
    return status;
}

void mfa_metal_program_free(struct mfa_metal_program *program)
{
    if (!program)
        return;
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++)
        mfa_metal_objc_release(program->pipelines[kernel]);
    free(program);
}
