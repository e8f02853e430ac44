#define _GNU_SOURCE /* RTLD_DEFAULT */
#include "metal/stream.h"

#include <dlfcn.h>
#include <string.h>

#include "base/error.h"

static mfa_status open_encoder(struct mfa_metal_stream *stream)
{
    stream->encoder = SEND(commands_encoder, stream->commands);
    return stream->encoder ? MFA_OK : mfa_fail(MFA_DEVICE_FAILED, "Metal gives no compute encoder");
}

void mfa_metal_stream_barrier(struct mfa_metal_stream *stream)
{
    if (stream->concurrent)
        SEND_WITH(encoder_barrier, stream->encoder, (NSUInteger)MTL_BARRIER_BUFFERS);
}

/* --- Our own queue -------------------------------------------------------------------------------- */

static mfa_status begin_commands(struct mfa_metal_stream *stream)
{
    stream->commands = SEND(queue_commands, stream->queue);
    return stream->commands ? open_encoder(stream) : mfa_fail(MFA_DEVICE_FAILED, "Metal gives no command buffer");
}

static mfa_status wait_for(id commands)
{
    SEND(commands_wait, commands);
    if (SEND(commands_status, commands) == MTL_COMMANDS_COMPLETED)
        return MFA_OK;
    return mfa_metal_objc_fail(MFA_DEVICE_FAILED, "the GPU did not complete the commands",
                               SEND(commands_error, commands));
}

/* Commits, and then waits for the command buffer before it: so the GPU is never idle, and each status is checked. */
static mfa_status commit(struct mfa_metal_stream *stream)
{
    id before = stream->before;
    SEND(encoder_end, stream->encoder);
    SEND(commands_commit, stream->commands);
    stream->before = stream->commands;
    stream->commands = stream->encoder = NULL;
    return before ? wait_for(before) : MFA_OK;
}

static mfa_status cut_alone(struct mfa_metal_stream *stream)
{
    const mfa_status status = commit(stream);
    return status == MFA_OK ? begin_commands(stream) : status;
}

mfa_status mfa_metal_stream_run_alone(const struct mfa_metal_device *device, mfa_metal_encode *encode, void *argument)
{
    struct mfa_metal_stream stream = {.queue = device->queue, .order = MFA_METAL_ALONE, .retains = 1};
    mfa_status status = begin_commands(&stream);
    if (status == MFA_OK)
        status = encode(&stream, argument);
    if (status == MFA_OK)
        status = commit(&stream);
    else if (stream.encoder)
        SEND(encoder_end,
             stream.encoder); /* a command buffer may be released without a commit, an encoder must be ended */
    if (stream.before) {
        const mfa_status last = wait_for(stream.before); /* even after a failure: the workspace is in use until then */
        status = status == MFA_OK ? last : status;
    }
    return status;
}

/* --- A command buffer of the caller --------------------------------------------------------------- */

mfa_status mfa_metal_stream_run_commands(id commands, mfa_metal_encode *encode, void *argument)
{
    struct mfa_metal_stream stream = {
        .commands = commands, .order = MFA_METAL_UNKNOWN, .retains = SEND(commands_retain, commands)};
    mfa_status status = open_encoder(&stream);
    if (status != MFA_OK)
        return status;
    status = encode(&stream, argument);
    SEND(encoder_end, stream.encoder);
    return status;
}

/* --- PyTorch's stream ----------------------------------------------------------------------------- */

static void find(const char *name, void *function)
{
    *(void **)function = dlsym(RTLD_DEFAULT, name);
}

struct mfa_metal_torch mfa_metal_stream_find_torch(void)
{
    struct mfa_metal_torch torch;
    BOOL (*available)(void);
    find("_ZN5torch3mps12is_availableEv", &available);
    find("_ZN5torch3mps18get_dispatch_queueEv", &torch.queue);
    find("_ZN5torch3mps18get_command_bufferEv", &torch.commands);
    find("_ZN5torch3mps6commitEv", &torch.commit);
    find("_ZN2at3mps19getCurrentMPSStreamEv", &torch.current);
    find("_ZN2at3mps19getDefaultMPSStreamEv", &torch.standard);
    find("_ZN2at3mps9MPSStream14commandEncoderEv", &torch.encoder);
    find("_ZN2at3mps9MPSStream19endKernelCoalescingEv", &torch.end_encoder);
    find("_ZN2at3mps9MPSStream13commandBufferEv", &torch.stream_commands);
    find("_ZN2at3mps9MPSStream11synchronizeENS0_8SyncTypeE", &torch.synchronize);
    const int shares = torch.current && torch.encoder;
    const int ends = (torch.current && torch.end_encoder) || torch.commit;
    /* Without MPS, PyTorch's functions throw C++ exceptions. */
    if (!available || !available() || !torch.queue || (!shares && !(torch.commands && ends)))
        memset(&torch, 0, sizeof torch);
    return torch;
}

