/* PyTorch's streams as aten/src/ATen/mps/MPSStream.mm and torch/csrc/api/src/mps.cpp have them. TORCH_SHARES: their
 * encoder can be had (MPSStream::commandEncoder is exported). TORCH_ENDS: their encoder can be ended
 * (endKernelCoalescing is). TORCH_ENDS_ITSELF: get_command_buffer ends it, as PyTorch does since 2.10. TORCH_STREAMS:
 * there are streams beside the default one, as in 2.14. Graphs are recorded as in PyTorch's sources after 2.14. */
#include "runtime/torch.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime/object.h"

/* PyTorch is a client of the runtime as every other program: it sends messages. */
void objc_msgSend(void);
SEL sel_registerName(const char *name);
id MTLCreateSystemDefaultDevice(void);
void *dispatch_queue_create(const char *label, void *attributes);
void dispatch_sync_f(void *queue, void *context, void (*work)(void *));
id objc_getClass(const char *name);

static void (*send)(void); /* objc_msgSend */
#define SEND(result, types, ...) ((result(*) types)send)(__VA_ARGS__)
#define GET(receiver, selector) SEND(id, (id, SEL), receiver, sel_registerName(selector))
#define DO(receiver, selector) SEND(void, (id, SEL), receiver, sel_registerName(selector))

struct stream {
    id queue, buffer, encoder; /* buffer: an MPSCommandBuffer */
    void *dispatch_queue;
};
static struct stream standard, another;
static id device, pipeline;
static int concurrent;   /* encoders that are opened from now on */
static int is_left;      /* another stream is the current one */
static int is_recording; /* a graph, of the default stream */
static int is_missing;   /* MPS */

static struct stream *current(void)
{
    return is_left ? &another : &standard;
}

static void require_queue(const struct stream *stream, const char *function)
{
    if (metalsim_runtime_on_queue(stream->dispatch_queue))
        return;
    fprintf(stderr, "torch: %s: must be called on the stream's queue\n", function);
    abort();
}

static void require_mps(void)
{
    if (!is_missing)
        return;
    fprintf(stderr, "torch: there is no MPS on this machine: PyTorch throws\n");
    abort();
}

static const char source[] = "#include <metal_stdlib>\n"
                             "using namespace metal;\n"
                             "kernel void scale(device float *x [[buffer(0)]], constant float &factor [[buffer(1)]],\n"
                             "                  uint i [[thread_position_in_grid]]) { x[i] *= factor; }\n";

static id string(const char *text)
{
    return SEND(id, (id, SEL, const char *), objc_getClass("NSString"), sel_registerName("stringWithUTF8String:"),
                text);
}

static void open_stream(struct stream *stream)
{
    stream->queue = GET(device, "newCommandQueue");
    stream->dispatch_queue = dispatch_queue_create("metal gpu stream", NULL);
}

static void open_streams(void)
{
    if (device)
        return;
    send = objc_msgSend;
    id error = NULL;
    void *pool = objc_autoreleasePoolPush();
    device = MTLCreateSystemDefaultDevice();
    open_stream(&standard);
    open_stream(&another);
    id library = SEND(id, (id, SEL, id, id, id *), device, sel_registerName("newLibraryWithSource:options:error:"),
                      string(source), NULL, &error);
    id function = SEND(id, (id, SEL, id), library, sel_registerName("newFunctionWithName:"), string("scale"));
    pipeline = SEND(id, (id, SEL, id, id *), device, sel_registerName("newComputePipelineStateWithFunction:error:"),
                    function, &error);
    DO(function, "release");
    DO(library, "release");
    objc_autoreleasePoolPop(pool);
    if (!pipeline)
        abort();
}

/* --- at::mps::MPSStream --------------------------------------------------------------------------- */

enum { COMMIT = 1, COMMIT_AND_WAIT }; /* at::mps::SyncType */

