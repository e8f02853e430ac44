/* Metal behind core/backend.h. Each function that sends messages does so within an autorelease pool: the threads that
 * call us may have none. */
#define _GNU_SOURCE /* strdup */
#include "metal/backend.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/sync.h"
#include "core/operand.h"
#include "metal/device.h"
#include "metal/dispatch.h"
#include "metal/launch.h"
#include "metal/objc.h"
#include "metal/program.h"
#include "metal/stream.h"
#include "metal/tiles.h"

/* The device is opened by the first problem for it, not by the context: so a process that uses the CPU only starts no
 * GPU, and a child made by fork() can still use the CPU. */
struct metal {
    char *cache; /* the context's folder; NULL: none */
    struct mfa_metal_device device;
    struct mfa_metal_scratch scratch;
    struct mfa_metal_torch torch; /* found by the first run on PyTorch's stream */
    struct mfa_metal_watched watched;
    struct mfa_lock changing; /* guards the opening of the device and torch_found */
    atomic_int opened;        /* the device: 1 yes, -1 there is none */
    atomic_int torch_found;
    atomic_int tested;            /* by layout_test, before the first kernel is used: 1 passed, -1 failed */
    struct mfa_key missed;        /* the kernel that was last looked for in its file, if */
    int misses;                   /* an archive is of no use for it */
    char unavailable_reason[256]; /* why the device is not opened */
    char self_test_error[256];    /* why layout_test failed */
};

static mfa_status open_metal(const mfa_context_options *options, void **state)
{
    struct metal *metal = calloc(1, sizeof *metal);
    if (metal && options->cache && !(metal->cache = strdup(options->cache))) {
        free(metal);
        metal = NULL;
    }
    if (!metal)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a context");
    *state = metal;
    return MFA_OK;
}

static void close_metal(void *state)
{
    struct metal *metal = state;
    if (atomic_load(&metal->opened) > 0 && mfa_metal_objc_is_here()) {
        void *pool = mfa_metal_objc_push();
        mfa_metal_watched_free(&metal->watched);
        mfa_metal_scratch_free(&metal->scratch);
        mfa_metal_device_close(&metal->device);
        mfa_metal_objc_pop(pool);
    }
    free(metal->cache);
    free(metal);
}

static void open_device(struct metal *metal)
{
    mfa_status status = mfa_metal_objc_open();
    if (status == MFA_OK) {
        void *pool = mfa_metal_objc_push();
        status = mfa_metal_device_open(&metal->device);
        mfa_metal_objc_pop(pool);
    }
    if (status != MFA_OK)
        mfa_error_copy(metal->unavailable_reason, sizeof metal->unavailable_reason, mfa_last_error());
    atomic_store_explicit(&metal->opened, status == MFA_OK ? 1 : -1, memory_order_release);
}

static mfa_status need_device(struct metal *metal)
{
    if (!atomic_load_explicit(&metal->opened, memory_order_acquire)) {
        mfa_lock_take(&metal->changing);
        if (!atomic_load(&metal->opened))
            open_device(metal);
        mfa_lock_release(&metal->changing);
    }
    if (atomic_load_explicit(&metal->opened, memory_order_acquire) < 0)
        return mfa_fail(MFA_UNAVAILABLE, "%s", metal->unavailable_reason);
    return mfa_metal_objc_open(); /* fails in a child */
}

static mfa_status supports(void *state, const mfa_problem *problem)
{
    struct metal *metal = state;
    const mfa_status status = need_device(metal);
    if (status != MFA_OK)
        return status;
    if (atomic_load_explicit(&metal->tested, memory_order_acquire) < 0)
        return mfa_fail(MFA_UNAVAILABLE, "%s", metal->self_test_error);
    return mfa_metal_tiles_supports(problem);
}

static void choose(void *state, const mfa_problem *problem, int simpler, struct mfa_choice *choice)
{
    const struct metal *metal = state;
    mfa_metal_tiles_choose(mfa_metal_tiles_family(metal->device.family), problem, choice);
    if (simpler)
        mfa_metal_tiles_halve(problem, choice);
    mfa_metal_dispatch_measure(problem, choice);
}

static uint64_t stamp(void *state, const struct mfa_key *key)
{
    const struct metal *metal = state;
    return mfa_metal_program_stamp(&metal->device, key);
}

static uint64_t library_stamp(void *state, const struct mfa_key *key)
{
    (void)state;
    return mfa_metal_program_library_stamp(key);
}

static mfa_status text(void *state, const struct mfa_key *key, int n, char **text, char **name)
{
    (void)state;
    return mfa_metal_program_text(key, n, text, name);
}

/* The core loads one kernel at a time, so no two self-tests run at once. */
static mfa_status run_self_test(struct metal *metal, struct mfa_metal_program *program)
{
    if (atomic_load(&metal->tested) > 0)
        return MFA_OK;
    const mfa_status status = mfa_metal_launch_test(&metal->device, program);
    if (status == MFA_UNAVAILABLE)
        mfa_error_copy(metal->self_test_error, sizeof metal->self_test_error, mfa_last_error());
    if (status == MFA_OK || status == MFA_UNAVAILABLE)
        atomic_store_explicit(&metal->tested, status == MFA_OK ? 1 : -1, memory_order_release);
    return status;
}

