/* Messages as a program of the tests sends them: with casts of its own, not the library's table. */
#ifndef TESTS_METAL_HOST_OBJC_H
#define TESTS_METAL_HOST_OBJC_H

#include <stdbool.h>
#include <stddef.h>

typedef void *id;
typedef void *SEL;
struct size { /* MTLSize */
    unsigned long width, height, depth;
};

void objc_msgSend(void);
SEL sel_registerName(const char *name);
id objc_getClass(const char *name);
void *objc_autoreleasePoolPush(void);
void objc_autoreleasePoolPop(void *pool);
id MTLCreateSystemDefaultDevice(void);
id MTLCopyAllDevices(void);
void *dispatch_queue_create(const char *label, void *attributes);
void dispatch_sync_f(void *queue, void *context, void (*work)(void *));
int sysctlbyname(const char *name, void *old, size_t *old_length, void *new, size_t new_length);

extern void (*const metal_host_send)(void); /* objc_msgSend */
#define SEND(result, types, ...) ((result(*) types)metal_host_send)(__VA_ARGS__)
#define GET(receiver, selector) SEND(id, (id, SEL), receiver, sel_registerName(selector))
#define DO(receiver, selector) SEND(void, (id, SEL), receiver, sel_registerName(selector))
#define NUMBER(receiver, selector) SEND(unsigned long, (id, SEL), receiver, sel_registerName(selector))

#endif
