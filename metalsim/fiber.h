/* Many stacks on one CPU thread. A switch saves what a called function must preserve, and nothing else. */
#ifndef METALSIM_FIBER_H
#define METALSIM_FIBER_H

#include <stddef.h>

/* Goes on where `stack_pointer` was saved, and saves where to go on here. */
void metalsim_fiber_switch(void **save, void *stack_pointer);

/* The stack pointer of a fiber that has not begun: it will call begin(), which must not return. */
void *metalsim_fiber_make(char *stack_end, void (*begin)(void));

/* Memory for `count` stacks of METALSIM_STACK bytes, aligned to that, each ending in a guard page that
 * stops whoever overruns it; NULL: out of memory. */
char *metalsim_fiber_map(size_t count);
void metalsim_fiber_unmap(char *stacks, size_t count);

#endif
