/* Command queues and command buffers. Nothing is executed before somebody waits for it: then what was committed to the
 * queue runs, in order, up to the buffer that is waited for. So a host that forgets to wait finds no results. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/metal.h"

enum { NOT_ENQUEUED = 0, COMMITTED = 2, COMPLETED = 4, FAILED = 5 }; /* MTLCommandBufferStatus */

struct command_buffer {
    struct metalsim_object object;
    id queue; /* that it is from: held until it is committed, and then the queue holds it */
    int retains;
    int encoding; /* an encoder is open */
    atomic_int status;
    id error;
    struct dispatch *list;
    size_t count, capacity;
    struct command_buffer *next; /* committed after it: the queue owns those */
};

struct queue {
    struct metalsim_object object;
    pthread_mutex_t lock;
    struct command_buffer *first, **last; /* committed and not yet executed */
};

/* --- Executing ------------------------------------------------------------------------------------ */

static void forget_dispatches(struct command_buffer *buffer)
{
    for (size_t i = 0; i < buffer->count; i++)
        metalsim_dispatch_finish(&buffer->list[i]);
    free(buffer->list);
    buffer->list = NULL, buffer->count = buffer->capacity = 0;
}

/* The dispatches of a concurrent encoder that no barrier keeps apart run in the reverse of their order: a host that
 * needs a barrier there gets wrong results. */
static const char *execute_list(const struct command_buffer *buffer)
{
    if (metalsim_now.idle)
        return NULL;
    for (size_t begin = 0, end; begin < buffer->count; begin = end) {
        end = begin + 1;
        while (end < buffer->count && buffer->list[end].concurrent && !buffer->list[end].behind_barrier)
            end++;
        for (size_t i = end; i-- > begin;) {
            const char *why = metalsim_dispatch_execute(&buffer->list[i]);
            if (why)
                return why;
        }
    }
    return NULL;
}

static void execute(struct command_buffer *buffer)
{
    const char *why = NULL;
    if (metalsim_fails(METALSIM_FAULT_COMMAND_ERROR))
        why = "Caused GPU Timeout Error (00000002:kIOAccelCommandBufferCallbackErrorTimeout)";
    else if ((why = execute_list(buffer)) != NULL)
        metalsim_find("a command buffer fails: %s", why);
    if (why) {
        void *pool = objc_autoreleasePoolPush();
        buffer->error = metalsim_error("%s", why);
        metalsim_retain(buffer->error);
        objc_autoreleasePoolPop(pool);
    }
    forget_dispatches(buffer);
    atomic_store(&buffer->status, why ? FAILED : COMPLETED);
}

/* Executes what is committed, up to `until` (NULL: all of it). */
static void drain(struct queue *queue, const struct command_buffer *until)
{
    pthread_mutex_lock(&queue->lock);
    for (int reached = 0; queue->first && !reached;) {
        struct command_buffer *buffer = queue->first;
        execute(buffer);
        queue->first = buffer->next;
        if (!queue->first)
            queue->last = &queue->first;
        reached = buffer == until;
        metalsim_release(&buffer->object);
    }
    pthread_mutex_unlock(&queue->lock);
}

/* --- Queues --------------------------------------------------------------------------------------- */

static void finish_queue(id self)
{
    struct queue *queue = (struct queue *)self;
    drain(queue, NULL); /* what is committed runs, whoever still asks for it */
    pthread_mutex_destroy(&queue->lock);
}

METALSIM_CLASS(MTLCommandQueue, struct queue, finish_queue)

id metalsim_queue_create(void)
{
    struct queue *queue = (struct queue *)metalsim_object_create(&metalsim_class_MTLCommandQueue);
    pthread_mutex_init(&queue->lock, NULL);
    queue->last = &queue->first;
    return &queue->object;
}

static void finish_command_buffer(id self)
{
    struct command_buffer *buffer = (struct command_buffer *)self;
    if (buffer->encoding)
        metalsim_find("a command buffer is released with an encoder open");
    forget_dispatches(buffer);
    metalsim_release(buffer->error);
    if (atomic_load(&buffer->status) == NOT_ENQUEUED)
        metalsim_release(buffer->queue);
}

METALSIM_CLASS(MTLCommandBuffer, struct command_buffer, finish_command_buffer)

