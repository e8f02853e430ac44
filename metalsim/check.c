/* Shadow memory: for every stretch of `unit` bytes, its last write, and who has read it since. Two
 * accesses, one of them a write, are in order if the same thread made them; or threads of one
 * threadgroup, with a threadgroup_barrier for that memory between them; or of one simdgroup, with a
 * simdgroup_barrier for that memory between them. Nothing orders threadgroups. Since barriers are all
 * that orders, and are passed by all or none, it is enough to remember counts of barriers passed, and
 * what is found does not depend on the schedule. */
#define _GNU_SOURCE
#include "check.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define SLOT_BITS 34 /* a region has 16 GiB of addresses to itself and begins in their middle */
#define SLOT ((uintptr_t)1 << SLOT_BITS)

enum { OTHER_THREAD = 1, OTHER_TEAM = 2, OTHER_GROUP = 4 };

/* Who touched it last, and when, in barriers passed. Of several that are not in order, `others` tells
 * how far apart they are: that is all one needs to know to see whether yet another is in order with them. */
struct touch {
    uint32_t group, epoch, team_epoch; /* the threadgroup; barriers of it and of the simdgroup */
    uint32_t site;                     /* offset in the library; 0: nobody touched it */
    uint16_t thread;
    uint16_t others;
};

struct cell {
    struct touch write, read, atomic;
    uint32_t owner; /* threadgroup memory: what other threadgroups did is forgotten */
    uint32_t written;
};

struct region {
    struct metalsim_region what;
    char *memory;
    struct cell *cells;
    size_t unit; /* bytes of a cell: 4, or fewer as soon as an access is not of whole cells */
    int was_written;
};

struct metalsim_check {
    char *space; /* the addresses of all slots */
    size_t count;
    struct region *regions;
    struct metalsim_machine *machine;
    const char *begin, *end; /* of the library */
    uint32_t group;
};

static _Thread_local struct metalsim_check *current;

/* --- Regions -------------------------------------------------------------------------------------- */

static struct cell *make_cells(size_t length, size_t unit)
{
    return calloc(length / unit + 1, sizeof(struct cell)); /* untouched pages cost nothing */
}

static int make_region(struct metalsim_check *check, struct region *region, const struct metalsim_region *what)
{
    region->what = *what;
    region->unit = 4;
    region->memory = check->space + (size_t)(region - check->regions) * SLOT + SLOT / 2;
    region->cells = make_cells(what->length, region->unit);
    return region->cells && what->length < SLOT / 2 &&
           !mprotect(region->memory, what->length + 1, PROT_READ | PROT_WRITE);
}