static id command_buffer(struct stream *stream)
{
    if (!stream->buffer)
        stream->buffer = GET(SEND(id, (id, SEL, id), objc_getClass("MPSCommandBuffer"),
                                  sel_registerName("commandBufferFromCommandQueue:"), stream->queue),
                             "retain");
    return stream->buffer;
}

static id command_encoder(struct stream *stream)
{
    require_queue(stream, "commandEncoder");
    if (!stream->encoder)
        stream->encoder = GET(SEND(id, (id, SEL, NSUInteger), command_buffer(stream),
                                   sel_registerName("computeCommandEncoderWithDispatchType:"), (NSUInteger)concurrent),
                              "retain");
    if (is_recording && stream->encoder)
        stream->encoder->isa = (const struct metalsim_class *)objc_getClass("MPSRecordingEncoder");
    return stream->encoder;
}

static void end_kernel_coalescing(struct stream *stream)
{
    require_queue(stream, "endKernelCoalescing");
    if (!stream->encoder)
        return;
    DO(stream->encoder, "endEncoding");
    DO(stream->encoder, "release");
    stream->encoder = NULL;
}

static void commit_and_wait(struct stream *stream)
{
    if (!stream->buffer)
        return;
    id root = GET(stream->buffer, "rootCommandBuffer");
    DO(root, "commit");
    DO(root, "waitUntilCompleted"); /* its status is not read */
    DO(stream->buffer, "release");
    stream->buffer = NULL;
}

static void synchronize(struct stream *stream, int type)
{
    void *pool = objc_autoreleasePoolPush();
    require_queue(stream, "synchronize");
    end_kernel_coalescing(stream);
    if (type == COMMIT)
        DO(command_buffer(stream), "commitAndContinue");
    else if (type == COMMIT_AND_WAIT)
        commit_and_wait(stream);
    else
        abort();
    objc_autoreleasePoolPop(pool);
}

static void commit_on_queue(void *stream)
{
    synchronize(stream, COMMIT);
}

static void wait_on_queue(void *stream)
{
    synchronize(stream, COMMIT_AND_WAIT);
}

/* --- The names that PyTorch exports --------------------------------------------------------------- */

#define EXPORT(result, function, types, name)            \
    METALSIM_EXPORT result function types __asm__(name); \
    result function types

EXPORT(void *, torch_get_command_buffer, (void), "_ZN5torch3mps18get_command_bufferEv")
{
    open_streams();
    require_queue(&standard, "get_command_buffer");
#if defined(TORCH_ENDS_ITSELF)
    end_kernel_coalescing(&standard);
#endif
    return command_buffer(&standard);
}

EXPORT(void *, torch_get_dispatch_queue, (void), "_ZN5torch3mps18get_dispatch_queueEv")
{
    require_mps();
    open_streams();
    return standard.dispatch_queue;
}

EXPORT(bool, torch_is_available, (void), "_ZN5torch3mps12is_availableEv")
{
    return !is_missing;
}

EXPORT(void, torch_commit, (void), "_ZN5torch3mps6commitEv")
{
    open_streams();
    if (metalsim_runtime_on_queue(standard.dispatch_queue))
        commit_on_queue(&standard);
    else
        dispatch_sync_f(standard.dispatch_queue, &standard, commit_on_queue);
}

EXPORT(void, torch_synchronize, (void), "_ZN5torch3mps11synchronizeEv")
{
    open_streams();
    dispatch_sync_f(standard.dispatch_queue, &standard, wait_on_queue);
}

#if defined(TORCH_SHARES) || defined(TORCH_ENDS)
EXPORT(struct stream *, torch_current_stream, (void), "_ZN2at3mps19getCurrentMPSStreamEv")
{
    require_mps();
    open_streams();
    return current();
}

EXPORT(struct stream *, torch_default_stream, (void), "_ZN2at3mps19getDefaultMPSStreamEv")
{
    open_streams();
    return &standard;
}
#endif

#if defined(TORCH_SHARES)
EXPORT(id, torch_command_encoder, (struct stream *self), "_ZN2at3mps9MPSStream14commandEncoderEv")
{
    return command_encoder(self);
}

