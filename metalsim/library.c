/* How a library comes to be: text -> what binds its kernels -> clang -> ld -> a shared object in the cache. */
#define _GNU_SOURCE
#include "library.h"

#include <dlfcn.h>
#include <glob.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/hash.h"
#include "check.h"
#include "command.h"
#include "error.h"
#include "group.h"
#include "parameters.h"

#if defined(__x86_64__)
#define MACHINE "x86_64-linux-gnu"
#define TARGET "--target=" MACHINE, "-march=x86-64-v3"
#elif defined(__aarch64__)
#define MACHINE "aarch64-linux-gnu"
#define TARGET "--target=" MACHINE, "-mno-outline-atomics" /* which are in libgcc */
#endif

/* The compiler: the build says METALSIM_CLANG, and the environment may name another that takes the same options. */
static const char *compiler(void)
{
    const char *named = getenv("METALSIM_CLANG");
    return named && *named ? named : METALSIM_CLANG;
}

/* METALSIM_INCLUDE is where include/ lies: the build says so. */
#define LANGUAGE compiler(), TARGET, "-x", "c++", "-std=c++14", "-nostdinc", "-isystem", METALSIM_INCLUDE, "-w"

/* No call of a barrier may come to depend on more conditions than in the text, nor be a jump that returns to the
 * caller's caller: threads that are together must see one and the same. Uninitialised variables hold a pattern, of
 * floats a NaN. */
#define GENERATE                                                                                                     \
    "-c", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-strict-aliasing", \
        "-fconvergent-functions", "-fno-optimize-sibling-calls", "-ffp-contract=on",                                 \
        "-ftrivial-auto-var-init=pattern", "-Xclang", "-cl-single-precision-constant", "-gdwarf-4",                  \
        "-gline-tables-only", "-fdebug-compilation-dir=."

static const char *const plain_options[] = {"-O2", NULL};
/* No vectors wider than an access that the instrumentation knows, no read left out. */
static const char *const checked_options[] = {
    "-O1",
    "-DMETALSIM_CHECKED",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,float-cast-overflow,integer-divide-by-zero,null,shift,signed-integer-overflow",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
    NULL,
};
static const char *const fast_math_options[] = {"-ffast-math", NULL};
static const char *const unoptimised_options[] = {"-O0", NULL};
static const char *const coverage_options[] = {
    "-fprofile-instr-generate", "-fcoverage-mapping",
    "-fprofile-update=atomic", /* groups run on several threads, and some counts are differences of two counters */
    NULL};

#define WORDS_MAX 64

struct words {
    const char *list[WORDS_MAX];
    size_t count;
};

static void add_words(struct words *words, const char *const *more)
{
    for (; *more && words->count + 1 < WORDS_MAX; more++)
        words->list[words->count++] = *more;
}

static void add_build(struct words *words, unsigned build)
{
    add_words(words, build & METALSIM_CHECKED ? checked_options : plain_options);
    if (build & METALSIM_FAST_MATH)
        add_words(words, fast_math_options);
    if (build & METALSIM_COVERAGE)
        add_words(words, coverage_options);
    if (build & METALSIM_UNOPTIMISED) /* the last -O counts */
        add_words(words, unoptimised_options);
}

/* --- The cache ------------------------------------------------------------------------------------ */

/* A hash of all that a compiled library comes from. */
static uint64_t stamp(const char *text, const struct words *words)
{
    uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, text, strlen(text));
    for (size_t i = 0; i < words->count; i++)
        hash = mfa_hash_bytes(hash, words->list[i], strlen(words->list[i]) + 1);
    glob_t headers;
    if (glob(METALSIM_INCLUDE "/*", 0, NULL, &headers) || glob(METALSIM_INCLUDE "/*/*", GLOB_APPEND, NULL, &headers))
        return hash; /* without headers, nothing compiles */
    for (size_t i = 0; i < headers.gl_pathc; i++) {
        char *bytes;
        size_t length;
        if (!mfa_file_read(headers.gl_pathv[i], &bytes, &length))
            continue; /* a folder */
        hash = mfa_hash_bytes(hash, bytes, length);
        free(bytes);
    }
    globfree(&headers);
    return hash;
}

/* --- Compiling ------------------------------------------------------------------------------------ */

/* METALSIM_PREPROCESSOR is GCC's if there is one, which takes a third of the time of clang: that starts slowly. It
 * reads C, as the text is C++ only for the compiler. */