struct metalsim_check *metalsim_check_create(const struct metalsim_region *regions, size_t count)
{
    struct metalsim_check *check = calloc(1, sizeof *check);
    if (!check)
        return NULL;
    void *space = mmap(NULL, (count + 1) * SLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check->space = space == MAP_FAILED ? NULL : space;
    check->count = count;
    check->regions = calloc(count + 1, sizeof *check->regions);
    int fine = check->space && check->regions;
    for (size_t i = 0; fine && i < count; i++)
        fine = make_region(check, &check->regions[i], &regions[i]);
    if (fine)
        return check;
    metalsim_check_destroy(check);
    return NULL;
}

void metalsim_check_destroy(struct metalsim_check *check)
{
    if (check->space)
        munmap(check->space, (check->count + 1) * SLOT);
    for (size_t i = 0; check->regions && i < check->count; i++)
        free(check->regions[i].cells);
    free(check->regions);
    free(check);
}

char *metalsim_check_memory(const struct metalsim_check *check, size_t i)
{
    return check->regions[i].memory;
}

int metalsim_check_was_written(const struct metalsim_check *check, size_t i)
{
    return check->regions[i].was_written;
}

void metalsim_check_enter(struct metalsim_check *check, struct metalsim_machine *machine, const void *begin,
                          const void *end)
{
    check->machine = machine;
    check->begin = begin;
    check->end = end;
    current = check;
}

void metalsim_check_leave(void)
{
    current = NULL;
}

void metalsim_check_threadgroup(struct metalsim_check *check, unsigned number)
{
    check->group = number;
}

/* Smaller cells, each with what was known of the larger one. */
static void refine(struct region *region, size_t unit)
{
    struct cell *cells = make_cells(region->what.length, unit);
    if (!cells)
        abort(); /* in the midst of a kernel there is nobody to tell */
    size_t ratio = region->unit / unit;
    for (size_t i = 0; i < region->what.length / unit + 1; i++)
        cells[i] = region->cells[i / ratio];
    free(region->cells);
    region->cells = cells;
    region->unit = unit;
}

/* --- Findings ------------------------------------------------------------------------------------- */

const char *metalsim_region_name(const struct metalsim_region *region, char name[METALSIM_REGION_NAME])
{
    static const char *const kinds[] = {"buffer", "threadgroup argument", "bytes at index"};
    if (region->name)
        snprintf(name, METALSIM_REGION_NAME, "threadgroup array %s", region->name);
    else
        snprintf(name, METALSIM_REGION_NAME, "%s %u", kinds[region->kind], region->index);
    return name;
}

static const char *const memory_names[] = {"mem_device", "mem_threadgroup", "mem_device"};

struct access {
    struct region *region;
    size_t offset;
    const char *verb;
    const void *site;
    struct touch touch;
};

static void find_race(const struct access *a, size_t offset, const struct touch *earlier, const char *verb)
{
    const struct metalsim_region *what = &a->region->what;
    const void *other = current->begin + earlier->site;
    char name[METALSIM_REGION_NAME];
    int apart = earlier->group != a->touch.group || earlier->others & OTHER_GROUP;
    metalsim_findings_add(&current->machine->findings, a->site, other,
                          "race at byte %zu of %s: %s by thread %u of threadgroup %u, after %s by thread %u of "
                          "threadgroup %u; %s%s",
                          offset, metalsim_region_name(what, name), a->verb, a->touch.thread, a->touch.group, verb,
                          earlier->thread, earlier->group,
                          apart ? "nothing orders threadgroups" : "no barrier between them has ",
                          apart ? "" : memory_names[what->kind]);
}

static void find_unwritten(const struct access *a, size_t offset)
{
    char name[METALSIM_REGION_NAME];
    metalsim_findings_add(&current->machine->findings, a->site, NULL,
                          "unwritten: thread %u of threadgroup %u reads byte %zu of %s, which nothing has written",
                          a->touch.thread, a->touch.group, offset, metalsim_region_name(&a->region->what, name));
}

/* An access that no region has. What it would do is anybody's guess, so the kernel ends here. */
_Noreturn static void find_out_of_bounds(const struct metalsim_lane *lane, const char *address, size_t bytes,
                                         const char *verb, const void *site)
{
    struct metalsim_findings *findings = &current->machine->findings;
    uintptr_t at = (uintptr_t)address - (uintptr_t)current->space;
    if (at >> SLOT_BITS < current->count) {
        const struct region *near = &current->regions[at >> SLOT_BITS];
        char name[METALSIM_REGION_NAME];
        metalsim_findings_add(findings, site, NULL,
                              "out of bounds: %s of %zu bytes at byte %lld of %s, which has %zu, by thread %u of "
                              "threadgroup %u",
                              verb, bytes, (long long)(address - near->memory), metalsim_region_name(&near->what, name),
                              near->what.length, lane->index, current->group);
    } else {
        metalsim_findings_add(findings, site, NULL,
                              "out of bounds: %s of %zu bytes at an address of no buffer, by thread %u of "
                              "threadgroup %u",
                              verb, bytes, lane->index, current->group);
    }
    metalsim_machine_stop(current->machine);
}

/* --- Order ---------------------------------------------------------------------------------------- */

static unsigned team_of(const struct touch *touch)
{
    return touch->thread / METALSIM_SIMD_WIDTH;
}

/* Is somebody of `earlier` not in order with `now`? */
static int unordered(const struct touch *earlier, const struct touch *now)
{
    if (!earlier->site)
        return 0;
    if (earlier->group != now->group || earlier->others & OTHER_GROUP)
        return 1;
    if (earlier->epoch != now->epoch)
        return 0;
    if (team_of(earlier) != team_of(now) || earlier->others & OTHER_TEAM)
        return 1;
    if (earlier->team_epoch != now->team_epoch)
        return 0;
    return earlier->thread != now->thread || earlier->others & OTHER_THREAD;
}

/* Adds `now` to those who touched it. Of what is in order with it, nothing needs to be kept. */
static void add_touch(struct touch *touch, const struct touch *now)
{
    uint16_t others = touch->others;
    if (!touch->site)
        others = 0;
    else if (touch->group != now->group)
        others = OTHER_GROUP;
    else if (touch->epoch != now->epoch)
        others &= OTHER_GROUP;
    else if (team_of(touch) != team_of(now))
        others |= OTHER_TEAM;
    else if (touch->team_epoch != now->team_epoch)
        others &= OTHER_GROUP | OTHER_TEAM;
    else if (touch->thread != now->thread)
        others |= OTHER_THREAD;
    *touch = *now;
    touch->others = others;
}

/* --- Accesses ------------------------------------------------------------------------------------- */

/* Fills in the access; 0: it is nobody else's business. */
static int look_up(struct access *a, const void *address, size_t bytes, const char *verb, const void *site)
{
    const struct metalsim_lane *lane = metalsim_self();
    const char *at = address;
    if (((uintptr_t)at | (METALSIM_STACK - 1)) == ((uintptr_t)lane | (METALSIM_STACK - 1)))
        return 0; /* the lane's own stack */
    uintptr_t slot = ((uintptr_t)at - (uintptr_t)current->space) >> SLOT_BITS;
    if (slot >= current->count) {
        if (at >= current->begin && at + bytes <= current->end)
            return 0; /* constants of the program */
        find_out_of_bounds(lane, at, bytes, verb, site);
    }
    struct region *region = &current->regions[slot];
    size_t offset = (size_t)(at - region->memory);
    if (at < region->memory || offset + bytes > region->what.length)
        find_out_of_bounds(lane, at, bytes, verb, site);
    if (offset % region->unit || bytes % region->unit)
        refine(region, offset % 2 || bytes % 2 ? 1 : 2);
    int local = region->what.kind == METALSIM_REGION_THREADGROUP;
    const struct metalsim_team *team = metalsim_lane_team(lane);
    a->region = region;
    a->offset = offset;
    a->verb = verb;
    a->site = site;
    a->touch = (struct touch){
        .group = current->group,
        .epoch = team->machine->epochs.passed[local],
        .team_epoch = team->epochs.passed[local],
        .site = (uint32_t)((const char *)site - current->begin),
        .thread = (uint16_t)lane->index,
    };
    return 1;
}

static struct cell *cell_at(const struct access *a, size_t offset)
{
    struct cell *cell = &a->region->cells[offset / a->region->unit];
    if (a->region->what.kind == METALSIM_REGION_THREADGROUP && cell->owner != a->touch.group + 1) {
        memset(cell, 0, sizeof *cell);
        cell->owner = a->touch.group + 1;
    }
    return cell;
}

static int never_written(const struct access *a, const struct cell *cell)
{
    return !cell->written && (a->region->what.kind == METALSIM_REGION_THREADGROUP || a->region->what.unwritten);
}

void metalsim_check_read(const void *address, unsigned long bytes, const void *site)
{
    struct access a;
    if (!look_up(&a, address, bytes, "read", site))
        return;
    for (size_t offset = a.offset; offset < a.offset + bytes; offset += a.region->unit) {
        struct cell *cell = cell_at(&a, offset);
        if (never_written(&a, cell))
            find_unwritten(&a, offset);
        if (unordered(&cell->write, &a.touch))
            find_race(&a, offset, &cell->write, "a write");
        if (unordered(&cell->atomic, &a.touch))
            find_race(&a, offset, &cell->atomic, "an atomic access");
        add_touch(&cell->read, &a.touch);
    }
}

void metalsim_check_write(const void *address, unsigned long bytes, const void *site)
{
    struct access a;
    if (!look_up(&a, address, bytes, "write", site))
        return;
    a.region->was_written = 1;
    for (size_t offset = a.offset; offset < a.offset + bytes; offset += a.region->unit) {
        struct cell *cell = cell_at(&a, offset);
        if (unordered(&cell->write, &a.touch))
            find_race(&a, offset, &cell->write, "a write");
        if (unordered(&cell->read, &a.touch))
            find_race(&a, offset, &cell->read, "a read");
        if (unordered(&cell->atomic, &a.touch))
            find_race(&a, offset, &cell->atomic, "an atomic access");
        cell->write = a.touch;
        cell->read.site = cell->atomic.site = 0;
        cell->written = 1;
    }
}

void metalsim_check_atomic(const void *address, unsigned long bytes, const void *site)
{
    struct access a;
    if (!look_up(&a, address, bytes, "atomic access", site))
        return;
    a.region->was_written = 1;
    for (size_t offset = a.offset; offset < a.offset + bytes; offset += a.region->unit) {
        struct cell *cell = cell_at(&a, offset);
        if (unordered(&cell->write, &a.touch))
            find_race(&a, offset, &cell->write, "a write");
        if (unordered(&cell->read, &a.touch))
            find_race(&a, offset, &cell->read, "a read");
        add_touch(&cell->atomic, &a.touch);
        cell->written = 1;
    }
}

/* What comes after is anybody's guess, too. */
void metalsim_check_undefined(const char *what, const void *site)
{
    const struct metalsim_lane *lane = metalsim_self();
    const struct metalsim_team *team = metalsim_lane_team(lane);
    metalsim_findings_add(&team->machine->findings, site ? site : team->site, NULL, "undefined: %s (thread %u)", what,
                          lane->index);
    metalsim_machine_stop(team->machine);
}
