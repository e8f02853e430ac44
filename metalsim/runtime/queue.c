/* Serial dispatch queues: who is on one, and dispatch_sync_f. */
#include <pthread.h>
#include <stdlib.h>

#include "runtime/object.h"

struct dispatch_queue {
    struct metalsim_object object;
    pthread_mutex_t lock;
};

struct visit { /* of this thread to a queue */
    struct visit *outer;
    const void *queue;
};
static _Thread_local struct visit *innermost;

static void finish_queue(id self)
{
    pthread_mutex_destroy(&((struct dispatch_queue *)self)->lock);
}

METALSIM_CLASS(OS_dispatch_queue, struct dispatch_queue, finish_queue)

METALSIM_EXPORT void *dispatch_queue_create(const char *label, void *attributes);
void *dispatch_queue_create(const char *label, void *attributes)
{
    (void)label, (void)attributes;
    struct dispatch_queue *queue = (struct dispatch_queue *)metalsim_object_create(&metalsim_class_OS_dispatch_queue);
    pthread_mutex_init(&queue->lock, NULL);
    return queue;
}

int metalsim_runtime_on_queue(const void *queue)
{
    for (const struct visit *visit = innermost; visit; visit = visit->outer)
        if (visit->queue == queue)
            return 1;
    return 0;
}

METALSIM_EXPORT void dispatch_sync_f(void *queue, void *context, void (*work)(void *));
void dispatch_sync_f(void *queue, void *context, void (*work)(void *))
{
    struct dispatch_queue *to = queue;
    METALSIM_COUNT(syncs);
    if (!metalsim_object_is(queue, &metalsim_class_OS_dispatch_queue, "dispatch_sync_f's queue"))
        return;
    if (metalsim_runtime_on_queue(queue)) {
        metalsim_find("dispatch_sync_f on the queue that the caller is already on: it would wait for ever");
        return;
    }
    struct visit visit = {innermost, queue};
    pthread_mutex_lock(&to->lock);
    innermost = &visit;
    work(context);
    innermost = visit.outer;
    pthread_mutex_unlock(&to->lock);
}
