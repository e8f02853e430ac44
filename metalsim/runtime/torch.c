/* PyTorch's stream as aten/src/ATen/mps/MPSStream.mm and torch/csrc/api/src/mps.cpp have it. TORCH_SHARES: its encoder
 * can be had (MPSStream::commandEncoder is exported). TORCH_ENDS: its encoder can be ended (endKernelCoalescing is).
 * TORCH_ENDS_ITSELF: get_command_buffer ends it, as PyTorch does since 2.10. */
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
    id device, queue, pipeline, buffer, encoder;
    void *dispatch_queue;
    int concurrent;
    int is_left; /* another stream is the current one */
};
static struct stream stream;
static int is_missing; /* MPS */

static void require_queue(const char *function)
{
    if (metalsim_runtime_on_queue(stream.dispatch_queue))
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

static void open_stream(void)
{
    if (stream.device)
        return;
    send = objc_msgSend;
    id error = NULL;
    void *pool = objc_autoreleasePoolPush();
    stream.device = MTLCreateSystemDefaultDevice();
    stream.queue = GET(stream.device, "newCommandQueue");
    stream.dispatch_queue = dispatch_queue_create("metal gpu stream", NULL);
    id library = SEND(id, (id, SEL, id, id, id *), stream.device,
                      sel_registerName("newLibraryWithSource:options:error:"), string(source), NULL, &error);
    id function = SEND(id, (id, SEL, id), library, sel_registerName("newFunctionWithName:"), string("scale"));
    stream.pipeline = SEND(id, (id, SEL, id, id *), stream.device,
                           sel_registerName("newComputePipelineStateWithFunction:error:"), function, &error);
    DO(function, "release");
    DO(library, "release");
    objc_autoreleasePoolPop(pool);
    if (!stream.pipeline)
        abort();
}

/* --- at::mps::MPSStream --------------------------------------------------------------------------- */

static id command_buffer(void)
{
    if (!stream.buffer)
        stream.buffer = GET(GET(stream.queue, "commandBuffer"), "retain");
    return stream.buffer;
}

static id command_encoder(void)
{
    require_queue("commandEncoder");
    if (!stream.encoder)
        stream.encoder =
            GET(SEND(id, (id, SEL, NSUInteger), command_buffer(),
                     sel_registerName("computeCommandEncoderWithDispatchType:"), (NSUInteger)stream.concurrent),
                "retain");
    return stream.encoder;
}

static void end_kernel_coalescing(void)
{
    require_queue("endKernelCoalescing");
    if (!stream.encoder)
        return;
    DO(stream.encoder, "endEncoding");
    DO(stream.encoder, "release");
    stream.encoder = NULL;
}

static void commit_stream(void *wait)
{
    void *pool = objc_autoreleasePoolPush();
    end_kernel_coalescing();
    if (stream.buffer) {
        DO(stream.buffer, "commit");
        if (wait)
            DO(stream.buffer, "waitUntilCompleted");
        DO(stream.buffer, "release");
        stream.buffer = NULL;
    }
    objc_autoreleasePoolPop(pool);
}

/* --- The names that PyTorch exports --------------------------------------------------------------- */

#define EXPORT(result, function, types, name)            \
    METALSIM_EXPORT result function types __asm__(name); \
    result function types

EXPORT(void *, torch_get_command_buffer, (void), "_ZN5torch3mps18get_command_bufferEv")
{
    open_stream();
    require_queue("get_command_buffer");
#if defined(TORCH_ENDS_ITSELF)
    end_kernel_coalescing();
#endif
    return command_buffer();
}

EXPORT(void *, torch_get_dispatch_queue, (void), "_ZN5torch3mps18get_dispatch_queueEv")
{
    require_mps();
    open_stream();
    return stream.dispatch_queue;
}

EXPORT(bool, torch_is_available, (void), "_ZN5torch3mps12is_availableEv")
{
    return !is_missing;
}

EXPORT(void, torch_commit, (void), "_ZN5torch3mps6commitEv")
{
    open_stream();
    if (metalsim_runtime_on_queue(stream.dispatch_queue))
        commit_stream(NULL);
    else
        dispatch_sync_f(stream.dispatch_queue, NULL, commit_stream);
}

EXPORT(void, torch_synchronize, (void), "_ZN5torch3mps11synchronizeEv")
{
    open_stream();
    dispatch_sync_f(stream.dispatch_queue, &stream, commit_stream);
}

#if defined(TORCH_SHARES) || defined(TORCH_ENDS)
EXPORT(struct stream *, torch_current_stream, (void), "_ZN2at3mps19getCurrentMPSStreamEv")
{
    require_mps();
    static struct stream another;
    open_stream();
    return stream.is_left ? &another : &stream;
}

EXPORT(struct stream *, torch_default_stream, (void), "_ZN2at3mps19getDefaultMPSStreamEv")
{
    open_stream();
    return &stream;
}
#endif

#if defined(TORCH_SHARES)
EXPORT(id, torch_command_encoder, (struct stream *self), "_ZN2at3mps9MPSStream14commandEncoderEv")
{
    return self == &stream ? command_encoder() : NULL;
}
#endif

#if defined(TORCH_ENDS)
EXPORT(void, torch_end_kernel_coalescing, (struct stream *self), "_ZN2at3mps9MPSStream19endKernelCoalescingEv")
{
    if (self == &stream)
        end_kernel_coalescing();
}
#endif

/* --- For tests ------------------------------------------------------------------------------------ */

struct scale {
    id buffer;
    size_t count;
    float factor;
};

/* Leaves threadgroup memory set, as some of PyTorch's kernels do, and takes nearly all there is: whoever shares the
 * encoder sets all that is needed, and leaves next to nothing set at other indices. */
static void encode_scale(void *argument)
{
    const struct scale *scale = argument;
    void *pool = objc_autoreleasePoolPush();
    id encoder = command_encoder();
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), stream.pipeline);
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
    open_stream();
    dispatch_sync_f(stream.dispatch_queue, &(struct scale){buffer, count, factor}, encode_scale);
}

void metalsim_torch_set_available(int available)
{
    is_missing = !available;
}

void metalsim_torch_set_concurrent(int concurrent)
{
    open_stream();
    metalsim_torch_synchronize();
    stream.concurrent = concurrent;
}

void metalsim_torch_leave(int leave)
{
    stream.is_left = leave;
}

void metalsim_torch_synchronize(void)
{
    torch_synchronize();
}

void metalsim_torch_close(void)
{
    if (!stream.device)
        return;
    torch_synchronize();
    id held[] = {stream.pipeline, stream.queue, stream.device, (id)stream.dispatch_queue};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++)
        metalsim_runtime_release(held[i]);
    stream = (struct stream){.device = NULL};
}
