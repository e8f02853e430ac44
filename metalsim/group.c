#include "group.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fiber.h"

#define WIDTH METALSIM_SIMD_WIDTH
#define STACK_STAGGER 1088 /* bytes: stacks that begin at one offset would all share a few cache lines */

static const volatile unsigned open_gate = 1, shut_gate = 0;

void metalsim_findings_add(struct metalsim_findings *findings, const void *site, const void *other, const char *format,
                           ...)
{
    for (size_t i = 0; i < findings->count; i++)
        if (findings->list[i].site == site && findings->list[i].other == other)
            return;
    if (findings->count == METALSIM_FINDINGS)
        return;
    struct metalsim_finding *finding = &findings->list[findings->count++];
    finding->site = site;
    finding->other = other;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(finding->text, sizeof finding->text, format, arguments);
    va_end(arguments);
}

/* --- Machines ------------------------------------------------------------------------------------- */

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static struct metalsim_machine *idle;

static void destroy(struct metalsim_machine *machine)
{
    if (machine->stacks)
        metalsim_fiber_unmap(machine->stacks, machine->capacity);
    free(machine->teams);
    free(machine);
}

static struct metalsim_machine *create(unsigned capacity)
{
    struct metalsim_machine *machine = calloc(1, sizeof *machine);
    if (!machine)
        return NULL;
    machine->capacity = capacity;
    machine->teams = aligned_alloc(64, capacity / WIDTH * sizeof *machine->teams);
    machine->stacks = metalsim_fiber_map(capacity);
    if (machine->teams && machine->stacks)
        return machine;
    destroy(machine);
    return NULL;
}

struct metalsim_machine *metalsim_machine_borrow(unsigned threads)
{
    pthread_mutex_lock(&idle_lock);
    struct metalsim_machine **at = &idle, *machine;
    while (*at && (*at)->capacity < threads)
        at = &(*at)->next_idle;
    machine = *at;
    if (machine)
        *at = machine->next_idle;
    pthread_mutex_unlock(&idle_lock);
    unsigned capacity = 4 * WIDTH;
    while (capacity < threads)
        capacity *= 2;
    if (!machine)
        machine = create(capacity);
    if (machine) {
        machine->threads = threads;
        machine->findings.count = 0;
        machine->stopped = 0;
    }
    return machine;
}

void metalsim_machine_return(struct metalsim_machine *machine)
{
    if (!machine)
        return;
    pthread_mutex_lock(&idle_lock);
    machine->next_idle = idle;
    idle = machine;
    pthread_mutex_unlock(&idle_lock);
}

static struct metalsim_lane *lane_at(const struct metalsim_machine *machine, unsigned index)
{
    return (struct metalsim_lane *)(machine->stacks + (size_t)(index + 1) * METALSIM_STACK) - 1;
}

/* --- Taking turns --------------------------------------------------------------------------------- */

static int may_run(const struct metalsim_lane *lane)
{
    return *lane->gate != lane->ticket;
}

/* The lane whose turn it is after `lane`, which waits: of its simdgroup if possible. NULL: all wait. */
static struct metalsim_lane *pick(const struct metalsim_lane *lane)
{
    struct metalsim_lane *next = lane->next;
    if (may_run(next))
        return next;
    struct metalsim_team *own = metalsim_lane_team(lane), *team = own;
    do {
        struct metalsim_lane *first = team == own ? lane->next : team->first;
        next = first;
        do {
            if (may_run(next))
                return next;
            next = next->next;
        } while (next != first);
        team = team->next;
    } while (team != own);
    return NULL;
}

_Noreturn void metalsim_machine_stop(struct metalsim_machine *machine)
{
    void *nowhere;
    machine->stopped = 1;
    metalsim_fiber_switch(&nowhere, machine->host);
    abort(); /* nothing goes back to a lane of a stopped machine */
}

