/* The lock's holder is a process, not a thread: a child that finds its parent's number there knows that the holding
 * thread does not exist in the child, and takes the lock over. */
#define _GNU_SOURCE
#include "base/sync.h"

#include <pthread.h>
#include <time.h>

#include "base/process.h"

void mfa_lock_take(struct mfa_lock *lock)
{
    const uint32_t self = mfa_process_number();
    const struct timespec while_held = {0, 50000};
    for (;;) {
        uint32_t holder = atomic_load_explicit(&lock->holder, memory_order_relaxed);
        if (holder == self)
            nanosleep(&while_held, NULL);
        else if (atomic_compare_exchange_weak_explicit(&lock->holder, &holder, self, memory_order_acquire,
                                                       memory_order_relaxed))
            return;
    }
}

void mfa_lock_release(struct mfa_lock *lock)
{
    atomic_store_explicit(&lock->holder, 0, memory_order_release);
}

int mfa_cancellation_hold(void)
{
    int before = PTHREAD_CANCEL_ENABLE;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
    return before;
}

void mfa_cancellation_restore(int before)
{
    pthread_setcancelstate(before, NULL);
}