metalsim_status metalsim_library_preprocess(const char *path, struct metalsim_text *result)
{
    const char *const words[] = {
        METALSIM_PREPROCESSOR, "-x", "c",  "-std=gnu11", "-nostdinc", "-isystem", METALSIM_INCLUDE, "-w",
        "-DMETALSIM_BINDINGS", "-E", "-P", path,         NULL};
    struct metalsim_text errors = {0};
    metalsim_status status = METALSIM_OK;
    if (metalsim_command_run(words, result, &errors) || !result->bytes)
        status = metalsim_fail(METALSIM_COMPILE_FAILED, "%s", errors.bytes ? errors.bytes : "the preprocessor failed");
    free(errors.bytes);
    return status;
}

/* The C++ that follows the text: its kernels, bound. */
static metalsim_status bind(const char *path, struct metalsim_text *code)
{
    struct metalsim_text text = {0}, errors = {0};
    metalsim_status status = metalsim_library_preprocess(path, &text);
    if (status == METALSIM_OK && !metalsim_parameters_write(text.bytes, code, &errors))
        status = metalsim_fail(METALSIM_COMPILE_FAILED, "%s", errors.bytes);
    free(text.bytes);
    free(errors.bytes);
    return status;
}

/* Runs a command that is to make a file. */
static metalsim_status run(const struct words *words, const char *what)
{
    struct metalsim_text output = {0}, errors = {0};
    metalsim_status status = METALSIM_OK;
    if (metalsim_command_run(words->list, &output, &errors))
        status = metalsim_fail(METALSIM_COMPILE_FAILED, "%s", errors.bytes ? errors.bytes : what);
    free(output.bytes);
    free(errors.bytes);
    return status;
}

/* The compiler as a driver of both would start two more processes, which take as long as a small kernel to compile. So
 * only the runtime library of profiles is left to it. */
static metalsim_status compile(const char *path, struct words *words, unsigned build, const char *object)
{
    static atomic_uint drafts;
    const unsigned draft = atomic_fetch_add(&drafts, 1);
    char unlinked[MFA_FILE_PATH + 32], linked[MFA_FILE_PATH + 32];
    snprintf(unlinked, sizeof unlinked, "%s.%ld.%u.o", object, (long)getpid(), draft);
    snprintf(linked, sizeof linked, "%s.%ld.%u", object, (long)getpid(), draft);
    struct words link = {0};
    if (build & METALSIM_COVERAGE)
        add_words(&link, (const char *const[]){compiler(), TARGET, "-fprofile-instr-generate", NULL});
    else
        add_words(&link, (const char *const[]){MACHINE "-ld", NULL});
    add_words(&link, (const char *const[]){"-shared", unlinked, "-o", linked, "-lm", NULL});
    add_words(words, (const char *const[]){path, "-o", unlinked, NULL});
    metalsim_status status = run(words, "the compiler failed");
    if (status == METALSIM_OK)
        status = run(&link, "the linker failed");
    if (status == METALSIM_OK && rename(linked, object))
        status = metalsim_fail(METALSIM_COMPILE_FAILED, "the library could not be written to %s", object);
    unlink(unlinked);
    unlink(linked);
    return status;
}

/* Makes the object from the text unless the cache has it. */
static metalsim_status make(const struct metalsim_text *text, const char *cache, unsigned build, char *object,
                            size_t capacity)
{
    struct words words = {0};
    add_words(&words, (const char *const[]){LANGUAGE, GENERATE, NULL});
    add_build(&words, build);
    uint64_t hash = stamp(text->bytes, &words);
    char source[MFA_FILE_PATH];
    int fits = snprintf(object, capacity, "%s/%016" PRIx64 ".so", cache, hash) < (int)capacity;
    if (!fits || !mfa_file_make_folder(cache))
        return metalsim_fail(METALSIM_REFUSED, "cache is \"%s\"; it must be a folder that can be written", cache);
    if (!access(object, R_OK))
        return METALSIM_OK;

    snprintf(source, sizeof source, "%s/%016" PRIx64 ".metal", cache, hash);
    if (!mfa_file_write(source, text->bytes, text->length))
        return metalsim_fail(METALSIM_REFUSED, "cache is \"%s\"; it must be a folder that can be written", cache);
    struct metalsim_text code = {0};
    metalsim_status status = bind(source, &code);
    if (status == METALSIM_OK) {
        struct metalsim_text all = {0};
        metalsim_text_add_bytes(&all, text->bytes, text->length);
        metalsim_text_add(&all, "\n#line 1 \"%s/metalsim/parameters\"\n%s", METALSIM_INCLUDE, code.bytes);
        char unit[MFA_FILE_PATH];
        snprintf(unit, sizeof unit, "%s/%016" PRIx64 ".cpp", cache, hash);
        status =
            mfa_file_write(unit, all.bytes, all.length)
                ? compile(unit, &words, build, object)
                : metalsim_fail(METALSIM_REFUSED, "cache is \"%s\"; it must be a folder that can be written", cache);
        free(all.bytes);
    }
    free(code.bytes);
    return status;
}

