/* The thread pool of the CPU backend: runs numbered tasks on its own workers, or on the host's. */
#ifndef MFA_CPU_THREADS_H
#define MFA_CPU_THREADS_H

#include <stdint.h>

#include "mfa.h"

typedef struct mfa_cpu_threads mfa_cpu_threads;

#define MFA_CPU_THREADS_MAX 4096 /* of a run, the caller among them */

/* One task. `worker` is below the count given to run: it names the scratch memory to use. */
typedef void (*mfa_cpu_task)(void *call, int64_t task, int worker);

/* `host` may be NULL. Workers are started by the first run that needs them. */
mfa_status mfa_cpu_threads_open(mfa_parallel_for host, mfa_cpu_threads **threads);
void mfa_cpu_threads_close(mfa_cpu_threads *threads);

/* As many threads as this process may use at once: affinity and cgroup quota counted. At least 1. */
int mfa_cpu_threads_available(void);

/* Runs task(call, t, worker) for each t in [0, tasks) on at most `workers` threads, the caller among
 * them, and returns when all are done. Each worker takes the lowest task not yet taken, so a task may
 * wait for a lower-numbered one of the same run. Never fails: with no other thread to be had (pool in use by
 * another caller, called from within a task, thread creation refused) the caller runs all by itself. */
void mfa_cpu_threads_run(mfa_cpu_threads *threads, int workers, int64_t tasks, mfa_cpu_task task, void *call);

#endif
