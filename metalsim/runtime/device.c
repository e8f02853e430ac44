/* The device and its buffers. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "metalsim.h"
#include "runtime/metal.h"

#define PRIVATE 2 /* MTLStorageModePrivate: bits 4 to 7 of MTLResourceOptions */

METALSIM_CLASS(MTLDevice, struct metalsim_object, NULL)

METALSIM_EXPORT id MTLCreateSystemDefaultDevice(void);
id MTLCreateSystemDefaultDevice(void)
{
    if (metalsim_fails(METALSIM_FAULT_NO_DEFAULT) || metalsim_fails(METALSIM_FAULT_NO_DEVICE))
        return NULL;
    METALSIM_COUNT(devices);
    return metalsim_object_create(&metalsim_class_MTLDevice);
}

METALSIM_EXPORT id MTLCopyAllDevices(void);
id MTLCopyAllDevices(void)
{
    if (metalsim_fails(METALSIM_FAULT_NO_DEVICE))
        return metalsim_object_create(&metalsim_class_NSArray);
    id device = metalsim_object_create(&metalsim_class_MTLDevice), array = metalsim_array_create(device);
    metalsim_release(device);
    METALSIM_COUNT(devices);
    return array;
}

id metalsim_device_name(id self, SEL selector)
{
    (void)self, (void)selector;
    return metalsim_string(metalsim_now.name);
}

BOOL metalsim_device_supports_family(id self, SEL selector, NSInteger family)
{
    (void)self, (void)selector;
    return family > 1000 && family <= 1000 + metalsim_now.family; /* MTLGPUFamilyApple1 is 1001 */
}

NSUInteger metalsim_device_threadgroup_memory(id self, SEL selector)
{
    (void)self, (void)selector;
    return METALSIM_THREADGROUP_MAX;
}

NSUInteger metalsim_device_buffer_length(id self, SEL selector)
{
    (void)self, (void)selector;
    return metalsim_now.memory;
}

id metalsim_device_new_queue(id self, SEL selector)
{
    (void)self, (void)selector;
    if (metalsim_fails(METALSIM_FAULT_NO_QUEUE))
        return NULL;
    METALSIM_COUNT(queues);
    return metalsim_queue_create();
}

/* --- Buffers -------------------------------------------------------------------------------------- */

static void finish_buffer(id self)
{
    struct buffer *buffer = (struct buffer *)self;
    if (buffer->mapping)
        munmap(buffer->mapping, buffer->mapped);
    buffer->bytes = NULL;
}

METALSIM_CLASS(MTLBuffer, struct buffer, finish_buffer)

/* Ends, but for what alignment needs, at a page that nobody may touch, and holds NaNs: Metal promises nothing. */
static id make_buffer(size_t length, int is_private)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), rounded = (length + 255) / 256 * 256;
    const size_t pages = (rounded + page - 1) / page * page;
    unsigned char *mapping =
        mmap(NULL, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return NULL;
    mprotect(mapping + pages, page, PROT_NONE);
    struct buffer *buffer = (struct buffer *)metalsim_object_create(&metalsim_class_MTLBuffer);
    buffer->mapping = mapping, buffer->mapped = pages + page;
    buffer->bytes = mapping + (pages - rounded), buffer->length = length, buffer->unwritten = 1;
    buffer->is_private = is_private;
    memset(buffer->bytes, 0xff, length);
    return &buffer->object;
}

id metalsim_device_new_buffer(id self, SEL selector, NSUInteger length, NSUInteger options)
{
    (void)self;
    if (options & ~(NSUInteger)0x3ff)
        metalsim_find("%s: options are %#lx; they have bits that no MTLResourceOptions has", selector, options);
    if (length == 0 || length > metalsim_now.memory) {
        metalsim_find("%s: length is %lu; it must be 1 to maxBufferLength, %llu", selector, length,
                      (unsigned long long)metalsim_now.memory);
        return NULL;
    }
    if (metalsim_fails(METALSIM_FAULT_NO_BUFFER))
        return NULL;
    METALSIM_COUNT(buffers);
    return make_buffer(length, (options >> 4 & 15) == PRIVATE);
}

void *metalsim_runtime_buffer(void *bytes, size_t length, int unwritten)
{
    struct buffer *buffer = (struct buffer *)metalsim_object_create(&metalsim_class_MTLBuffer);
    buffer->bytes = bytes, buffer->length = length, buffer->unwritten = unwritten;
    return buffer;
}

void *metalsim_buffer_contents(id self, SEL selector)
{
    (void)selector;
    struct buffer *buffer = (struct buffer *)self;
    if (buffer->is_private)
        return NULL;
    buffer->unwritten = 0; /* whoever asks may write */
    return buffer->bytes;
}

NSUInteger metalsim_buffer_length(id self, SEL selector)
{
    (void)selector;
    return ((struct buffer *)self)->length;
}
