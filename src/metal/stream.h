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
    id queue;       /* our own, where commands may be split; else nil */
    id before;      /* on our queue: the command buffer that is committed and not yet waited for */
};

/* Functions of PyTorch that are in this process, if it is: those of torch::mps are documented, those of at::mps
 * exported. All are called as C functions are. */
struct mfa_metal_torch {
    void *(*queue)(void);              /* torch::mps::get_dispatch_queue */
    id (*commands)(void);              /* torch::mps::get_command_buffer */
    void (*commit)(void);              /* torch::mps::commit */
    void *(*current)(void);            /* at::mps::getCurrentMPSStream, which may be per thread */
    void *(*standard)(void);           /* at::mps::getDefaultMPSStream: that of the first three */
    id (*encoder)(void *stream);       /* at::mps::MPSStream::commandEncoder */
    void (*end_encoder)(void *stream); /* at::mps::MPSStream::endKernelCoalescing */
};

/* Finds them; all NULL if those that are needed are missing. */
struct mfa_metal_torch mfa_metal_stream_find_torch(void);

/* Encodes a run. */
typedef mfa_status mfa_metal_encode(struct mfa_metal_stream *stream, void *argument);

/* Call `encode`, once, with an encoder: on our own queue, which is waited for; on PyTorch's, where
 * MFA_UNAVAILABLE means that another stream than its default one is current; on the caller's MTLCommandBuffer.
 * MFA_DEVICE_FAILED: Metal reports a failure. */
mfa_status mfa_metal_stream_run_alone(const struct mfa_metal_device *device, mfa_metal_encode *encode, void *argument);
mfa_status mfa_metal_stream_run_torch(const struct mfa_metal_torch *torch, mfa_metal_encode *encode, void *argument);
mfa_status mfa_metal_stream_run_commands(id commands, mfa_metal_encode *encode, void *argument);

/* Commands encoded after this see the results of those before. */
void mfa_metal_stream_barrier(struct mfa_metal_stream *stream);

/* Called between two long commands: commits what is encoded, on our own queue. */
mfa_status mfa_metal_stream_cut(struct mfa_metal_stream *stream);

#endif
