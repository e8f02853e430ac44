#include "metal/launch.h"

#include <string.h>

#include "base/error.h"
#include "core/operand.h"
#include "metal/dispatch.h"
#include "metal/source.h"

_Static_assert(sizeof(struct mfa_metal_call) <= MTL_BYTES_MAX, "a call goes by setBytes");
_Static_assert(MFA_METAL_BUFFERS <= 31, "buffers of Metal are numbered from 0 to 30");

/* --- Scratch memory ------------------------------------------------------------------------------- */

void mfa_metal_scratch_free(struct mfa_metal_scratch *scratch)
{
    for (int n = 0; n < MFA_METAL_SCRATCH; n++)
        mfa_metal_objc_release(atomic_load(&scratch->alone[n]));
    mfa_metal_objc_release(scratch->in_order);
}

/* Replaces `kept`, which is owned, by a larger buffer if it is too small, with spare bytes for problems that grow. If
 * the GPU still uses the old one, its command buffer retains it. */
static mfa_status enlarge(const struct mfa_metal_device *device, uint64_t bytes, id *kept)
{
    const uint64_t had = SEND(buffer_length, *kept), more = had + had / 4;
    if (had >= bytes)
        return MFA_OK;
    mfa_metal_objc_release(*kept);
    *kept = NULL;
    return mfa_metal_device_allocate(device, bytes < more && more <= device->buffer_max ? more : bytes,
                                     MTL_STORAGE_PRIVATE, kept);
}

static id take(struct mfa_metal_scratch *scratch)
{
    for (int n = 0; n < MFA_METAL_SCRATCH; n++) {
        id buffer = atomic_exchange(&scratch->alone[n], NULL);
        if (buffer)
            return buffer;
    }
    return NULL;
}

static void put_back(struct mfa_metal_scratch *scratch, id buffer)
{
    for (int n = 0; n < MFA_METAL_SCRATCH && buffer; n++) {
        id empty = NULL;
        if (atomic_compare_exchange_strong(&scratch->alone[n], &empty, buffer))
            buffer = NULL;
    }
    mfa_metal_objc_release(buffer);
}

/* --- A run ---------------------------------------------------------------------------------------- */

struct run {
    const struct mfa_metal_launch *launch;
    int count;
    struct mfa_metal_dispatch list[MFA_METAL_DISPATCHES];
    id pipelines[MFA_METAL_KERNELS]; /* borrowed: those of the list */
    id filler;                       /* bound where a kernel does not use the buffer */
    id workspace;                    /* with its offset */
    uint64_t workspace_offset;
    id lent, made; /* the workspace, if it is put back after the run, or was made for it */
};

/* Finds the workspace: the caller's, or one that no other run uses before the GPU has finished this run. */
static mfa_status find_workspace(struct run *run, const struct mfa_metal_stream *stream)
{
    const struct mfa_metal_launch *launch = run->launch;
    const uint64_t bytes = launch->choice->shared;
    mfa_status status = MFA_OK;
    run->workspace = launch->buffers->workspace.base, run->workspace_offset = launch->buffers->workspace.offset;
    if (run->workspace || bytes == 0)
        return MFA_OK;
    run->workspace_offset = 0;
    switch (stream->order) {
    case MFA_METAL_ALONE:
        run->lent = take(launch->scratch);
        status = enlarge(launch->device, bytes, &run->lent);
        run->workspace = run->lent;
        break;
    case MFA_METAL_IN_ORDER:
        status = enlarge(launch->device, bytes, &launch->scratch->in_order);
        run->workspace = launch->scratch->in_order;
        break;
    case MFA_METAL_UNKNOWN:
        if (!stream->retains)
            return mfa_fail(MFA_INVALID, "workspace is not given and stream is a command buffer that retains nothing; "
                                         "it needs a workspace, or retained references");
        status = mfa_metal_device_allocate(launch->device, bytes, MTL_STORAGE_PRIVATE, &run->made);
        run->workspace = run->made;
        break;
    }
    return status;
}

static void bind(const struct run *run, id encoder, const struct mfa_metal_binding *binding)
{
    const struct mfa_metal_launch *launch = run->launch;
    id buffer = run->workspace;
    uint64_t offset = run->workspace_offset + binding->offset;
    if (binding->operand >= 0) {
        const mfa_buffer *operand = mfa_operand_buffer(launch->buffers, binding->operand);
        buffer = operand->base, offset = operand->offset;
    }
    if (offset >= SEND(buffer_length, buffer)) /* not given, or without elements */
        buffer = run->filler, offset = 0;
    SEND_WITH(encoder_set_buffer, encoder, buffer, (NSUInteger)offset, (NSUInteger)binding->buffer);
}