/* The argument of a run through dispatch_sync_f. */
struct mfa_metal_crossing {
    const struct mfa_metal_torch *torch;
    struct mfa_metal_watched *watched;
    void *current; /* stream */
    mfa_metal_encode *encode;
    void *argument;
    mfa_status status;
    char sentence[512]; /* dispatch_sync_f may run the function in another thread */
};

void mfa_metal_watched_free(struct mfa_metal_watched *watched)
{
    for (int n = 0; n < watched->count; n++)
        mfa_metal_objc_release(watched->commands[n]);
    watched->count = 0;
}

/* Forgets the oldest command buffers that are done. MFA_DEVICE_FAILED: one has failed. */
static mfa_status check_watched(struct mfa_metal_watched *watched)
{
    mfa_status status = MFA_OK;
    int done = 0;
    for (; done < watched->count && status == MFA_OK; done++) {
        id commands = watched->commands[done];
        const NSUInteger found = SEND(commands_status, commands);
        if (found < MTL_COMMANDS_COMPLETED)
            break;
        if (found == MTL_COMMANDS_FAILED)
            status = mfa_metal_objc_fail(MFA_DEVICE_FAILED,
                                         "the GPU did not complete earlier commands of PyTorch's stream, and what they "
                                         "and all since then have written may be wrong",
                                         SEND(commands_error, commands));
        mfa_metal_objc_release(commands);
    }
    watched->count -= done;
    memmove(watched->commands, watched->commands + done, (size_t)watched->count * sizeof *watched->commands);
    return status;
}

/* Adds the stream's command buffer unless it is the newest of the list. `commands`: an MPSCommandBuffer, which goes on
 * with another MTLCommandBuffer when one is committed. */
static void watch(struct mfa_metal_watched *watched, id commands)
{
    if (!mfa_metal_objc_has(commands, MFA_METAL_METHOD_commands_root))
        return;
    id root = SEND(commands_root, commands);
    if (!root || (watched->count > 0 && watched->commands[watched->count - 1] == root))
        return;
    if (watched->count > MFA_METAL_IN_FLIGHT) { /* a queue that allows more than is usual */
        mfa_metal_objc_release(watched->commands[0]);
        memmove(watched->commands, watched->commands + 1, MFA_METAL_IN_FLIGHT * sizeof *watched->commands);
        watched->count--;
    }
    watched->commands[watched->count++] = SEND(retain, root);
    watched->load = 0;
}

/* While PyTorch records a graph, its encoder is of a class of PyTorch's. */
static int is_recording(id encoder)
{
    id recording = mfa_metal_objc.class_named("MPSRecordingEncoder");
    return recording && SEND_WITH(is_kind, encoder, recording);
}

/* The encoder that PyTorch keeps open between operations. */
static mfa_status share_encoder(struct mfa_metal_stream *stream)
{
    const struct mfa_metal_crossing *crossing = stream->crossing;
    const struct mfa_metal_torch *torch = crossing->torch;
    stream->encoder = torch->encoder(crossing->current);
    if (!stream->encoder)
        return mfa_fail(MFA_DEVICE_FAILED, "PyTorch gives no compute encoder");
    if (torch->stream_commands)
        watch(crossing->watched, torch->stream_commands(crossing->current));
    stream->concurrent = SEND(encoder_type, stream->encoder) == MTL_DISPATCH_CONCURRENT;
    return MFA_OK;
}

/* An encoder of our own in PyTorch's command buffer, where none is open. */
static mfa_status open_own(struct mfa_metal_stream *stream)
{
    stream->commands = stream->crossing->torch->commands();
    if (!stream->commands)
        return mfa_fail(MFA_DEVICE_FAILED, "PyTorch gives no command buffer");
    watch(stream->crossing->watched, stream->commands);
    return open_encoder(stream);
}

