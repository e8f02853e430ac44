/* Objects, their reference counts, and autorelease pools. */
#define _GNU_SOURCE
#include "runtime/object.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static id newest; /* of the objects that are alive */

id metalsim_object_create(const struct metalsim_class *class)
{
    id object = calloc(1, class->size);
    if (!object)
        abort();
    object->isa = class;
    atomic_init(&object->references, 1);
    pthread_mutex_lock(&lock);
    object->older = newest;
    if (newest)
        newest->newer = object;
    newest = object;
    pthread_mutex_unlock(&lock);
    METALSIM_COUNT(objects);
    return object;
}

static void end(id object)
{
    if (object->isa->finish)
        object->isa->finish(object);
    pthread_mutex_lock(&lock);
    if (object->newer)
        object->newer->older = object->older;
    else
        newest = object->older;
    if (object->older)
        object->older->newer = object->newer;
    pthread_mutex_unlock(&lock);
    atomic_fetch_sub(&metalsim_counters.objects, 1);
}

void metalsim_retain(id object)
{
    if (object)
        atomic_fetch_add(&object->references, 1);
}

void metalsim_release(id object)
{
    if (object && atomic_fetch_sub(&object->references, 1) == 1)
        end(object);
}

int metalsim_object_is(id object, const struct metalsim_class *class, const char *what)
{
    if (!object)
        metalsim_find("%s is nil", what);
    else if (object->isa != class)
        metalsim_find("%s is a %s; it must be a %s", what,
                      object->isa == &metalsim_metaclass ? "class" : object->isa->name, class->name);
    else if (atomic_load(&object->references) <= 0)
        metalsim_find("%s is a %s that is gone", what, class->name);
    else
        return 1;
    return 0;
}

size_t metalsim_runtime_leaks(char *text, size_t capacity)
{
    size_t count = 0, length = 0;
    if (capacity)
        *text = 0;
    pthread_mutex_lock(&lock);
    for (id object = newest; object; object = object->older, count++)
        if (length < capacity) {
            const int added = snprintf(text + length, capacity - length, "%s%s (%d references)", count ? ", " : "",
                                       object->isa->name, atomic_load(&object->references));
            length += added > 0 ? (size_t)added : 0;
        }
    pthread_mutex_unlock(&lock);
    return count;
}

/* --- Methods of every object ---------------------------------------------------------------------- */

id metalsim_object_new(id self, SEL selector)
{
    const struct metalsim_class *class = (const struct metalsim_class *)self;
    if (class == &metalsim_class_NSString || class == &metalsim_class_NSURL || class == &metalsim_class_NSError)
        metalsim_find("%s %s: metalsim has no empty ones", class->name, selector);
    return metalsim_object_create(class);
}

id metalsim_object_retain(id self, SEL selector)
{
    (void)selector;
    metalsim_retain(self);
    return self;
}

void metalsim_object_release(id self, SEL selector)
{
    (void)selector;
    metalsim_release(self);
}

BOOL metalsim_object_responds(id self, SEL selector, SEL asked)
{
    (void)selector;
    return metalsim_message_fact(self->isa, '-', asked) != NULL;
}

BOOL metalsim_object_is_kind(id self, SEL selector, id class)
{
    (void)selector;
    return (id)self->isa == class;
}

/* As far as a host asks whether a pointer is to an object. */
METALSIM_EXPORT size_t malloc_size(const void *pointer);
size_t malloc_size(const void *pointer)
{
    pthread_mutex_lock(&lock);
    const struct metalsim_object *object = newest;
    while (object && object != pointer)
        object = object->older;
    const size_t size = object ? object->isa->size : 0;
    pthread_mutex_unlock(&lock);
    return size;
}

void metalsim_runtime_release(void *object)
{
    metalsim_release(object);
}

/* --- Autorelease pools ---------------------------------------------------------------------------- */

struct pool { /* lives until it is popped */
    struct pool *outer;
    id *objects;
    size_t count, capacity;
};
static _Thread_local struct pool *innermost;

id metalsim_autorelease(id object)
{
    struct pool *pool = innermost;
    if (!object)
        return NULL;
    if (!pool) {
        metalsim_find("%s is autoreleased with no pool in place: it leaks", object->isa->name);
        return object;
    }
    if (pool->count == pool->capacity) {
        pool->capacity = pool->capacity ? 2 * pool->capacity : 16;
        pool->objects = realloc(pool->objects, pool->capacity * sizeof *pool->objects);
        if (!pool->objects)
            abort();
    }
    pool->objects[pool->count++] = object;
    return object;
}

void *objc_autoreleasePoolPush(void)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        abort();
    pool->outer = innermost;
    METALSIM_COUNT(pools);
    return innermost = pool;
}

void objc_autoreleasePoolPop(void *token)
{
    const struct pool *pool = innermost;
    while (pool && pool != token)
        pool = pool->outer;
    if (!pool) {
        metalsim_find("an autorelease pool is popped that is not this thread's, or is gone");
        return;
    }
    if (innermost != token)
        metalsim_find("an autorelease pool is popped before those within it");
    for (int last = 0; !last;) {
        struct pool *top = innermost;
        last = top == token;
        for (size_t i = top->count; i-- > 0;)
            metalsim_release(top->objects[i]);
        innermost = top->outer;
        free(top->objects);
        free(top);
        atomic_fetch_sub(&metalsim_counters.pools, 1);
    }
}
