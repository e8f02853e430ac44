/* Libraries, their functions, and pipeline states: what is compiled, and when. The front end makes a library from text;
 * making a pipeline compiles the function for the GPU, unless an archive has it. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/hash.h"
#include "metalsim.h"
#include "runtime/metal.h"

#define LANGUAGE(major, minor) ((NSUInteger)(((major) << 16) + (minor)))
#define MATH_SAFE 0            /* MTLMathModeSafe */
#define MATH_FAST 2            /* MTLMathModeFast */
#define FAIL_ON_ARCHIVE_MISS 4 /* MTLPipelineOptionFailOnBinaryArchiveMiss */

/* --- How a text is compiled ----------------------------------------------------------------------- */

struct options {
    struct metalsim_object object;
    NSUInteger language; /* 0: not set */
    int not_fast;
};

METALSIM_CLASS(MTLCompileOptions, struct options, NULL)

void metalsim_options_set_language(id self, SEL selector, NSUInteger version)
{
    (void)selector;
    ((struct options *)self)->language = version;
}

void metalsim_options_set_math(id self, SEL selector, NSInteger mode)
{
    if (mode < MATH_SAFE || mode > MATH_FAST)
        metalsim_find("%s: the mode is %ld; it must be 0 to 2", selector, mode);
    ((struct options *)self)->not_fast = mode != MATH_FAST;
}

void metalsim_options_set_fast(id self, SEL selector, BOOL enabled)
{
    (void)selector;
    ((struct options *)self)->not_fast = !enabled;
}

/* The newest language that this macOS compiles. */
static NSUInteger newest_language(void)
{
    return metalsim_now.macos < 15 ? LANGUAGE(3, 1) : metalsim_now.macos < 26 ? LANGUAGE(3, 2) : LANGUAGE(4, 0);
}

/* --- Libraries ------------------------------------------------------------------------------------ */

static void finish_library(id self)
{
    struct library *library = (struct library *)self;
    for (size_t i = 0; i < library->count; i++)
        metalsim_program_close(library->programs[i]);
    free(library->programs);
}

METALSIM_CLASS(MTLLibrary, struct library, finish_library)

/* Adds a text to the library; 0, and an error, if it does not compile. */
static int add_text(struct library *library, const char *text, int fast_math, id *error)
{
    const char *why = NULL;
    struct program *program = metalsim_program_open(text, fast_math, &why);
    if (!program) {
        if (error)
            *error = metalsim_error("%s", why);
        return 0;
    }
    library->programs = realloc(library->programs, (library->count + 1) * sizeof *library->programs);
    if (!library->programs)
        abort();
    library->programs[library->count++] = program;
    library->hash = mfa_hash_bytes(library->hash, text, strlen(text) + 1);
    return 1;
}

/* `origin` tells libraries apart whose texts are the same: archives know functions by what the front end made. */
static id make_library(const char *texts, size_t length, const char *origin, int fast_math, id *error)
{
    struct library *library = (struct library *)metalsim_object_create(&metalsim_class_MTLLibrary);
    library->hash = mfa_hash_bytes(MFA_HASH_EMPTY, origin, strlen(origin));
    for (size_t at = 0; at < length; at += strlen(texts + at) + 1)
        if (!add_text(library, texts + at, fast_math, error)) {
            metalsim_release(&library->object);
            return NULL;
        }
    return &library->object;
}

id metalsim_device_new_library(id self, SEL selector, id source, id options, id *error)
{
    (void)self;
    const char *text = metalsim_text(source), *why = NULL;
    const struct options *o = (struct options *)options;
    if (o && !metalsim_object_is(options, &metalsim_class_MTLCompileOptions, "options"))
        return NULL;
    METALSIM_COUNT(sources);
    if (!error)
        metalsim_find("%s: error is NULL, and nobody learns what the compiler says", selector);
    if (metalsim_fails(METALSIM_FAULT_COMPILE_ERROR))
        why = "program_source:1:1: error: an injected one";
    else if (o && o->language > newest_language())
        why = "the language version is newer than this system's compiler";
    else if ((!o || o->language < LANGUAGE(3, 1)) && strstr(text, "bfloat"))
        why = "error: unknown type name 'bfloat'; did you mean 'float'?";
    if (why) {
        if (error)
            *error = metalsim_error("%s", why);
        return NULL;
    }
    const int fast_math = !(o && o->not_fast);
    return make_library(text, strlen(text) + 1, fast_math ? "fast source" : "source", fast_math, error);
}

