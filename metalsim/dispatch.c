/* A dispatch: what Metal would refuse is refused, then CPU threads take threadgroups one by one. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "error.h"
#include "group.h"
#include "library.h"
#include "report.h"

#define CPUS_MAX 64
#define GUARD 4096 /* bytes before and after each stretch of threadgroup memory */
#define UNIT 64    /* bytes: where each begins is a multiple of it */

/* --- What Metal refuses --------------------------------------------------------------------------- */

static metalsim_status check_argument(const char *kernel, unsigned i, const struct metalsim_argument *a)
{
    if (a->binding == METALSIM_BYTES_BINDING && (a->length == 0 || a->length > METALSIM_BYTES_MAX))
        return metalsim_fail(METALSIM_REFUSED, "%s: bytes at index %u have length %zu; it must be 1 to %d", kernel, i,
                             a->length, METALSIM_BYTES_MAX);
    if (a->binding != METALSIM_NONE && !a->base)
        return metalsim_fail(METALSIM_REFUSED, "%s: what is bound at index %u has a base of NULL", kernel, i);
    if (a->binding == METALSIM_BUFFER_BINDING && a->offset > a->length)
        return metalsim_fail(METALSIM_REFUSED, "%s: the buffer at index %u has offset %zu; its length is %zu", kernel,
                             i, a->offset, a->length);
    return METALSIM_OK;
}

static metalsim_status check_parameter(const struct metalsim_entry *e, const struct metalsim_parameter *p,
                                       const struct metalsim_dispatch *d)
{
    if (p->kind == METALSIM_THREADGROUP && d->threadgroup_lengths[p->index] < p->bytes)
        return metalsim_fail(METALSIM_REFUSED, "%s: threadgroup length %u is %zu; parameter %s needs %lu or more",
                             e->name, p->index, d->threadgroup_lengths[p->index], p->name, p->bytes);
    if (p->kind != METALSIM_BUFFER)
        return METALSIM_OK;
    const struct metalsim_argument *a = &d->buffers[p->index];
    if (a->binding == METALSIM_NONE)
        return metalsim_fail(METALSIM_REFUSED, "%s: nothing is bound at index %u, where parameter %s reads", e->name,
                             p->index, p->name);
    if (a->binding == METALSIM_BYTES_BINDING && !p->constant)
        return metalsim_fail(METALSIM_REFUSED, "%s: bytes are bound at index %u; parameter %s is in device memory",
                             e->name, p->index, p->name);
    if (p->constant && a->length - a->offset < p->bytes)
        return metalsim_fail(METALSIM_REFUSED, "%s: %zu bytes are bound at index %u; parameter %s needs %lu or more",
                             e->name, a->length - a->offset, p->index, p->name, p->bytes);
    return METALSIM_OK;
}

static metalsim_status check_threadgroup(const struct metalsim_kernel *kernel, const struct metalsim_dispatch *d)
{
    const char *name = kernel->entry->name;
    size_t threads = d->threads[0];
    for (int i = 1; i < 3; i++)
        threads = d->threads[i] && threads <= SIZE_MAX / d->threads[i] ? threads * d->threads[i] : 0;
    if (!threads || threads > metalsim_kernel_threads(kernel))
        return metalsim_fail(METALSIM_REFUSED, "%s: threads are %zu x %zu x %zu; a threadgroup has 1 to %zu in all",
                             name, d->threads[0], d->threads[1], d->threads[2], metalsim_kernel_threads(kernel));
    for (unsigned i = 0; i < METALSIM_BUFFERS; i++) {
        size_t length = d->threadgroup_lengths[i];
        if (length % 16)
            return metalsim_fail(METALSIM_REFUSED, "%s: threadgroup length %u is %zu; it must be a multiple of 16",
                                 name, i, length);
        if (length > METALSIM_THREADGROUP_MAX)
            return metalsim_fail(METALSIM_REFUSED, "%s: threadgroup length %u is %zu; it may be %d", name, i, length,
                                 METALSIM_THREADGROUP_MAX);
    }
    size_t bytes = metalsim_kernel_threadgroup_bytes(kernel, d->threadgroup_lengths);
    if (bytes > METALSIM_THREADGROUP_MAX)
        return metalsim_fail(METALSIM_REFUSED,
                             "%s: its arrays and arguments have %zu bytes of threadgroup memory; they may have %d",
                             name, bytes, METALSIM_THREADGROUP_MAX);
    for (int i = 0; i < 3; i++)
        if (d->threadgroups[i] > UINT32_MAX / d->threads[i])
            return metalsim_fail(METALSIM_REFUSED,
                                 "%s: %zu threadgroups of %zu threads; a grid has at most %u threads "
                                 "along a dimension",
                                 name, d->threadgroups[i], d->threads[i], UINT32_MAX);
    return METALSIM_OK;
}