/* All lanes that are left wait: for others that are elsewhere, or have returned. */
static void report_stuck(struct metalsim_machine *machine)
{
    const struct metalsim_team *team = NULL;
    for (unsigned i = 0; i < (machine->threads + WIDTH - 1) / WIDTH; i++)
        if (machine->teams[i].arrived)
            team = &machine->teams[i];
    if (team)
        metalsim_findings_add(&machine->findings, team->site, machine->arrived ? machine->site : NULL,
                              "divergence: %u of %u lanes of simdgroup %u are at a simdgroup operation that the others "
                              "do not reach; %u threads are at a threadgroup_barrier and %u have returned",
                              team->arrived, team->lanes, team->index, machine->arrived, machine->finished);
    else
        metalsim_findings_add(&machine->findings, machine->site, NULL,
                              "divergence: %u of %u threads are at a threadgroup_barrier, %u have returned",
                              machine->arrived, machine->threads, machine->finished);
}

static void wait_at(struct metalsim_lane *lane, const volatile unsigned *gate)
{
    struct metalsim_machine *machine = metalsim_lane_team(lane)->machine;
    lane->gate = gate;
    lane->ticket = *gate;
    struct metalsim_lane *next = pick(lane);
    if (!next) {
        report_stuck(machine);
        metalsim_machine_stop(machine);
    }
    metalsim_fiber_switch(&lane->stack_pointer, next->stack_pointer);
}

static void begin(void)
{
    struct metalsim_lane *lane = metalsim_self();
    struct metalsim_machine *machine = metalsim_lane_team(lane)->machine;
    machine->entry->enter(machine->buffers, machine->threadgroup);
    if (++machine->finished < machine->threads)
        wait_at(lane, &shut_gate);
    void *nowhere;
    metalsim_fiber_switch(&nowhere, machine->host);
}

/* --- Meetings ------------------------------------------------------------------------------------- */

static void passed(struct metalsim_epochs *epochs, unsigned memory)
{
    epochs->passed[0] += (memory & METALSIM_MEMORY_DEVICE) != 0;
    epochs->passed[1] += (memory & METALSIM_MEMORY_THREADGROUP) != 0;
}

/* The lane arrives at its simdgroup's next meeting; 1: as the last one. */
static int arrive(struct metalsim_lane *lane, struct metalsim_team *team, const void *site, const void *operate)
{
    struct metalsim_machine *machine = team->machine;
    if (team->lanes != WIDTH) {
        metalsim_findings_add(&machine->findings, site, NULL,
                              "a simdgroup operation in a simdgroup of %u lanes: the threads of a threadgroup must be "
                              "a multiple of %d",
                              team->lanes, WIDTH);
        metalsim_machine_stop(machine);
    }
    if (!team->arrived) {
        team->site = site;
        team->operate = operate;
    } else if (team->site != site || team->operate != operate) {
        metalsim_findings_add(&machine->findings, site, team->site,
                              "divergence: lane %u of simdgroup %u is at another simdgroup operation than lanes before "
                              "it",
                              lane->lane, team->index);
        metalsim_machine_stop(machine);
    }
    if (++team->arrived < team->lanes)
        return 0;
    team->arrived = 0;
    return 1;
}

void metalsim_group_meet(void (*operate)(unsigned char *slots), const void *site)
{
    struct metalsim_lane *lane = metalsim_self();
    struct metalsim_team *team = metalsim_lane_team(lane);
    if (!arrive(lane, team, site, (const void *)operate)) {
        wait_at(lane, &team->shared.meetings);
        return;
    }
    if (operate)
        operate(team->shared.slots[team->shared.meetings & 1]);
    team->shared.meetings++;
}

void metalsim_group_simdgroup_barrier(unsigned memory, const void *site)
{
    struct metalsim_lane *lane = metalsim_self();
    struct metalsim_team *team = metalsim_lane_team(lane);
    if (!arrive(lane, team, site, NULL)) {
        wait_at(lane, &team->shared.meetings);
        return;
    }
    passed(&team->epochs, memory);
    team->shared.meetings++;
}

