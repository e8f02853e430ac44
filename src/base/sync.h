/* A lock that outlives fork(), the cancellation of threads, and the pause of a waiting loop. The lock is for
 * what happens seldom (a kernel is loaded); what it guards must be whole at every instant, since a child may
 * be forked off while a thread of its parent holds the lock. */
#ifndef MFA_BASE_SYNC_H
#define MFA_BASE_SYNC_H

#include <stdatomic.h>
#include <stdint.h>

struct mfa_lock {
    _Atomic uint32_t holder; /* the number of the process whose thread holds it; 0: none */
};

void mfa_lock_take(struct mfa_lock *lock);
void mfa_lock_release(struct mfa_lock *lock);

/* From hold to restore, which gets what hold gave, this thread is not cancelled. */
int mfa_cancellation_hold(void);
void mfa_cancellation_restore(int before);

/* Tells the CPU that this thread waits for another. */
static inline void mfa_sync_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* yield is a no-op on most cores */
#endif
}

#endif