/* `compiles`: else it is loaded from the file at `path`. */
static mfa_status make(struct metal *metal, const struct mfa_key *key, const char *library, const char *path,
                       int compiles, int whole, const void **kernel)
{
    struct mfa_metal_program *program = NULL;
    mfa_status status = need_device(metal);
    if (status != MFA_OK)
        return status;
    const int tested = atomic_load(&metal->tested) > 0;
    struct mfa_metal_origin origin = {
        .device = &metal->device,
        .key = key,
        .library = library,
        .cache = metal->cache,
        .kernels = (whole ? mfa_metal_program_all(key) : mfa_metal_program_always(key)) |
                   (tested && !whole ? 0 : MFA_METAL_KERNEL_BIT(MFA_METAL_LAYOUT_TEST)),
        .misses = compiles && metal->misses && !memcmp(&metal->missed, key, sizeof *key),
    };
    void *pool = mfa_metal_objc_push();
    status =
        compiles ? mfa_metal_program_compile(&origin, path, &program) : mfa_metal_program_load(&origin, path, &program);
    metal->missed = *key, metal->misses = !compiles && origin.misses;
    if (status == MFA_OK) {
        status = run_self_test(metal, program);
        if (status == MFA_OK)
            *kernel = program;
        else
            mfa_metal_program_free(program);
    }
    mfa_metal_objc_pop(pool);
    return status;
}

static mfa_status compile(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                          const void **kernel)
{
    return make(state, key, library, path, 1, whole, kernel);
}

static mfa_status load(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                       const void **kernel)
{
    return make(state, key, library, path, 0, whole, kernel);
}

static void unload(void *state, const void *kernel)
{
    (void)state;
    if (!mfa_metal_objc_is_here())
        return;
    void *pool = mfa_metal_objc_push();
    mfa_metal_program_free((struct mfa_metal_program *)kernel);
    mfa_metal_objc_pop(pool);
}

static uint64_t buffer_length(void *state, const void *base)
{
    (void)state; /* in a child, and without a buffer, launch fails */
    return mfa_metal_objc_is_here() && mfa_metal_objc_is_object(base) ? SEND(buffer_length, (id)base) : UINT64_MAX;
}

/* PyTorch's storages are MTLBuffers by no promise: another version may give the address of the contents. */
static mfa_status check_objects(const mfa_buffers *buffers)
{
    for (int n = 0; n < MFA_OPERAND_COUNT; n++) {
        const void *base = mfa_operand_buffer(buffers, n)->base;
        if (base && !mfa_metal_objc_is_object(base))
            return mfa_fail(MFA_UNAVAILABLE,
                            "the base of %s is %p, which is no object; it must be an MTLBuffer, as the storages of "
                            "PyTorch's tensors are in the versions that this library knows",
                            mfa_operands[n].name, base);
    }
    return MFA_OK;
}

static mfa_status find_torch(struct metal *metal)
{
    if (!atomic_load_explicit(&metal->torch_found, memory_order_acquire)) {
        mfa_lock_take(&metal->changing);
        const struct mfa_metal_torch torch = mfa_metal_stream_find_torch();
        if (torch.queue && !atomic_load(&metal->torch_found)) {
            metal->torch = torch;
            atomic_store_explicit(&metal->torch_found, 1, memory_order_release);
        }
        mfa_lock_release(&metal->changing);
    }
    if (atomic_load_explicit(&metal->torch_found, memory_order_acquire))
        return MFA_OK;
    return mfa_fail(MFA_UNAVAILABLE,
                    "stream is MFA_STREAM_TORCH; PyTorch is not in this process, or has not the functions "
                    "by which its stream is used");
}

static mfa_status launch(void *state, const void *kernel, const mfa_problem *problem, const struct mfa_choice *choice,
                         const mfa_buffers *buffers, void *workspace, void *stream)
{
    struct metal *metal = state;
    const int torch = stream == MFA_STREAM_TORCH;
    const struct mfa_metal_launch run = {.device = &metal->device,
                                         .torch = torch ? &metal->torch : NULL,
                                         .watched = &metal->watched,
                                         .scratch = &metal->scratch,
                                         .program = (struct mfa_metal_program *)kernel,
                                         .problem = problem,
                                         .choice = choice,
                                         .buffers = buffers,
                                         .stream = stream};
    (void)workspace;
    mfa_status status = need_device(metal);
    if (status == MFA_OK)
        status = check_objects(buffers);
    if (status == MFA_OK && torch)
        status = find_torch(metal);
    if (status != MFA_OK)
        return status;
    void *pool = mfa_metal_objc_push();
    status = mfa_metal_launch_run(&run);
    mfa_metal_objc_pop(pool);
    return status;
}

const struct mfa_backend mfa_metal_backend = {
    .name = "metal",
    .device = MFA_DEVICE_METAL,
    .open = open_metal,
    .close = close_metal,
    .supports = supports,
    .choose = choose,
    .library_suffix = ".metallib",
    .stamp = stamp,
    .library_stamp = library_stamp,
    .text = text,
    .compile = compile,
    .load = load,
    .unload = unload,
    .buffer_length = buffer_length,
    .keeps_workspace = 1,
    .launch = launch,
};