static metalsim_status check_dispatch(const struct metalsim_kernel *kernel, const struct metalsim_dispatch *d)
{
    metalsim_status status = check_threadgroup(kernel, d);
    for (unsigned i = 0; status == METALSIM_OK && i < METALSIM_BUFFERS; i++)
        status = check_argument(kernel->entry->name, i, &d->buffers[i]);
    for (unsigned i = 0; status == METALSIM_OK && i < kernel->entry->parameter_count; i++)
        status = check_parameter(kernel->entry, &kernel->entry->parameters[i], d);
    return status;
}

/* --- Running -------------------------------------------------------------------------------------- */

/* A stretch of threadgroup memory: an argument, or an array that the kernel declares. */
struct local {
    const char *name; /* of an array */
    size_t length;    /* 0: there is none */
};

/* What the CPU threads of a dispatch share. */
struct run {
    const struct metalsim_kernel *kernel;
    const struct metalsim_dispatch *dispatch;
    void *buffers[METALSIM_BUFFERS];
    struct local locals[METALSIM_LOCALS];
    struct metalsim_check *check;       /* NULL: the library is not a checked one */
    void *threadgroup[METALSIM_LOCALS]; /* if checked: on one thread, so one of each */
    uint64_t count;                     /* threadgroups */
    atomic_uint_fast64_t next;
    atomic_int stopped;
    pthread_mutex_t lock; /* of findings */
    struct metalsim_findings findings;
    int out_of_memory;
};

static void find_locals(struct run *run)
{
    for (unsigned i = 0; i < run->kernel->entry->parameter_count; i++) {
        const struct metalsim_parameter *p = &run->kernel->entry->parameters[i];
        if (p->kind == METALSIM_THREADGROUP)
            run->locals[p->index].length = run->dispatch->threadgroup_lengths[p->index];
        else if (p->kind == METALSIM_ARRAY)
            run->locals[METALSIM_BUFFERS + p->index] = (struct local){p->name, p->bytes};
    }
}

static size_t room_of(const struct local *local)
{
    return local->length ? (local->length + UNIT - 1) / UNIT * UNIT + GUARD : 0;
}

/* Threadgroup memory of one CPU thread, each stretch between guards. */
static char *lay_out(const struct run *run, void *threadgroup[METALSIM_LOCALS], size_t *bytes)
{
    *bytes = GUARD;
    for (int i = 0; i < METALSIM_LOCALS; i++)
        *bytes += room_of(&run->locals[i]);
    *bytes = (*bytes + GUARD - 1) / GUARD * GUARD;
    char *memory = aligned_alloc(GUARD, *bytes), *at = memory + GUARD;
    for (int i = 0; memory && i < METALSIM_LOCALS; at += room_of(&run->locals[i++]))
        threadgroup[i] = at;
    return memory;
}

/* Bytes 0xff are NaNs in every type. */
static void forget(const struct run *run, void *const threadgroup[METALSIM_LOCALS])
{
    for (int i = 0; i < METALSIM_LOCALS; i++)
        if (run->locals[i].length)
            memset(threadgroup[i], 0xff, run->locals[i].length);
}

/* Were the guards before and after each stretch written to? */
static void look_at_guards(const struct run *run, void *const threadgroup[METALSIM_LOCALS],
                           struct metalsim_machine *machine)
{
    for (int i = 0; i < METALSIM_LOCALS; i++) {
        const struct local *local = &run->locals[i];
        if (!local->length)
            continue;
        const unsigned char *begin = threadgroup[i], *end = begin + local->length;
        for (int b = 0; b < GUARD; b++)
            if (end[b] != 0xa5 || begin[-1 - b] != 0xa5) {
                char name[METALSIM_REGION_NAME];
                const struct metalsim_region region = {METALSIM_REGION_THREADGROUP, (unsigned)i, local->name, 0, 0};
                metalsim_findings_add(&machine->findings, NULL, NULL,
                                      "out of bounds: something wrote to memory beside %s",
                                      metalsim_region_name(&region, name));
                machine->stopped = 1;
                return;
            }
    }
}