/* --- Loading -------------------------------------------------------------------------------------- */

static metalsim_status load(const char *path, unsigned build, metalsim_library **library)
{
    struct metalsim_library *new = calloc(1, sizeof *new);
    if (!new)
        return metalsim_fail(METALSIM_REFUSED, "out of memory");
    new->build = build;
    new->path = strdup(path);
    new->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (new->handle)
        new->object = dlsym(new->handle, "metalsim_exports");
    if (new->object)
        new->kernels = calloc(new->object->entry_count + 1, sizeof *new->kernels);
    if (!new->path || !new->kernels) {
        const char *why = new->handle ? "out of memory" : dlerror();
        metalsim_library_destroy(new);
        return metalsim_fail(METALSIM_COMPILE_FAILED, "the compiled library cannot be loaded: %s", why);
    }
    for (unsigned i = 0; i < new->object->entry_count; i++)
        new->kernels[i] = (struct metalsim_kernel){new, &new->object->entries[i]};
    *new->object->runtime = (struct metalsim_runtime){
        .meet = metalsim_group_meet,
        .simdgroup_barrier = metalsim_group_simdgroup_barrier,
        .threadgroup_barrier = metalsim_group_threadgroup_barrier,
        .threadgroup_array = metalsim_group_threadgroup_array,
        .read = metalsim_check_read,
        .write = metalsim_check_write,
        .atomic = metalsim_check_atomic,
        .undefined = metalsim_check_undefined,
    };
    *library = new;
    return METALSIM_OK;
}

static int cpu_runs_libraries(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

metalsim_status metalsim_library_create(const char *name, const char *source, const char *defines, const char *cache,
                                        unsigned build, metalsim_library **library)
{
    if (!cpu_runs_libraries())
        return metalsim_fail(METALSIM_REFUSED, "this CPU has no AVX2 or FMA, which libraries are compiled for");
    struct metalsim_text text = {0};
    for (const char *line = defines ? defines : ""; *line;) {
        size_t length = strcspn(line, "\n");
        if (length)
            metalsim_text_add(&text, "#define %.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
    }
    metalsim_text_add(&text, "#line 1 \"%s\"\n%s", name, source);
    if (!text.bytes)
        return metalsim_fail(METALSIM_REFUSED, "out of memory");
    char object[MFA_FILE_PATH];
    metalsim_status status = make(&text, cache, build, object, sizeof object);
    free(text.bytes);
    return status == METALSIM_OK ? load(object, build, library) : status;
}

void metalsim_library_destroy(metalsim_library *library)
{
    if (!library)
        return;
    if (library->handle)
        dlclose(library->handle);
    free(library->kernels);
    free(library->path);
    free(library);
}

size_t metalsim_library_count(const metalsim_library *library)
{
    return library->object->entry_count;
}

const metalsim_kernel *metalsim_library_kernel(const metalsim_library *library, size_t i)
{
    return &library->kernels[i];
}

const metalsim_kernel *metalsim_library_find(const metalsim_library *library, const char *name)
{
    for (unsigned i = 0; i < library->object->entry_count; i++)
        if (!strcmp(library->object->entries[i].name, name))
            return &library->kernels[i];
    metalsim_fail(METALSIM_REFUSED, "the library has no kernel \"%s\"", name);
    return NULL;
}

const char *metalsim_kernel_name(const metalsim_kernel *kernel)
{
    return kernel->entry->name;
}

size_t metalsim_kernel_threads(const metalsim_kernel *kernel)
{
    return kernel->entry->max_threads ? kernel->entry->max_threads : METALSIM_THREADS_MAX;
}

size_t metalsim_kernel_threadgroup_bytes(const metalsim_kernel *kernel, const size_t lengths[METALSIM_BUFFERS])
{
    size_t bytes = 0;
    for (unsigned i = 0; i < kernel->entry->parameter_count; i++) {
        const struct metalsim_parameter *p = &kernel->entry->parameters[i];
        const size_t own = p->kind == METALSIM_ARRAY         ? p->bytes
                           : p->kind == METALSIM_THREADGROUP ? lengths[p->index]
                                                             : 0;
        bytes += (own + 15) / 16 * 16;
    }
    return bytes;
}