static id make_command_buffer(id queue, int retains)
{
    if (metalsim_fails(METALSIM_FAULT_NO_COMMAND_BUFFER))
        return NULL;
    METALSIM_COUNT(command_buffers);
    struct command_buffer *buffer = (struct command_buffer *)metalsim_object_create(&metalsim_class_MTLCommandBuffer);
    metalsim_retain(queue);
    buffer->queue = queue, buffer->retains = retains;
    return metalsim_autorelease(&buffer->object);
}

id metalsim_queue_command_buffer(id self, SEL selector)
{
    (void)selector;
    return make_command_buffer(self, 1);
}

id metalsim_queue_careless_command_buffer(id self, SEL selector)
{
    (void)selector;
    return make_command_buffer(self, 0);
}

/* --- Command buffers ------------------------------------------------------------------------------ */

BOOL metalsim_command_buffer_retains(id self, SEL selector)
{
    (void)selector;
    return ((struct command_buffer *)self)->retains;
}

static id open_encoder(id self, SEL selector, int concurrent)
{
    struct command_buffer *buffer = (struct command_buffer *)self;
    if (buffer->encoding) {
        metalsim_find("%s: A command encoder is already encoding to this command buffer", selector);
        return NULL;
    }
    if (atomic_load(&buffer->status) != NOT_ENQUEUED) {
        metalsim_find("%s: the command buffer is already committed", selector);
        return NULL;
    }
    if (metalsim_fails(METALSIM_FAULT_NO_ENCODER))
        return NULL;
    METALSIM_COUNT(encoders);
    buffer->encoding = 1;
    return metalsim_autorelease(metalsim_encoder_create(self, concurrent, buffer->retains));
}

id metalsim_command_buffer_encoder(id self, SEL selector)
{
    return open_encoder(self, selector, 0);
}

id metalsim_command_buffer_typed_encoder(id self, SEL selector, NSUInteger type)
{
    if (type > 1)
        metalsim_find("%s: the type is %lu; it must be 0 or 1", selector, type);
    return open_encoder(self, selector, type == 1);
}

void metalsim_command_buffer_add(id self, const struct dispatch *dispatch)
{
    struct command_buffer *buffer = (struct command_buffer *)self;
    if (buffer->count == buffer->capacity) {
        buffer->capacity = buffer->capacity ? 2 * buffer->capacity : 8;
        buffer->list = realloc(buffer->list, buffer->capacity * sizeof *buffer->list);
        if (!buffer->list)
            abort();
    }
    buffer->list[buffer->count++] = *dispatch;
}

void metalsim_command_buffer_encoded(id self)
{
    ((struct command_buffer *)self)->encoding = 0;
}

void metalsim_command_buffer_commit(id self, SEL selector)
{
    struct command_buffer *buffer = (struct command_buffer *)self;
    struct queue *queue = (struct queue *)buffer->queue;
    if (buffer->encoding)
        metalsim_find("%s: the command buffer has an encoder that has not ended", selector);
    if (atomic_load(&buffer->status) != NOT_ENQUEUED) {
        metalsim_find("%s: the command buffer is already committed", selector);
        return;
    }
    METALSIM_COUNT(commits);
    metalsim_retain(self);
    pthread_mutex_lock(&queue->lock);
    atomic_store(&buffer->status, COMMITTED);
    *queue->last = buffer;
    queue->last = &buffer->next;
    pthread_mutex_unlock(&queue->lock);
    metalsim_release(&queue->object);
}

void metalsim_command_buffer_wait(id self, SEL selector)
{
    struct command_buffer *buffer = (struct command_buffer *)self;
    METALSIM_COUNT(waits);
    if (atomic_load(&buffer->status) == NOT_ENQUEUED)
        metalsim_find("%s: the command buffer is not committed, and this would wait for ever", selector);
    else if (atomic_load(&buffer->status) == COMMITTED)
        drain((struct queue *)buffer->queue, buffer);
}

NSUInteger metalsim_command_buffer_status(id self, SEL selector)
{
    (void)selector;
    return (NSUInteger)atomic_load(&((struct command_buffer *)self)->status);
}

id metalsim_command_buffer_error(id self, SEL selector)
{
    (void)selector;
    return ((struct command_buffer *)self)->error;
}