static struct metalsim_coord grid_coord(uint64_t number, const size_t count[3])
{
    return (struct metalsim_coord){(unsigned)(number % count[0]), (unsigned)(number / count[0] % count[1]),
                                   (unsigned)(number / count[0] / count[1])};
}

/* The threadgroup that comes as number i of all: the schedule may turn them round, or begin elsewhere. */
static uint64_t turn(const struct run *run, uint64_t i)
{
    const struct metalsim_dispatch *d = run->dispatch;
    if (d->schedule == METALSIM_REVERSED)
        return run->count - 1 - i;
    return d->schedule == METALSIM_SHUFFLED ? (i + d->seed % run->count) % run->count : i;
}

static void run_threadgroups(struct run *run, struct metalsim_machine *machine, void *const threadgroup[])
{
    const struct metalsim_dispatch *d = run->dispatch;
    uint64_t i;
    while (!atomic_load(&run->stopped) && (i = atomic_fetch_add(&run->next, 1)) < run->count) {
        uint64_t number = turn(run, i);
        machine->grid.position = grid_coord(number, d->threadgroups);
        forget(run, threadgroup);
        if (run->check)
            metalsim_check_threadgroup(run->check, (unsigned)number);
        metalsim_machine_run(machine, d->schedule, d->seed + number);
        if (!run->check)
            look_at_guards(run, threadgroup, machine);
        if (machine->stopped)
            atomic_store(&run->stopped, 1);
    }
}

/* A CPU thread's part: threadgroups until there are no more. */
static void *work(void *argument)
{
    struct run *run = argument;
    const struct metalsim_dispatch *d = run->dispatch;
    struct metalsim_machine *machine =
        metalsim_machine_borrow((unsigned)(d->threads[0] * d->threads[1] * d->threads[2]));
    void *own[METALSIM_LOCALS] = {0};
    size_t bytes;
    char *memory = lay_out(run, own, &bytes);
    if (machine && memory) {
        void *const *threadgroup = run->check ? run->threadgroup : own;
        memset(memory, 0xa5, bytes);
        machine->grid.threads =
            (struct metalsim_coord){(unsigned)d->threads[0], (unsigned)d->threads[1], (unsigned)d->threads[2]};
        machine->grid.threadgroups = (struct metalsim_coord){(unsigned)d->threadgroups[0], (unsigned)d->threadgroups[1],
                                                             (unsigned)d->threadgroups[2]};
        machine->entry = run->kernel->entry;
        machine->buffers = run->buffers;
        machine->threadgroup = threadgroup;
        const struct metalsim_object *object = run->kernel->library->object;
        if (run->check)
            metalsim_check_enter(run->check, machine, object->begin, object->end);
        run_threadgroups(run, machine, threadgroup);
        if (run->check)
            metalsim_check_leave();
    }
    pthread_mutex_lock(&run->lock);
    run->out_of_memory |= !machine || !memory;
    for (size_t i = 0; machine && i < machine->findings.count; i++) {
        const struct metalsim_finding *f = &machine->findings.list[i];
        metalsim_findings_add(&run->findings, f->site, f->other, "%s", f->text);
    }
    pthread_mutex_unlock(&run->lock);
    metalsim_machine_return(machine);
    free(memory);
    return NULL;
}

static int cpus(const struct run *run)
{
    cpu_set_t set;
    int wanted = run->dispatch->cpus;
    if (wanted <= 0)
        wanted = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    if (run->check || run->count < 2)
        wanted = 1;
    if (wanted > CPUS_MAX)
        wanted = CPUS_MAX;
    return run->count < (uint64_t)wanted ? (int)run->count : wanted;
}

