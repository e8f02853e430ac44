/* A lock that survives fork(), the cancellation of threads, and the pause of a waiting loop. The lock is for rare
 * events (a kernel is loaded). What it guards must be consistent at every instant, since fork() may happen while a
 * thread of the parent holds the lock. */
#ifndef MFA_BASE_SYNC_H
#define MFA_BASE_SYNC_H

#include <stdatomic.h>
#include <stdint.h>

struct mfa_lock {
    _Atomic uint32_t holder; /* the number of the process whose thread holds it; 0: none */
};

void mfa_lock_take(struct mfa_lock *lock);
void mfa_lock_release(struct mfa_lock *lock);

/* This thread is not cancelled between hold and restore, which takes what hold returned. */
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
