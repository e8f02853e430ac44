/* Guarded memory by mmap and mprotect, and a signal handler that reports which memory an access hit. */
#include "support/guarded.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "support/report.h"

enum { MAX_MEMORIES = 64, MAX_FREE = 64, MAX_FREE_SIZE = 1 << 22 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of what is known and what is closed */
static struct guarded known[MAX_MEMORIES];               /* a fault is looked up here; the handler only reads */
static const char *testing = "nothing yet";

size_t guarded_page(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static void protect(unsigned char *pages, size_t size, int protection)
{
    if (size && mprotect(pages, size, protection)) {
        perror("mprotect");
        exit(2);
    }
}

/* Mappings that are closed, and so forbidden, for the next memory of their size: their pages are there already. */
static struct {
    unsigned char *mapping;
    size_t mapped;
} closed[MAX_FREE];
static int next_closed;

static unsigned char *map(size_t mapped)
{
    const size_t page = guarded_page();
    unsigned char *mapping = NULL;
    for (int slot = 0; slot < MAX_FREE && !mapping; slot++)
        if (closed[slot].mapped == mapped) {
            mapping = closed[slot].mapping;
            closed[slot].mapped = 0;
        }
    if (!mapping)
        mapping = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    protect(mapping + page, mapped - 2 * page, PROT_READ | PROT_WRITE);
    return mapping;
}

static void unmap(unsigned char *mapping, size_t mapped)
{
    if (mapped > MAX_FREE_SIZE) {
        munmap(mapping, mapped);
        return;
    }
    protect(mapping, mapped, PROT_NONE);
    if (closed[next_closed].mapped)
        munmap(closed[next_closed].mapping, closed[next_closed].mapped);
    closed[next_closed].mapping = mapping;
    closed[next_closed].mapped = mapped;
    next_closed = (next_closed + 1) % MAX_FREE;
}

void guarded_open(struct guarded *memory, const char *name, size_t size, size_t alignment,
                  enum guarded_placement placement, unsigned char filler)
{
    size_t page = guarded_page(), inside = (size + page - 1) / page * page;
    memory->name = name;
    memory->size = size;
    memory->mapped = inside + 2 * page;
    size_t before = placement == GUARDED_END ? (inside - size) / alignment * alignment : 0;
    pthread_mutex_lock(&lock);
    memory->mapping = map(memory->mapped);
    memory->bytes = memory->mapping + page + before;
    for (int slot = 0; slot < MAX_MEMORIES; slot++)
        if (!known[slot].mapping) {
            known[slot] = *memory;
            break;
        }
    pthread_mutex_unlock(&lock);
    memset(memory->mapping + page, filler, inside);
}

void guarded_close(struct guarded *memory)
{
    pthread_mutex_lock(&lock);
    for (int slot = 0; slot < MAX_MEMORIES; slot++)
        if (memory->mapping && known[slot].mapping == memory->mapping)
            known[slot].mapping = NULL;
    if (memory->mapping)
        unmap(memory->mapping, memory->mapped);
    pthread_mutex_unlock(&lock);
    memory->mapping = NULL;
}

void guarded_seal(struct guarded *memory)
{
    protect(memory->mapping + guarded_page(), memory->mapped - 2 * guarded_page(), PROT_READ);
}

void guarded_unseal(struct guarded *memory)
{
    protect(memory->mapping + guarded_page(), memory->mapped - 2 * guarded_page(), PROT_READ | PROT_WRITE);
}

size_t guarded_forbid(struct guarded *memory, size_t begin, size_t end)
{
    uintptr_t page = guarded_page(), bytes = (uintptr_t)memory->bytes;
    uintptr_t first = (bytes + begin + page - 1) / page * page, last = (bytes + end) / page * page;
    if (last <= first)
        return 0;
    protect((unsigned char *)first, last - first, PROT_NONE);
    return (last - first) / page;
}

static void fault(int signal, siginfo_t *information, void *context)
{
    (void)context;
    const unsigned char *address = information->si_addr;
    const char *hit = "memory of no tensor";
    long long offset = 0;
    for (int slot = 0; slot < MAX_MEMORIES; slot++)
        if (known[slot].mapping && address >= known[slot].mapping &&
            address < known[slot].mapping + known[slot].mapped) {
            hit = known[slot].name;
            offset = address - known[slot].bytes;
        }
    /* snprintf of these is safe enough for a program that is about to end. */
    char text[512];
    int length =
        snprintf(text, sizeof text,
                 "FAILED  %s\n        signal %d at byte %lld of %s (beyond its end, read-only or forbidden), "
                 "seed %llu\n%lld passed, %lld failed\n",
                 testing, signal, offset, hit, (unsigned long long)report_seed(), report_passed(), report_failed() + 1);
    size_t bytes = length < (int)sizeof text ? (size_t)length : sizeof text - 1;
    fflush(stdout);
    _exit(write(STDOUT_FILENO, text, bytes) < 0 ? 2 : 1);
}

void guarded_report_faults(void)
{
    struct sigaction action = {0};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

void guarded_testing(const char *text)
{
    testing = text;
}
