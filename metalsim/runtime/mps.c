/* MPSCommandBuffer, by which PyTorch's streams hold their commands: it commits its root, an MTLCommandBuffer, and goes
 * on with another. */
#include "runtime/metal.h"

struct continued {
    struct metalsim_object object;
    id queue, root;
};

static void finish_continued(id self)
{
    metalsim_release(((struct continued *)self)->root);
    metalsim_release(((struct continued *)self)->queue);
}

METALSIM_CLASS(MPSCommandBuffer, struct continued, finish_continued)

static void begin_root(struct continued *continued, SEL selector)
{
    continued->root = metalsim_queue_command_buffer(continued->queue, selector);
    metalsim_retain(continued->root);
}

id metalsim_continued_make(id self, SEL selector, id queue)
{
    (void)self;
    if (!metalsim_object_is(queue, &metalsim_class_MTLCommandQueue, selector))
        return NULL;
    struct continued *continued = (struct continued *)metalsim_object_create(&metalsim_class_MPSCommandBuffer);
    metalsim_retain(queue);
    continued->queue = queue;
    begin_root(continued, selector);
    return metalsim_autorelease(&continued->object);
}

id metalsim_continued_root(id self, SEL selector)
{
    (void)selector;
    return ((struct continued *)self)->root;
}

void metalsim_continued_commit(id self, SEL selector)
{
    struct continued *continued = (struct continued *)self;
    metalsim_command_buffer_commit(continued->root, selector);
    metalsim_release(continued->root);
    begin_root(continued, selector);
}

id metalsim_continued_encoder(id self, SEL selector)
{
    return metalsim_command_buffer_encoder(((struct continued *)self)->root, selector);
}

id metalsim_continued_typed_encoder(id self, SEL selector, NSUInteger type)
{
    return metalsim_command_buffer_typed_encoder(((struct continued *)self)->root, selector, type);
}