/* Commits PyTorch's command buffer, with all that PyTorch has encoded in it, and goes on in its next one. */
static mfa_status cut_torch(struct mfa_metal_stream *stream)
{
    enum { COMMIT = 1 }; /* at::mps::SyncType::COMMIT */
    const struct mfa_metal_crossing *crossing = stream->crossing;
    const struct mfa_metal_torch *torch = crossing->torch;
    if (!stream->shared)
        SEND(encoder_end, stream->encoder);
    stream->encoder = NULL;
    if (crossing->current && torch->synchronize)
        torch->synchronize(crossing->current, COMMIT);
    else
        torch->commit();
    const mfa_status status = check_watched(crossing->watched);
    if (status != MFA_OK)
        return status;
    return stream->shared ? share_encoder(stream) : open_own(stream);
}

static int can_cut_torch(const struct mfa_metal_stream *stream)
{
    const struct mfa_metal_torch *torch = stream->crossing->torch;
    if (stream->shared)
        return torch->synchronize && !is_recording(stream->encoder);
    return torch->commit || (stream->crossing->current && torch->synchronize);
}

/* Encodes in PyTorch's encoder. */
static mfa_status encode_in_shared(struct mfa_metal_stream *stream)
{
    stream->shared = 1;
    mfa_status status = share_encoder(stream);
    if (status != MFA_OK)
        return status;
    stream->load = stream->crossing->watched->load;
    mfa_metal_stream_barrier(stream);
    status = stream->crossing->encode(stream, stream->crossing->argument);
    if (stream->encoder)
        mfa_metal_stream_barrier(stream);
    return status;
}

/* Encodes in an encoder of our own, after ending PyTorch's: two open encoders would abort the process. */
static mfa_status encode_in_own(struct mfa_metal_stream *stream)
{
    const struct mfa_metal_crossing *crossing = stream->crossing;
    if (crossing->current && crossing->torch->end_encoder)
        crossing->torch->end_encoder(crossing->current);
    else
        crossing->torch->commit();
    mfa_status status = open_own(stream);
    if (status != MFA_OK)
        return status;
    stream->load = crossing->watched->load;
    status = crossing->encode(stream, crossing->argument);
    SEND(encoder_end, stream->encoder);
    return status;
}

static void cross(void *argument)
{
    struct mfa_metal_crossing *crossing = argument;
    struct mfa_metal_stream stream = {.order = MFA_METAL_IN_ORDER, .retains = 1, .crossing = crossing};
    void *pool = mfa_metal_objc_push();
    const int shares = crossing->current && crossing->torch->encoder;
    crossing->status = check_watched(crossing->watched);
    if (crossing->status == MFA_OK)
        crossing->status = shares ? encode_in_shared(&stream) : encode_in_own(&stream);
    crossing->watched->load = stream.load;
    if (crossing->status != MFA_OK)
        mfa_error_copy(crossing->sentence, sizeof crossing->sentence, mfa_last_error());
    mfa_metal_objc_pop(pool);
}

mfa_status mfa_metal_stream_run_torch(const struct mfa_metal_torch *torch, struct mfa_metal_watched *watched,
                                      mfa_metal_encode *encode, void *argument)
{
    struct mfa_metal_crossing crossing = {.torch = torch, .watched = watched, .encode = encode, .argument = argument};
    crossing.current = torch->current ? torch->current() : NULL;
    if (crossing.current && torch->standard && crossing.current != torch->standard())
        return mfa_fail(MFA_UNAVAILABLE, "PyTorch's current stream is not its default one, which alone can be used");
    mfa_metal_objc.dispatch_sync(torch->queue(), &crossing, cross);
    return crossing.status == MFA_OK ? MFA_OK : mfa_fail(crossing.status, "%s", crossing.sentence);
}

/* --- Cutting -------------------------------------------------------------------------------------- */

mfa_status mfa_metal_stream_cut(struct mfa_metal_stream *stream, double share)
{
    mfa_status status = MFA_OK;
    const int is_due = stream->load > 0 && stream->load + share > 1;
    if (is_due && (stream->queue || (stream->crossing && can_cut_torch(stream)))) {
        status = stream->queue ? cut_alone(stream) : cut_torch(stream);
        stream->load = 0;
    }
    stream->load += share;
    return status;
}
