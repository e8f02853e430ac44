/* Where commands are encoded: on a queue of our own, on PyTorch's stream, or in a command buffer of the caller. */
#ifndef MFA_METAL_STREAM_H
#define MFA_METAL_STREAM_H

#include "metal/device.h"
#include "metal/objc.h"
#include "mfa.h"

/* How runs on one stream are ordered. */
enum mfa_metal_order {
    MFA_METAL_ALONE,    /* a run ends before its call returns; others may run at the same time */
    MFA_METAL_IN_ORDER, /* the GPU runs it after all earlier runs of the stream */
    MFA_METAL_UNKNOWN
};

/* The command buffer and encoder of a run, during its call. */
struct mfa_metal_stream {
    id commands, encoder; /* borrowed; commands may be nil with PyTorch's encoder */
    enum mfa_metal_order order;
    int retains;    /* bound buffers stay alive until the GPU is done with them */
    int shared;     /* the encoder is PyTorch's, which goes on using it */
    int concurrent; /* the encoder's commands may overlap, unless there are barriers */
    double load;    /* of the command buffer, by this library: 1 is as much as one should have */
    id queue;       /* our own, where commands may be split; else nil */
    id before;      /* on our queue: the command buffer that is committed and not yet waited for */
    const struct mfa_metal_crossing *crossing; /* on PyTorch's stream; else NULL */
};

/* Functions of PyTorch that are in this process, if it is: those of torch::mps are documented, those of at::mps
 * exported. All are called as C functions are. */
struct mfa_metal_torch {
    void *(*queue)(void);                       /* torch::mps::get_dispatch_queue */
    id (*commands)(void);                       /* torch::mps::get_command_buffer, an MPSCommandBuffer */
    void (*commit)(void);                       /* torch::mps::commit */
    void *(*current)(void);                     /* at::mps::getCurrentMPSStream, which may be per thread */
    void *(*standard)(void);                    /* at::mps::getDefaultMPSStream: that of the first three */
    id (*encoder)(void *stream);                /* at::mps::MPSStream::commandEncoder */
    void (*end_encoder)(void *stream);          /* at::mps::MPSStream::endKernelCoalescing */
    id (*stream_commands)(void *stream);        /* at::mps::MPSStream::commandBuffer, an MPSCommandBuffer */
    void (*synchronize)(void *stream, int how); /* at::mps::MPSStream::synchronize, with an at::mps::SyncType */
};

/* Finds them; all NULL if those that are needed are missing. */
struct mfa_metal_torch mfa_metal_stream_find_torch(void);

#define MFA_METAL_IN_FLIGHT 64 /* a queue has no more command buffers that are not done */

/* The command buffers of PyTorch's stream in which runs of this library are, because PyTorch does not ask whether the
 * GPU has completed them. Used within its dispatch queue only; all 0 at first. */
struct mfa_metal_watched {
    id commands[MFA_METAL_IN_FLIGHT + 1]; /* owned, the oldest first */
    int count;
    double load; /* of the newest, as in mfa_metal_stream */
};
void mfa_metal_watched_free(struct mfa_metal_watched *watched);

/* Encodes a run. */
typedef mfa_status mfa_metal_encode(struct mfa_metal_stream *stream, void *argument);

/* Call `encode`, once, with an encoder: on our own queue, which is waited for; on PyTorch's, where
 * MFA_UNAVAILABLE means that another stream than its default one is current; on the caller's MTLCommandBuffer.
 * MFA_DEVICE_FAILED: Metal reports a failure; on PyTorch's stream it may be one of earlier runs, and then nothing has
 * been encoded. */
mfa_status mfa_metal_stream_run_alone(const struct mfa_metal_device *device, mfa_metal_encode *encode, void *argument);
mfa_status mfa_metal_stream_run_torch(const struct mfa_metal_torch *torch, struct mfa_metal_watched *watched,
                                      mfa_metal_encode *encode, void *argument);
mfa_status mfa_metal_stream_run_commands(id commands, mfa_metal_encode *encode, void *argument);

/* Commands encoded after this see the results of those before. */
void mfa_metal_stream_barrier(struct mfa_metal_stream *stream);

/* Called before each command, with its share of what one command buffer should have. If the command buffer would have
 * too much, commits it and begins another: macOS aborts one that runs for seconds. A command buffer of the caller, and
 * one of PyTorch's while a graph is recorded, stay whole. */
mfa_status mfa_metal_stream_cut(struct mfa_metal_stream *stream, double share);

#endif