/* --- Library files: a mark, a hash of the texts, and the texts, each with its end ----------------- */

static const char mark[4] = {'M', 'T', 'L', 'B'};
#define BEGIN (sizeof mark + sizeof(uint64_t)) /* of the texts */

static int add_file(char **bytes, size_t *length, const char *path)
{
    char *text;
    size_t count;
    if (!mfa_file_read(path, &text, &count))
        return 0;
    *bytes = realloc(*bytes, *length + count + 1);
    if (!*bytes)
        abort();
    memcpy(*bytes + *length, text, count);
    (*bytes)[*length + count] = 0;
    *length += count + 1;
    free(text);
    return 1;
}

int32_t metalsim_runtime_compile(const char *const *texts, int32_t count, const char *library, void *unused)
{
    (void)unused;
    size_t length = BEGIN;
    char *bytes = calloc(1, length);
    int good = bytes != NULL;
    for (int32_t i = 0; i < count && good; i++)
        good = add_file(&bytes, &length, texts[i]);
    if (good) {
        const uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, bytes + BEGIN, length - BEGIN);
        memcpy(bytes, mark, sizeof mark);
        memcpy(bytes + sizeof mark, &hash, sizeof hash);
        good = mfa_file_write(library, bytes, length);
    }
    free(bytes);
    return !good;
}

id metalsim_device_open_library(id self, SEL selector, id url, id *error)
{
    (void)self, (void)selector;
    const char *path = metalsim_url_path(url);
    char *bytes = NULL;
    size_t length = 0;
    id library = NULL;
    if (!metalsim_fails(METALSIM_FAULT_LIBRARY_REFUSED) && mfa_file_read(path, &bytes, &length) && length > BEGIN &&
        !memcmp(bytes, mark, sizeof mark) && !bytes[length - 1]) {
        const uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, bytes + BEGIN, length - BEGIN);
        if (memcmp(bytes + sizeof mark, &hash, sizeof hash))
            metalsim_find("a damaged library is opened: %s", path);
        METALSIM_COUNT(metallibs);
        library = make_library(bytes + BEGIN, length - BEGIN, "file", 0, error);
    } else if (error) {
        *error = metalsim_error("Invalid library file: \"%s\"", path);
    }
    free(bytes);
    return library;
}

/* --- Functions ------------------------------------------------------------------------------------ */

static void finish_function(id self)
{
    struct function *function = (struct function *)self;
    metalsim_release(function->library);
    free(function->name);
}

METALSIM_CLASS(MTLFunction, struct function, finish_function)

id metalsim_library_new_function(id self, SEL selector, id name)
{
    (void)selector;
    struct library *library = (struct library *)self;
    const char *text = metalsim_text(name);
    size_t i = 0;
    while (i < library->count && !metalsim_program_threads(library->programs[i], text))
        i++;
    if (i == library->count || metalsim_fails(METALSIM_FAULT_NO_FUNCTION))
        return NULL;
    struct function *function = (struct function *)metalsim_object_create(&metalsim_class_MTLFunction);
    metalsim_retain(self);
    function->library = self, function->program = library->programs[i], function->name = strdup(text);
    function->hash = mfa_hash_bytes(library->hash, text, strlen(text));
    return &function->object;
}

/* --- Pipelines ------------------------------------------------------------------------------------ */

struct description {
    struct metalsim_object object;
    id function, archives;
};

static void finish_description(id self)
{
    struct description *description = (struct description *)self;
    metalsim_release(description->function);
    metalsim_release(description->archives);
}

METALSIM_CLASS(MTLComputePipelineDescriptor, struct description, finish_description)

