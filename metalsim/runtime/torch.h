/* A stand-in for PyTorch's Metal stream, in a library of its own that exports PyTorch's names. Like PyTorch it keeps
 * one command buffer and one compute encoder open from operation to operation, and wants both touched on its queue
 * only. There are several, as PyTorch's versions differ: CMakeLists.txt has the list. */
#ifndef METALSIM_RUNTIME_TORCH_H
#define METALSIM_RUNTIME_TORCH_H

#include <stddef.h>

/* Whether PyTorch has MPS on this machine, as at first. Without it other functions of PyTorch's throw. */
__attribute__((visibility("default"))) void metalsim_torch_set_available(int available);

/* Whether encoders that are opened from now on are concurrent. The operations below make no barriers. */
__attribute__((visibility("default"))) void metalsim_torch_set_concurrent(int concurrent);

/* Makes another stream the current one, or the default one again. */
__attribute__((visibility("default"))) void metalsim_torch_leave(int leave);

/* Whether a graph is recorded from now on: the encoder is then one that records. */
__attribute__((visibility("default"))) void metalsim_torch_record(int record);

/* An operation of PyTorch's on the current stream, encoded and not committed: x *= factor for so many floats from the
 * buffer's begin. */
__attribute__((visibility("default"))) void metalsim_torch_scale(void *buffer, size_t count, float factor);

/* torch.mps.synchronize(), which waits for the default stream. */
__attribute__((visibility("default"))) void metalsim_torch_synchronize(void);

/* Lets go of all that the streams hold. */
__attribute__((visibility("default"))) void metalsim_torch_close(void);

#endif
