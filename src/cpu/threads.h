/* The thread pool of the CPU backend: runs numbered tasks on its own workers, or on the host's. */
#ifndef MFA_CPU_THREADS_H
#define MFA_CPU_THREADS_H

#include <stdint.h>

#include "mfa.h"

typedef struct mfa_cpu_threads mfa_cpu_threads;

#define MFA_CPU_THREADS_MAX 4096 /* of a run, the caller included */

/* One task. `worker`, from 0 and below the count given to run, selects the scratch memory to use. */
typedef void (*mfa_cpu_task)(void *call, int64_t task, int worker);

/* `host` may be NULL: then the pool is the library's own. Workers are started by the first run that needs them.
 * MFA_OUT_OF_MEMORY. */
mfa_status mfa_cpu_threads_open(mfa_parallel_for host, mfa_cpu_threads **threads);
void mfa_cpu_threads_close(mfa_cpu_threads *threads);

/* The number of threads that this process may use at once, as affinity and cgroup quota allow; at least 1. */
int mfa_cpu_threads_available(void);

/* Runs task(call, t, worker) for each t in [0, tasks) on at most `workers` threads, the caller included, and returns
 * when all are done. Each worker takes the lowest task not yet taken, so a task may wait for a lower-numbered one of
 * the same run. Never fails: if no other thread is available (the pool is in use by another caller, the call comes from
 * within a task, no thread can be created) the caller runs all tasks. */
void mfa_cpu_threads_run(mfa_cpu_threads *threads, int workers, int64_t tasks, mfa_cpu_task task, void *call);

#endif
