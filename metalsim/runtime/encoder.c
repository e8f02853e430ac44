/* Compute encoders: what is set, and the dispatches that are made with it. A Mac with Metal's validation layer refuses
 * the same. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "metalsim.h"
#include "runtime/metal.h"

struct encoder {
    struct metalsim_object object;
    id command_buffer; /* NULL: it has ended */
    int behind_barrier;
    struct dispatch *next; /* what has been set for it so far */
};

/* --- What has been set ---------------------------------------------------------------------------- */

static void forget_argument(const struct dispatch *dispatch, struct argument *argument)
{
    if (argument->buffer && dispatch->retains)
        metalsim_release(&argument->buffer->object);
    free(argument->bytes);
    *argument = (struct argument){.buffer = NULL};
}

void metalsim_dispatch_finish(struct dispatch *dispatch)
{
    for (int i = 0; i < PROGRAM_BUFFERS; i++)
        forget_argument(dispatch, &dispatch->arguments[i]);
    if (dispatch->pipeline)
        metalsim_release(&dispatch->pipeline->object);
}

static void finish_encoder(id self)
{
    struct encoder *encoder = (struct encoder *)self;
    if (encoder->command_buffer)
        metalsim_find("an encoder is released without endEncoding");
    metalsim_dispatch_finish(encoder->next);
    free(encoder->next);
    metalsim_release(encoder->command_buffer);
}

METALSIM_CLASS(MTLComputeCommandEncoder, struct encoder, finish_encoder)

/* PyTorch's class of an encoder that records a graph, and passes on what it is sent. Here an encoder changes its class
 * when it begins to record. */
const struct metalsim_class metalsim_class_MPSRecordingEncoder = {
    &metalsim_metaclass, "MPSRecordingEncoder", sizeof(struct encoder), finish_encoder, "MTLComputeCommandEncoder"};

id metalsim_encoder_create(id command_buffer, int concurrent, int retains)
{
    struct encoder *encoder = (struct encoder *)metalsim_object_create(&metalsim_class_MTLComputeCommandEncoder);
    metalsim_retain(command_buffer);
    encoder->command_buffer = command_buffer;
    encoder->behind_barrier = 1; /* encoders follow each other */
    encoder->next = calloc(1, sizeof *encoder->next);
    if (!encoder->next)
        abort();
    encoder->next->concurrent = concurrent, encoder->next->retains = retains;
    return &encoder->object;
}

/* The encoder if it is still open. */
static struct encoder *open_encoder(id self, SEL selector)
{
    struct encoder *encoder = (struct encoder *)self;
    if (encoder->command_buffer)
        return encoder;
    metalsim_find("%s: the encoder has ended", selector);
    return NULL;
}

static int is_index(SEL selector, NSUInteger index)
{
    if (index < PROGRAM_BUFFERS)
        return 1;
    metalsim_find("%s: the index is %lu; it must be 0 to %d", selector, index, PROGRAM_BUFFERS - 1);
    return 0;
}

NSUInteger metalsim_encoder_type(id self, SEL selector)
{
    (void)selector;
    return (NSUInteger)((struct encoder *)self)->next->concurrent;
}

void metalsim_encoder_set_pipeline(id self, SEL selector, id pipeline)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!encoder || !metalsim_object_is(pipeline, &metalsim_class_MTLComputePipelineState, selector))
        return;
    metalsim_retain(pipeline);
    if (encoder->next->pipeline)
        metalsim_release(&encoder->next->pipeline->object);
    encoder->next->pipeline = (struct pipeline *)pipeline;
}

void metalsim_encoder_set_buffer(id self, SEL selector, id buffer, NSUInteger offset, NSUInteger index)
{
    struct encoder *encoder = open_encoder(self, selector);
    struct buffer *given = (struct buffer *)buffer;
    if (!encoder || !is_index(selector, index) ||
        (buffer && !metalsim_object_is(buffer, &metalsim_class_MTLBuffer, selector)))
        return;
    if (given && offset > given->length) {
        metalsim_find("%s: the offset is %lu; the buffer has %zu bytes", selector, offset, given->length);
        return;
    }
    if (encoder->next->retains)
        metalsim_retain(buffer);
    forget_argument(encoder->next, &encoder->next->arguments[index]);
    encoder->next->arguments[index] = (struct argument){.buffer = given, .offset = offset};
}