static mfa_status encode_dispatch(const struct run *run, struct mfa_metal_stream *stream,
                                  const struct mfa_metal_dispatch *d)
{
    struct mfa_metal_call call = d->call;
    const MTLSize threads = {(NSUInteger)d->threads, 1, 1};
    for (int64_t first = 0; first < d->groups; first += d->chunk) {
        const int64_t left = d->groups - first, count = left < d->chunk ? left : d->chunk;
        const mfa_status status = mfa_metal_stream_cut(stream, (double)count / (double)d->chunk);
        if (status != MFA_OK)
            return status;
        id encoder = stream->encoder;
        const MTLSize groups = {(NSUInteger)count, 1, 1};
        call.first_group = first;
        /* The pipeline comes first: with it begins what PyTorch records of its encoder when it captures a graph. */
        SEND_WITH(encoder_set_pipeline, encoder, run->pipelines[d->kernel]);
        for (int n = 0; n < d->binding_count; n++)
            bind(run, encoder, &d->bindings[n]);
        SEND_WITH(encoder_set_bytes, encoder, &call, (NSUInteger)sizeof call, (NSUInteger)MFA_METAL_BUFFER_CALL);
        SEND_WITH(encoder_dispatch, encoder, groups, threads);
    }
    return MFA_OK;
}

static mfa_status encode(struct mfa_metal_stream *stream, void *argument)
{
    struct run *run = argument;
    mfa_status status = find_workspace(run, stream);
    for (int n = 0; n < run->count && status == MFA_OK; n++) {
        if (n > 0)
            mfa_metal_stream_barrier(stream);
        status = encode_dispatch(run, stream, &run->list[n]);
    }
    return status;
}

/* Some operand that is not empty. A run with dispatches has at least one, which it writes. */
static id find_filler(const mfa_buffers *buffers)
{
    for (int n = 0; n < MFA_OPERAND_COUNT; n++) {
        id buffer = mfa_operand_buffer(buffers, n)->base;
        if (SEND(buffer_length, buffer) > 0)
            return buffer;
    }
    return NULL;
}

static mfa_status find_pipelines(struct run *run)
{
    mfa_status status = MFA_OK;
    for (int n = 0; n < run->count && status == MFA_OK; n++) {
        const enum mfa_metal_kernel kernel = run->list[n].kernel;
        status = mfa_metal_program_pipeline(run->launch->program, kernel, &run->pipelines[kernel]);
    }
    return status;
}

mfa_status mfa_metal_launch_run(const struct mfa_metal_launch *launch)
{
    struct run run = {.launch = launch};
    mfa_status status;
    run.count = mfa_metal_dispatch_list(launch->problem, launch->choice, launch->buffers, run.list);
    if (run.count == 0)
        return MFA_OK;
    status = find_pipelines(&run);
    if (status != MFA_OK)
        return status;
    run.filler = find_filler(launch->buffers);
    if (!launch->stream)
        status = mfa_metal_stream_run_alone(launch->device, encode, &run);
    else if (launch->torch)
        status = mfa_metal_stream_run_torch(launch->torch, launch->watched, encode, &run);
    else
        status = mfa_metal_stream_run_commands(launch->stream, encode, &run);
    put_back(launch->scratch, run.lent);
    mfa_metal_objc_release(run.made); /* the command buffer has retained it */
    return status;
}

/* --- The layout test ------------------------------------------------------------------------------ */

struct test {
    id pipeline, result;
};

static mfa_status encode_test(struct mfa_metal_stream *stream, void *argument)
{
    const struct test *test = argument;
    const MTLSize one = {1, 1, 1}, simdgroup = {32, 1, 1};
    SEND_WITH(encoder_set_pipeline, stream->encoder, test->pipeline);
    SEND_WITH(encoder_set_buffer, stream->encoder, test->result, (NSUInteger)0, (NSUInteger)MFA_METAL_BUFFER_PARTIALS);
    SEND_WITH(encoder_dispatch, stream->encoder, one, simdgroup);
    return MFA_OK;
}

mfa_status mfa_metal_launch_test(const struct mfa_metal_device *device, struct mfa_metal_program *program)
{
    struct test test;
    uint32_t lanes[32], wrong = 0;
    mfa_status status = mfa_metal_program_pipeline(program, MFA_METAL_LAYOUT_TEST, &test.pipeline);
    if (status == MFA_OK)
        status = mfa_metal_device_allocate(device, sizeof lanes, MTL_STORAGE_SHARED, &test.result);
    if (status != MFA_OK)
        return status;
    memset(SEND(buffer_contents, test.result), 0xff, sizeof lanes);
    status = mfa_metal_stream_run_alone(device, encode_test, &test);
    memcpy(lanes, SEND(buffer_contents, test.result), sizeof lanes);
    mfa_metal_objc_release(test.result);
    for (int lane = 0; lane < 32; lane++)
        wrong |= lanes[lane];
    if (status == MFA_OK && wrong)
        status = mfa_fail(MFA_UNAVAILABLE,
                          "the Metal device is %s, whose simdgroup matrices are not as the kernels need them (test %x)",
                          device->name, wrong);
    return status;
}
