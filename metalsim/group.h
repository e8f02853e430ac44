/* A machine executes one threadgroup after another on one CPU thread: every GPU thread is a fiber, and
 * fibers take turns only where they must wait for each other. */
#ifndef METALSIM_GROUP_H
#define METALSIM_GROUP_H

#include <stddef.h>
#include <stdint.h>

#include "include/metalsim/abi.h"
#include "metalsim.h"

/* What went wrong, and where in the kernel's code: two places if it took two. */
struct metalsim_finding {
    const void *site, *other; /* return addresses; NULL: none */
    char text[232];           /* a sentence about both */
};

#define METALSIM_FINDINGS 16 /* kept of a dispatch: the first ones */

struct metalsim_findings {
    size_t count;
    struct metalsim_finding list[METALSIM_FINDINGS];
};

/* Adds a finding unless that pair of places has one. */
__attribute__((format(printf, 4, 5))) void metalsim_findings_add(struct metalsim_findings *findings, const void *site,
                                                                 const void *other, const char *format, ...);

/* Barriers passed: what happened before one is over. [0] device memory, [1] threadgroup memory. */
struct metalsim_epochs {
    unsigned passed[2];
};

struct metalsim_machine;

struct metalsim_team { /* a simdgroup */
    struct metalsim_simdgroup shared;
    struct metalsim_machine *machine;
    struct metalsim_team *next; /* in the order in which they take turns */
    struct metalsim_lane *first;
    unsigned index, lanes;
    unsigned arrived;    /* at the meeting that is next */
    const void *site;    /* of that meeting, */
    const void *operate; /* and what for */
    struct metalsim_epochs epochs;
};

#define METALSIM_LOCALS (METALSIM_BUFFERS + METALSIM_ARRAYS)

struct metalsim_machine {
    struct metalsim_grid grid;
    struct metalsim_team *teams;
    char *stacks;
    unsigned capacity; /* stacks, */
    unsigned threads;  /* of which so many are in use */
    unsigned finished;
    unsigned arrived;  /* at the next threadgroup_barrier, */
    unsigned barriers; /* of which so many have been passed, */
    unsigned memory;   /* with these flags, */
    const void *site;  /* there */
    struct metalsim_epochs epochs;
    const struct metalsim_entry *entry;
    void *const *buffers;
    void *const *threadgroup; /* of METALSIM_LOCALS: arguments by their index, then the kernel's arrays */
    void *host;               /* the stack pointer of whoever runs the machine */
    struct metalsim_findings findings;
    int stopped; /* by a finding after which nothing can go on */
    struct metalsim_machine *next_idle;
};

/* A machine for threadgroups of so many threads; NULL: out of memory. Those that were given back are lent again, since
 * their stacks are slow to make. */
struct metalsim_machine *metalsim_machine_borrow(unsigned threads);
void metalsim_machine_return(struct metalsim_machine *machine);

/* Executes the threadgroup at grid.position, its lanes in the order of the schedule. Returns 0 if it
 * was stopped; the findings say why. */
int metalsim_machine_run(struct metalsim_machine *machine, enum metalsim_schedule schedule, uint64_t seed);

/* Of a lane that is running: ends the execution of its threadgroup. */
_Noreturn void metalsim_machine_stop(struct metalsim_machine *machine);

static inline struct metalsim_team *metalsim_lane_team(const struct metalsim_lane *lane)
{
    return (struct metalsim_team *)lane->simdgroup;
}

/* The runtime's half of struct metalsim_runtime that has to do with turns. */
void metalsim_group_meet(void (*operate)(unsigned char *slots), const void *site);
void metalsim_group_simdgroup_barrier(unsigned memory, const void *site);
void metalsim_group_threadgroup_barrier(unsigned memory, const void *site);

/* The memory of the array that the running kernel declares under this name. */
void *metalsim_group_threadgroup_array(const char *name);

#endif