static void run_all(struct run *run)
{
    pthread_t threads[CPUS_MAX];
    int started = 0;
    for (int wanted = cpus(run) - 1; started < wanted; started++)
        if (pthread_create(&threads[started], NULL, work, run))
            break;
    work(run);
    for (int i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
}

/* --- Memory of a checked run ---------------------------------------------------------------------- */

/* A checked kernel works on copies that lie far apart: nothing but a region's own bytes is near it. */
struct copies {
    struct metalsim_region regions[METALSIM_BUFFERS + METALSIM_LOCALS];
    const struct metalsim_argument *sources[METALSIM_BUFFERS]; /* of the device and constant regions */
    size_t count, sources_count;
    int of_buffer[METALSIM_BUFFERS]; /* the region of a buffer index */
};

static metalsim_status plan_copies(const struct run *run, struct copies *c)
{
    const struct metalsim_dispatch *d = run->dispatch;
    const char *kernel = run->kernel->entry->name;
    for (unsigned i = 0; i < METALSIM_BUFFERS; i++) {
        const struct metalsim_argument *a = &d->buffers[i];
        if (a->binding == METALSIM_NONE)
            continue;
        int buffer = a->binding == METALSIM_BUFFER_BINDING, same = -1;
        for (size_t r = 0; buffer && r < c->sources_count; r++) {
            const struct metalsim_argument *other = c->sources[r];
            if (other->binding != METALSIM_BUFFER_BINDING)
                continue;
            if (other->base == a->base && other->length == a->length)
                same = (int)r;
            else if ((const char *)a->base < (const char *)other->base + other->length &&
                     (const char *)other->base < (const char *)a->base + a->length)
                return metalsim_fail(METALSIM_REFUSED,
                                     "%s: the buffers at indices %u and %u overlap; a buffer that is bound twice has "
                                     "one base and one length",
                                     kernel, c->regions[r].index, i);
        }
        if (same < 0) {
            same = (int)c->count;
            c->sources[c->sources_count++] = a;
            c->regions[c->count++] =
                (struct metalsim_region){.kind = buffer ? METALSIM_REGION_DEVICE : METALSIM_REGION_CONSTANT,
                                         .index = i,
                                         .length = a->length,
                                         .unwritten = a->unwritten};
        }
        c->of_buffer[i] = same;
    }
    for (unsigned i = 0; i < METALSIM_LOCALS; i++)
        if (run->locals[i].length)
            c->regions[c->count++] = (struct metalsim_region){.kind = METALSIM_REGION_THREADGROUP,
                                                              .index = i,
                                                              .name = run->locals[i].name,
                                                              .length = run->locals[i].length};
    return METALSIM_OK;
}

static metalsim_status run_checked(struct run *run)
{
    const struct metalsim_dispatch *d = run->dispatch;
    struct copies c = {.count = 0};
    metalsim_status status = plan_copies(run, &c);
    if (status != METALSIM_OK)
        return status;
    run->check = metalsim_check_create(c.regions, c.count);
    if (!run->check)
        return metalsim_fail(METALSIM_REFUSED, "out of memory");
    for (size_t r = 0; r < c.sources_count; r++)
        memcpy(metalsim_check_memory(run->check, r), c.sources[r]->base, c.sources[r]->length);
    for (int i = 0; i < METALSIM_BUFFERS; i++)
        if (d->buffers[i].binding != METALSIM_NONE)
            run->buffers[i] = metalsim_check_memory(run->check, (size_t)c.of_buffer[i]) + d->buffers[i].offset;
    for (size_t r = c.sources_count; r < c.count; r++)
        run->threadgroup[c.regions[r].index] = metalsim_check_memory(run->check, r);
    run_all(run);
    for (size_t r = 0; r < c.sources_count; r++)
        if (metalsim_check_was_written(run->check, r)) /* others may lie in memory for reading only */
            memcpy((void *)c.sources[r]->base, metalsim_check_memory(run->check, r), c.sources[r]->length);
    metalsim_check_destroy(run->check);
    return METALSIM_OK;
}

metalsim_status metalsim_dispatch_run(const metalsim_kernel *kernel, const struct metalsim_dispatch *dispatch)
{
    metalsim_status status = check_dispatch(kernel, dispatch);
    if (status != METALSIM_OK)
        return status;
    struct run run = {.kernel = kernel, .dispatch = dispatch, .lock = PTHREAD_MUTEX_INITIALIZER};
    const size_t *groups = dispatch->threadgroups;
    run.count = (uint64_t)groups[0] * groups[1] * groups[2];
    if (!run.count)
        return METALSIM_OK;
    find_locals(&run);
    if (kernel->library->build & METALSIM_CHECKED) {
        status = run_checked(&run);
    } else {
        for (int i = 0; i < METALSIM_BUFFERS; i++)
            if (dispatch->buffers[i].binding != METALSIM_NONE)
                run.buffers[i] = (char *)dispatch->buffers[i].base + dispatch->buffers[i].offset;
        run_all(&run);
    }
    if (status == METALSIM_OK && run.out_of_memory)
        status = metalsim_fail(METALSIM_REFUSED, "out of memory");
    if (status == METALSIM_OK && run.findings.count)
        status = metalsim_report(kernel->library, kernel->entry->name, &run.findings);
    return status;
}
