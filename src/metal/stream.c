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

mfa_status mfa_metal_stream_cut(struct mfa_metal_stream *stream)
{
    if (!stream->queue)
        return MFA_OK;
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
    const int shares = torch.current && torch.encoder;
    const int ends = (torch.current && torch.end_encoder) || torch.commit;
    /* Without MPS, PyTorch's functions throw C++ exceptions. */
    if (!available || !available() || !torch.queue || (!shares && !(torch.commands && ends)))
        memset(&torch, 0, sizeof torch);
    return torch;
}

/* The argument of a run through dispatch_sync_f. */
struct crossing {
    const struct mfa_metal_torch *torch;
    void *current; /* stream */
    mfa_metal_encode *encode;
    void *argument;
    mfa_status status;
    char sentence[512]; /* dispatch_sync_f may run the function in another thread */
};

/* Encodes in the encoder that PyTorch keeps open between operations. */
static mfa_status encode_in_shared(const struct crossing *crossing)
{
    struct mfa_metal_stream stream = {.order = MFA_METAL_IN_ORDER, .retains = 1, .shared = 1};
    stream.encoder = crossing->torch->encoder(crossing->current);
    if (!stream.encoder)
        return mfa_fail(MFA_DEVICE_FAILED, "PyTorch gives no compute encoder");
    stream.concurrent = SEND(encoder_type, stream.encoder) == MTL_DISPATCH_CONCURRENT;
    mfa_metal_stream_barrier(&stream);
    const mfa_status status = crossing->encode(&stream, crossing->argument);
    mfa_metal_stream_barrier(&stream);
    return status;
}

/* Encodes in an encoder of our own, after ending PyTorch's: two open encoders would abort the process. */
static mfa_status encode_in_own(const struct crossing *crossing)
{
    const struct mfa_metal_torch *torch = crossing->torch;
    struct mfa_metal_stream stream = {.order = MFA_METAL_IN_ORDER, .retains = 1};
    if (crossing->current && torch->end_encoder)
        torch->end_encoder(crossing->current);
    else
        torch->commit();
    stream.commands = torch->commands();
    if (!stream.commands)
        return mfa_fail(MFA_DEVICE_FAILED, "PyTorch gives no command buffer");
    mfa_status status = open_encoder(&stream);
    if (status != MFA_OK)
        return status;
    status = crossing->encode(&stream, crossing->argument);
    SEND(encoder_end, stream.encoder);
    return status;
}

static void cross(void *argument)
{
    struct crossing *crossing = argument;
    void *pool = mfa_metal_objc_push();
    const int shares = crossing->current && crossing->torch->encoder;
    crossing->status = shares ? encode_in_shared(crossing) : encode_in_own(crossing);
    if (crossing->status != MFA_OK)
        mfa_error_copy(crossing->sentence, sizeof crossing->sentence, mfa_last_error());
    mfa_metal_objc_pop(pool);
}

mfa_status mfa_metal_stream_run_torch(const struct mfa_metal_torch *torch, mfa_metal_encode *encode, void *argument)
{
    struct crossing crossing = {.torch = torch, .encode = encode, .argument = argument};
    crossing.current = torch->current ? torch->current() : NULL;
    if (crossing.current && torch->standard && crossing.current != torch->standard())
        return mfa_fail(MFA_UNAVAILABLE, "PyTorch's current stream is not its default one, which alone can be used");
    mfa_metal_objc.dispatch_sync(torch->queue(), &crossing, cross);
    return crossing.status == MFA_OK ? MFA_OK : mfa_fail(crossing.status, "%s", crossing.sentence);
}