EXPORT(id, torch_command_buffer, (struct stream *self), "_ZN2at3mps9MPSStream13commandBufferEv")
{
    require_queue(self, "commandBuffer");
    return command_buffer(self);
}

EXPORT(void, torch_synchronize_stream, (struct stream *self, int type),
       "_ZN2at3mps9MPSStream11synchronizeENS0_8SyncTypeE")
{
    synchronize(self, type);
}
#endif

#if defined(TORCH_ENDS)
EXPORT(void, torch_end_kernel_coalescing, (struct stream *self), "_ZN2at3mps9MPSStream19endKernelCoalescingEv")
{
    end_kernel_coalescing(self);
}
#endif

#if defined(TORCH_STREAMS)
EXPORT(void, torch_synchronize_all, (int type), "_ZN2at3mps24synchronizeAllMPSStreamsENS0_8SyncTypeE")
{
    struct stream *const streams[] = {&standard, &another};
    open_streams();
    for (size_t n = 0; n < sizeof streams / sizeof *streams; n++)
        dispatch_sync_f(streams[n]->dispatch_queue, streams[n], type == COMMIT ? commit_on_queue : wait_on_queue);
}
#endif

/* --- For tests ------------------------------------------------------------------------------------ */

struct scale {
    struct stream *stream;
    id buffer;
    size_t count;
    float factor;
};

/* Leaves the length of a threadgroup argument set, as some of PyTorch's kernels do, and takes nearly all there is. It
 * does not count for kernels that have no such argument. */
static void encode_scale(void *argument)
{
    const struct scale *scale = argument;
    void *pool = objc_autoreleasePoolPush();
    id encoder = command_encoder(scale->stream);
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), pipeline);
    SEND(void, (id, SEL, id, NSUInteger, NSUInteger), encoder, sel_registerName("setBuffer:offset:atIndex:"),
         scale->buffer, (NSUInteger)0, (NSUInteger)0);
    SEND(void, (id, SEL, const void *, NSUInteger, NSUInteger), encoder, sel_registerName("setBytes:length:atIndex:"),
         &scale->factor, sizeof scale->factor, (NSUInteger)1);
    SEND(void, (id, SEL, NSUInteger, NSUInteger), encoder, sel_registerName("setThreadgroupMemoryLength:atIndex:"),
         (NSUInteger)32736, (NSUInteger)0);
    SEND(void, (id, SEL, MTLSize, MTLSize), encoder, sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"),
         (MTLSize){scale->count, 1, 1}, (MTLSize){1, 1, 1});
    objc_autoreleasePoolPop(pool);
}

void metalsim_torch_scale(void *buffer, size_t count, float factor)
{
    open_streams();
    struct scale scale = {current(), buffer, count, factor};
    dispatch_sync_f(scale.stream->dispatch_queue, &scale, encode_scale);
}

void metalsim_torch_set_available(int available)
{
    is_missing = !available;
}

void metalsim_torch_set_concurrent(int encoders_are)
{
    metalsim_torch_synchronize();
    concurrent = encoders_are;
}

void metalsim_torch_leave(int leave)
{
    is_left = leave;
}

void metalsim_torch_record(int record)
{
    metalsim_torch_synchronize();
    is_recording = record;
}

void metalsim_torch_synchronize(void)
{
    torch_synchronize();
}

static void close_stream(struct stream *stream)
{
    dispatch_sync_f(stream->dispatch_queue, stream, wait_on_queue);
    metalsim_runtime_release(stream->queue);
    metalsim_runtime_release(stream->dispatch_queue);
    *stream = (struct stream){.queue = NULL};
}

void metalsim_torch_close(void)
{
    if (!device)
        return;
    close_stream(&standard);
    close_stream(&another);
    metalsim_runtime_release(pipeline);
    metalsim_runtime_release(device);
    device = pipeline = NULL;
}