void metalsim_group_threadgroup_barrier(unsigned memory, const void *site)
{
    struct metalsim_lane *lane = metalsim_self();
    struct metalsim_machine *machine = metalsim_lane_team(lane)->machine;
    if (!machine->arrived) {
        machine->site = site;
        machine->memory = memory;
    } else if (machine->site != site || machine->memory != memory) {
        metalsim_findings_add(&machine->findings, site, machine->site,
                              "divergence: thread %u is at another threadgroup_barrier than threads before it",
                              lane->index);
        metalsim_machine_stop(machine);
    }
    if (++machine->arrived < machine->threads) {
        wait_at(lane, &machine->barriers);
        return;
    }
    machine->arrived = 0;
    passed(&machine->epochs, memory);
    machine->barriers++;
}

void *metalsim_group_threadgroup_array(const char *name)
{
    const struct metalsim_machine *machine = metalsim_lane_team(metalsim_self())->machine;
    const struct metalsim_parameter *p = machine->entry->parameters;
    while (p->kind != METALSIM_ARRAY || strcmp(p->name, name)) /* parameters.c has found all that the text has */
        p++;
    return machine->threadgroup[METALSIM_BUFFERS + p->index];
}

/* --- A threadgroup -------------------------------------------------------------------------------- */

static uint64_t draw(uint64_t *state) /* splitmix64 */
{
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static void arrange(unsigned *order, unsigned count, enum metalsim_schedule schedule, uint64_t *state)
{
    for (unsigned i = 0; i < count; i++)
        order[i] = schedule == METALSIM_REVERSED ? count - 1 - i : i;
    if (schedule != METALSIM_SHUFFLED)
        return;
    for (unsigned i = count; i > 1; i--) {
        unsigned j = (unsigned)(draw(state) % i), last = order[i - 1];
        order[i - 1] = order[j];
        order[j] = last;
    }
}

static void start_lane(struct metalsim_machine *machine, struct metalsim_team *team, unsigned index)
{
    struct metalsim_lane *lane = lane_at(machine, index);
    const struct metalsim_coord *threads = &machine->grid.threads;
    *lane = (struct metalsim_lane){
        .gate = &open_gate,
        .index = index,
        .lane = index % WIDTH,
        .simdgroup = &team->shared,
        .grid = &machine->grid,
        .position = {index % threads->x, index / threads->x % threads->y, index / threads->x / threads->y},
    };
    char *stack_end = (char *)lane - (size_t)(index % 64) * STACK_STAGGER;
    lane->stack_pointer = metalsim_fiber_make(stack_end, begin);
}

static void start_team(struct metalsim_machine *machine, struct metalsim_team *team, enum metalsim_schedule schedule,
                       uint64_t *state)
{
    unsigned index = (unsigned)(team - machine->teams), begin_at = index * WIDTH, order[WIDTH];
    unsigned lanes = machine->threads - begin_at < WIDTH ? machine->threads - begin_at : WIDTH;
    team->machine = machine;
    team->index = index;
    team->lanes = lanes;
    team->arrived = 0;
    team->shared.meetings = 0;
    memset(&team->epochs, 0, sizeof team->epochs);
    arrange(order, lanes, schedule, state);
    for (unsigned i = 0; i < lanes; i++)
        start_lane(machine, team, begin_at + order[i]);
    for (unsigned i = 0; i < lanes; i++)
        lane_at(machine, begin_at + order[i])->next = lane_at(machine, begin_at + order[(i + 1) % lanes]);
    team->first = lane_at(machine, begin_at + order[0]);
}

int metalsim_machine_run(struct metalsim_machine *machine, enum metalsim_schedule schedule, uint64_t seed)
{
    unsigned order[METALSIM_THREADS_MAX / WIDTH], teams = (machine->threads + WIDTH - 1) / WIDTH;
    machine->finished = machine->arrived = machine->barriers = 0;
    memset(&machine->epochs, 0, sizeof machine->epochs);
    arrange(order, teams, schedule, &seed);
    for (unsigned i = 0; i < teams; i++) {
        machine->teams[order[i]].next = &machine->teams[order[(i + 1) % teams]];
        start_team(machine, &machine->teams[order[i]], schedule, &seed);
    }
    machine->stopped = 0;
    metalsim_fiber_switch(&machine->host, machine->teams[order[0]].first->stack_pointer);
    return !machine->stopped;
}
