/* The number is kept in memory that a child loses: in a page that Linux (4.14 or later) wipes in the child, however
 * that was made; elsewhere in a variable that a handler of fork() clears. The page is never unmapped, since threads may
 * call while the program exits. The handler is safe in a program that has unloaded this library: glibc removes it, musl
 * never unloads a library, and macOS none with thread-local variables. */
#define _GNU_SOURCE
#include "base/process.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

typedef _Atomic uint32_t number; /* 0: none yet */

static number greatest; /* that was given out, by this process or those that it descends from */
static number cleared;  /* by forget() */
static _Atomic(number *) place;

static void forget(void)
{
    atomic_store(&cleared, 0);
}

/* A number that is wiped in a child; NULL: this system does not. Some emulators accept any advice and ignore it. */
static number *make_wiped(void)
{
#if defined(MADV_WIPEONFORK)
    const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return NULL;
    if (madvise(page, bytes, MADV_WIPEONFORK) == 0 && madvise(page, bytes, -1) != 0)
        return page;
    munmap(page, bytes);
#endif
    return NULL;
}

/* Two threads may choose at once: neither a spare page nor a second handler does harm. */
static number *choose_place(void)
{
    number *chosen = make_wiped(), *before = NULL;
    if (!chosen) {
        chosen = &cleared;
        if (pthread_atfork(NULL, NULL, forget) != 0) /* no memory: the next call tries again */
            return chosen;
    }
    return atomic_compare_exchange_strong(&place, &before, chosen) ? chosen : before;
}

uint32_t mfa_process_number(void)
{
    number *kept = atomic_load_explicit(&place, memory_order_acquire);
    if (!kept)
        kept = choose_place();
    uint32_t found = atomic_load_explicit(kept, memory_order_relaxed);
    if (found)
        return found;
    const uint32_t next = atomic_fetch_add(&greatest, 1) + 1;
    return atomic_compare_exchange_strong(kept, &found, next) ? next : found;
}