void metalsim_encoder_set_bytes(id self, SEL selector, const void *bytes, NSUInteger length, NSUInteger index)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!encoder || !is_index(selector, index))
        return;
    if (!bytes || length < 1 || length > METALSIM_BYTES_MAX) {
        metalsim_find("%s: the length is %lu; it must be 1 to %d", selector, length, METALSIM_BYTES_MAX);
        return;
    }
    forget_argument(encoder->next, &encoder->next->arguments[index]);
    struct argument *argument = &encoder->next->arguments[index];
    argument->bytes = malloc(length);
    if (!argument->bytes)
        abort();
    memcpy(argument->bytes, bytes, length);
    argument->length = length;
}

void metalsim_encoder_set_threadgroup(id self, SEL selector, NSUInteger length, NSUInteger index)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!encoder || !is_index(selector, index))
        return;
    if (length % 16 || length > METALSIM_THREADGROUP_MAX)
        metalsim_find("%s: the length is %lu; it must be a multiple of 16, and %d at most", selector, length,
                      METALSIM_THREADGROUP_MAX);
    else
        encoder->next->threadgroup_lengths[index] = length;
}

void metalsim_encoder_barrier(id self, SEL selector, NSUInteger scope)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!(scope & 1)) /* MTLBarrierScopeBuffers */
        metalsim_find("%s: the scope is %#lx, without buffers", selector, scope);
    else if (encoder)
        encoder->behind_barrier = 1;
    METALSIM_COUNT(barriers);
}

void metalsim_encoder_end(id self, SEL selector)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!encoder)
        return;
    metalsim_command_buffer_encoded(encoder->command_buffer);
    metalsim_release(encoder->command_buffer);
    encoder->command_buffer = NULL;
}

/* --- Dispatches ----------------------------------------------------------------------------------- */

static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;
static struct metalsim_recorded recorded[METALSIM_RECORDED];
static size_t records;

const struct metalsim_recorded *metalsim_runtime_dispatch(size_t i)
{
    return i < METALSIM_RECORDED && i < records ? &recorded[(records - 1 - i) % METALSIM_RECORDED] : NULL;
}

static void record(const struct dispatch *d)
{
    pthread_mutex_lock(&recording);
    struct metalsim_recorded *to = &recorded[records++ % METALSIM_RECORDED];
    free((char *)to->function);
    for (int i = 0; i < PROGRAM_BUFFERS; i++)
        free((void *)to->buffers[i].bytes);
    memset(to, 0, sizeof *to);
    to->function = strdup(((struct function *)d->pipeline->function)->name);
    memcpy(to->threadgroups, d->threadgroups, sizeof to->threadgroups);
    memcpy(to->threads, d->threads, sizeof to->threads);
    memcpy(to->threadgroup_lengths, d->threadgroup_lengths, sizeof to->threadgroup_lengths);
    for (int i = 0; i < PROGRAM_BUFFERS; i++) {
        const struct argument *a = &d->arguments[i];
        to->buffers[i].buffer = a->buffer;
        to->buffers[i].length = a->buffer ? a->buffer->length : a->length;
        to->buffers[i].offset = a->offset;
        if (a->bytes && (to->buffers[i].bytes = malloc(a->length)) != NULL)
            memcpy((void *)to->buffers[i].bytes, a->bytes, a->length);
    }
    pthread_mutex_unlock(&recording);
}

