/* The checker of a checked library: who touched which byte, between which barriers. One dispatch at a
 * time per CPU thread, and all of a dispatch on one thread. */
#ifndef METALSIM_CHECK_H
#define METALSIM_CHECK_H

#include <stddef.h>

#include "group.h"

struct metalsim_check;

/* A stretch of memory that a kernel may touch. */
struct metalsim_region {
    enum { METALSIM_REGION_DEVICE, METALSIM_REGION_THREADGROUP, METALSIM_REGION_CONSTANT } kind;
    unsigned index;   /* of the buffer or threadgroup argument that it was bound at first */
    const char *name; /* of an array that the kernel declares in threadgroup memory; else NULL */
    size_t length;
    int unwritten; /* its contents count as never written */
};

/* What messages call it, written to `name`, which is returned. */
#define METALSIM_REGION_NAME 80
const char *metalsim_region_name(const struct metalsim_region *region, char name[METALSIM_REGION_NAME]);

/* A checker with room for `count` regions, and their memory: region i is at metalsim_check_memory(i), far
 * from all others. NULL: out of memory. */
struct metalsim_check *metalsim_check_create(const struct metalsim_region *regions, size_t count);
void metalsim_check_destroy(struct metalsim_check *check);
char *metalsim_check_memory(const struct metalsim_check *check, size_t i);
int metalsim_check_was_written(const struct metalsim_check *check, size_t i); /* by the kernel */

/* Around a dispatch of `machine` on this CPU thread, whose code is from begin to end. */
void metalsim_check_enter(struct metalsim_check *check, struct metalsim_machine *machine, const void *begin,
                          const void *end);
void metalsim_check_leave(void);

/* Threadgroup `number` begins: its threadgroup memory is as new. */
void metalsim_check_threadgroup(struct metalsim_check *check, unsigned number);

/* The runtime's half of struct metalsim_runtime that watches. */
void metalsim_check_read(const void *address, unsigned long bytes, const void *site);
void metalsim_check_write(const void *address, unsigned long bytes, const void *site);
void metalsim_check_atomic(const void *address, unsigned long bytes, const void *site);
void metalsim_check_undefined(const char *what, const void *site);

#endif