void metalsim_description_set_function(id self, SEL selector, id function)
{
    struct description *description = (struct description *)self;
    if (function && !metalsim_object_is(function, &metalsim_class_MTLFunction, selector))
        return;
    metalsim_retain(function);
    metalsim_release(description->function);
    description->function = function;
}

void metalsim_description_set_archives(id self, SEL selector, id archives)
{
    struct description *description = (struct description *)self;
    if (archives && !metalsim_object_is(archives, &metalsim_class_NSArray, selector))
        return;
    metalsim_retain(archives);
    metalsim_release(description->archives);
    description->archives = archives;
}

struct function *metalsim_description_function(id descriptor)
{
    if (!metalsim_object_is(descriptor, &metalsim_class_MTLComputePipelineDescriptor, "a pipeline's descriptor"))
        return NULL;
    id function = ((struct description *)descriptor)->function;
    if (!function)
        metalsim_find("a pipeline's descriptor has no function");
    return (struct function *)function;
}

static void finish_pipeline(id self)
{
    metalsim_release(((struct pipeline *)self)->function);
}

METALSIM_CLASS(MTLComputePipelineState, struct pipeline, finish_pipeline)

static id make_pipeline(struct function *function, int archived, id *error)
{
    if (metalsim_fails_for(METALSIM_FAULT_NO_PIPELINE, function->name)) {
        if (error)
            *error = metalsim_error("Compute function exceeds available stack space");
        return NULL;
    }
    const uint64_t none[PROGRAM_BUFFERS] = {0};
    const uint64_t declared = metalsim_program_threadgroup_bytes(function->program, function->name, none);
    if (declared > METALSIM_THREADGROUP_MAX) {
        if (error)
            *error = metalsim_error("%s declares %llu bytes of threadgroup memory; there are %d", function->name,
                                    (unsigned long long)declared, METALSIM_THREADGROUP_MAX);
        return NULL;
    }
    if (archived)
        METALSIM_COUNT(archived);
    else
        METALSIM_COUNT(functions);
    struct pipeline *pipeline = (struct pipeline *)metalsim_object_create(&metalsim_class_MTLComputePipelineState);
    metalsim_retain(&function->object);
    pipeline->function = &function->object;
    pipeline->threads = metalsim_program_threads(function->program, function->name);
    if (pipeline->threads > metalsim_now.threads && metalsim_fails_for(METALSIM_FAULT_LIMITED_THREADS, function->name))
        pipeline->threads = metalsim_now.threads;
    return &pipeline->object;
}

id metalsim_device_new_pipeline(id self, SEL selector, id function, id *error)
{
    (void)self;
    if (!metalsim_object_is(function, &metalsim_class_MTLFunction, selector))
        return NULL;
    return make_pipeline((struct function *)function, 0, error);
}

id metalsim_device_new_described_pipeline(id self, SEL selector, id descriptor, NSUInteger options, id *reflection,
                                          id *error)
{
    (void)self;
    struct function *function = metalsim_description_function(descriptor);
    if (reflection && !(options & 3)) /* MTLPipelineOptionBindingInfo, MTLPipelineOptionBufferTypeInfo */
        metalsim_find("%s: a reflection is asked for, with no option that says which", selector);
    if (!function)
        return NULL;
    const int archived = metalsim_archive_has(((struct description *)descriptor)->archives, function->hash);
    if (!archived && options & FAIL_ON_ARCHIVE_MISS) {
        if (error)
            *error = metalsim_error("no binary archive has the function %s", function->name);
        return NULL;
    }
    return make_pipeline(function, archived, error);
}

NSUInteger metalsim_pipeline_threads(id self, SEL selector)
{
    (void)selector;
    return ((struct pipeline *)self)->threads;
}

NSUInteger metalsim_pipeline_width(id self, SEL selector)
{
    (void)selector;
    const struct pipeline *pipeline = (struct pipeline *)self;
    return metalsim_fails_for(METALSIM_FAULT_NARROW, ((struct function *)pipeline->function)->name) ? 16 : 32;
}