/* Whether the dispatch may be made. */
static int check(SEL selector, const struct dispatch *d)
{
    uint64_t threads = 1, groups = 1;
    for (int i = 0; i < 3; i++)
        threads *= d->threads[i], groups *= d->threadgroups[i];
    const struct function *function = d->pipeline ? (const struct function *)d->pipeline->function : NULL;
    const uint64_t bytes =
        function ? metalsim_program_threadgroup_bytes(function->program, function->name, d->threadgroup_lengths) : 0;
    if (!function)
        metalsim_find("%s: no pipeline state is set", selector);
    else if (threads < 1 || threads > d->pipeline->threads)
        metalsim_find("%s: a threadgroup has %llu threads; %s allows 1 to %llu", selector, (unsigned long long)threads,
                      function->name, (unsigned long long)d->pipeline->threads);
    else if (groups < 1)
        metalsim_find("%s: there are no threadgroups", selector);
    else if (bytes > METALSIM_THREADGROUP_MAX)
        metalsim_find("%s: %s has %llu bytes of threadgroup memory, declared and set; there are %d", selector,
                      function->name, (unsigned long long)bytes, METALSIM_THREADGROUP_MAX);
    else
        return 1;
    return 0;
}

/* What is set goes on being set for the dispatches after this one, which need copies of their own. */
static struct dispatch copy_of(const struct dispatch *d)
{
    struct dispatch copy = *d;
    metalsim_retain(&copy.pipeline->object);
    for (int i = 0; i < PROGRAM_BUFFERS; i++) {
        struct argument *a = &copy.arguments[i];
        if (a->buffer && d->retains)
            metalsim_retain(&a->buffer->object);
        if (!a->bytes)
            continue;
        a->bytes = malloc(a->length);
        if (!a->bytes)
            abort();
        memcpy(a->bytes, d->arguments[i].bytes, a->length);
    }
    return copy;
}

void metalsim_encoder_dispatch(id self, SEL selector, MTLSize threadgroups, MTLSize threads)
{
    struct encoder *encoder = open_encoder(self, selector);
    if (!encoder)
        return;
    struct dispatch *d = encoder->next;
    d->threadgroups[0] = threadgroups.width, d->threads[0] = threads.width;
    d->threadgroups[1] = threadgroups.height, d->threads[1] = threads.height;
    d->threadgroups[2] = threadgroups.depth, d->threads[2] = threads.depth;
    d->behind_barrier = encoder->behind_barrier;
    encoder->behind_barrier = 0;
    if (!check(selector, d))
        return;
    METALSIM_COUNT(dispatches);
    record(d);
    const struct dispatch copy = copy_of(d);
    metalsim_command_buffer_add(encoder->command_buffer, &copy);
}

const char *metalsim_dispatch_execute(const struct dispatch *d)
{
    const struct function *function = (const struct function *)d->pipeline->function;
    struct program_run run = {.kernel = function->name};
    memcpy(run.threadgroups, d->threadgroups, sizeof run.threadgroups);
    memcpy(run.threads, d->threads, sizeof run.threads);
    memcpy(run.threadgroup_lengths, d->threadgroup_lengths, sizeof run.threadgroup_lengths);
    for (int i = 0; i < PROGRAM_BUFFERS; i++) {
        const struct argument *a = &d->arguments[i];
        if (a->buffer && !metalsim_object_is(&a->buffer->object, &metalsim_class_MTLBuffer, "what a command reads"))
            return "a buffer is gone that a command reads or writes";
        if (a->buffer)
            run.arguments[i] =
                (struct program_argument){a->buffer->bytes, a->buffer->length, a->offset, 0, a->buffer->unwritten};
        else if (a->bytes)
            run.arguments[i] = (struct program_argument){a->bytes, a->length, 0, 1, 0};
    }
    const char *why = metalsim_program_run(function->program, &run);
    for (int i = 0; i < PROGRAM_BUFFERS; i++)
        if (d->arguments[i].buffer)
            d->arguments[i].buffer->unwritten = 0;
    if (!strcmp(function->name, "layout_test") && metalsim_fails(METALSIM_FAULT_LAYOUT))
        for (int i = 0; i < PROGRAM_BUFFERS; i++)
            if (d->arguments[i].buffer)
                memset(d->arguments[i].buffer->bytes + d->arguments[i].offset, 1, 4);
    return why;
}
