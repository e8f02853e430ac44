/* The thread pool. Workers wait for a change of the run word, which holds the number of the run, the tickets that are
 * left and the workers that are active in it. A run publishes a ticket for each worker that it can use; a worker takes
 * one to join. The caller works too. When no task is left, it withdraws the tickets and waits for the active workers,
 * not for those that never joined. Nothing is shared between two runs, and a child process after fork() starts with a
 * pool of its own. */
#define _GNU_SOURCE
#include "cpu/threads.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/process.h"
#include "base/sync.h"
#include "cpu/float_mode.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#endif

#define SPIN_NANOSECONDS 30000  /* a wait of this length costs about as much as sleeping */
#define LATE_NANOSECONDS 300000 /* more than a host's pool takes to end a run, less than a scheduler's slice */
#define LATE_AGAIN 100000000    /* two late runs within this time are no accident */
#define OWN_MIN 100000000       /* for so long runs are on our own pool then, at first */
#define OWN_MAX 1600000000      /* and at most */
#define MAX_WORKERS (MFA_CPU_THREADS_MAX - 1) /* beside the caller */

/* The run word: 32 bits of run number, 16 of tickets left, 16 of active workers. */
#define RUN_SHIFT 32
#define TICKET_SHIFT 16
#define ACTIVE UINT64_C(0xffff)
#define TICKETS (ACTIVE << TICKET_SHIFT)

struct run {
    mfa_cpu_task task;
    void *call;
    int64_t tasks;
    mfa_cpu_float_mode mode;           /* of all threads in it, so that all compute alike */
    _Alignas(64) _Atomic int64_t next; /* the lowest task not yet taken */
};

struct pool {
    uint32_t process;    /* whose threads the workers are */
    struct pool *before; /* the parent process's pool: its memory is kept, its threads do not exist here */
    atomic_int busy;     /* a caller is using it */

    struct run *run;
    _Alignas(64) _Atomic uint64_t run_word;
    _Alignas(64) atomic_int sleepers; /* workers asleep, or about to be */
    atomic_int caller_sleeps, stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;

    pthread_t *workers;
    int started, capacity; /* running workers; length of the array */
};

/* A host's pool may wait for each of its threads before a run ends, although no task is left: OpenMP's does. Where the
 * threads of others keep the cores busy, such a thread comes a scheduler's slice late, some milliseconds, to a run that
 * takes a tenth of one. Our pool waits for nobody who has not begun. So a host that is late twice is left alone for a
 * time, which is doubled if it is late when it is tried again. */
struct lateness {
    _Atomic int64_t own_until; /* until then runs are on our own pool; 0: since no host was late */
    _Atomic int64_t own_for;   /* the length of that time */
    _Atomic int64_t last;      /* when the host was late last */
};

struct mfa_cpu_threads {
    mfa_parallel_for host;
    struct lateness lateness; /* of the host */
    _Atomic(struct pool *) pool;
};

static _Thread_local int within_task;

/* Takes tasks until there are none left. Restores the mode of the thread, which may be the host's. */
static void work(struct run *run, int worker)
{
    const int nested = within_task;
    const mfa_cpu_float_mode own = mfa_cpu_float_mode_get();
    within_task = 1;
    if (own != run->mode)
        mfa_cpu_float_mode_set(run->mode);
    for (;;) {
        const int64_t task = atomic_fetch_add_explicit(&run->next, 1, memory_order_relaxed);
        if (task >= run->tasks)
            break;
        run->task(run->call, task, worker);
    }
    if (own != run->mode)
        mfa_cpu_float_mode_set(own);
    within_task = nested;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Waits a little. Returns 0 when it is time to sleep; `*until` is initially 0. */
static int spin(int64_t *until)
{
    if (*until == 0)
        *until = now() + SPIN_NANOSECONDS;
    for (int i = 0; i < 8; i++)
        mfa_sync_pause();
    return now() < *until;
}

/* Whether a worker whose last run was number `seen` may join. */
static int may_join(uint64_t word, uint32_t seen)
{
    return (word & TICKETS) != 0 && (uint32_t)(word >> RUN_SHIFT) != seen;
}

static uint64_t sleep_for_run(struct pool *pool, uint32_t seen)
{
    uint64_t word;
    pthread_mutex_lock(&pool->mutex);
    /* Either the caller that publishes a run sees this, or the run is seen here. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (word = atomic_load(&pool->run_word), !may_join(word, seen) && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
    return word;
}

static uint64_t wait_for_run(struct pool *pool, uint32_t seen)
{
    int64_t until = 0;
    do {
        const uint64_t word = atomic_load_explicit(&pool->run_word, memory_order_relaxed);
        if (may_join(word, seen) || atomic_load_explicit(&pool->stop, memory_order_relaxed))
            return word;
    } while (spin(&until));
    return sleep_for_run(pool, seen);
}

static void *worker_main(void *argument)
{
    struct pool *pool = argument;
    for (uint32_t seen = 0;;) {
        uint64_t word = wait_for_run(pool, seen);
        if (atomic_load(&pool->stop))
            return NULL;
        const uint64_t joined = word - (UINT64_C(1) << TICKET_SHIFT) + 1;
        if (!atomic_compare_exchange_strong(&pool->run_word, &word, joined))
            continue;
        seen = (uint32_t)(word >> RUN_SHIFT);
        /* tickets are numbered from 1: the caller is worker 0 */
        work(pool->run, (int)((word & TICKETS) >> TICKET_SHIFT));
        if ((atomic_fetch_sub(&pool->run_word, 1) & ACTIVE) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static struct pool *make_pool(struct pool *before)
{
    struct pool *pool = aligned_alloc(_Alignof(struct pool), sizeof *pool);
    if (!pool)
        return NULL;
    memset(pool, 0, sizeof *pool);
    pool->process = mfa_process_number();
    pool->before = before;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    return pool;
}

static void free_pool(struct pool *pool)
{
    free(pool->workers);
    free(pool);
}

/* This process's pool; NULL: no memory for it. */
static struct pool *find_pool(mfa_cpu_threads *threads)
{
    struct pool *pool = atomic_load(&threads->pool);
    if (pool && pool->process == mfa_process_number())
        return pool;
    struct pool *made = make_pool(pool);
    if (!made || atomic_compare_exchange_strong(&threads->pool, &pool, made))
        return made;
    free_pool(made);
    return pool; /* another thread's, made meanwhile */
}

/* Signals to the process are handled by its own threads; only those that a fault raises are left to a worker. */
static void block_signals(sigset_t *before)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
    sigset_t blocked;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, before);
}

/* Starts workers until `wanted` are running. Returns how many of these are. */
static int start_workers(struct pool *pool, int wanted)
{
    if (wanted > MAX_WORKERS)
        wanted = MAX_WORKERS;
    if (pool->started >= wanted)
        return wanted;
    if (pool->capacity < wanted) {
        pthread_t *workers = realloc(pool->workers, (size_t)wanted * sizeof *workers);
        if (!workers)
            return pool->started;
        pool->workers = workers;
        pool->capacity = wanted;
    }
    sigset_t before;
    block_signals(&before);
    while (pool->started < wanted && pthread_create(&pool->workers[pool->started], NULL, worker_main, pool) == 0)
        pool->started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->started;
}

static void publish_run(struct pool *pool, struct run *run, int tickets)
{
    pool->run = run;
    const uint64_t number = (atomic_load(&pool->run_word) >> RUN_SHIFT) + 1;
    atomic_store(&pool->run_word, number << RUN_SHIFT | (uint64_t)tickets << TICKET_SHIFT);
    int asleep = atomic_load(&pool->sleepers);
    if (asleep == 0)
        return;
    if (asleep > tickets)
        asleep = tickets;
    pthread_mutex_lock(&pool->mutex);
    while (asleep-- > 0)
        pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static void finish_run(struct pool *pool)
{
    int64_t until = 0;
    atomic_fetch_and(&pool->run_word, ~TICKETS);
    while (atomic_load(&pool->run_word) & ACTIVE) {
        if (spin(&until))
            continue;
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->run_word) & ACTIVE)
            pthread_cond_wait(&pool->done, &pool->mutex);
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void run_on_pool(mfa_cpu_threads *threads, struct run *run, int workers)
{
    struct pool *pool = find_pool(threads);
    if (!pool || atomic_exchange(&pool->busy, 1)) {
        work(run, 0);
        return;
    }
    const int helpers = start_workers(pool, workers - 1);
    if (helpers > 0)
        publish_run(pool, run, helpers);
    work(run, 0);
    if (helpers > 0)
        finish_run(pool);
    atomic_store(&pool->busy, 0);
}

struct hosted {
    struct run *run;
    int workers;
    atomic_int joined;        /* workers so far */
    _Atomic int64_t finished; /* when a worker has found no task left, the last time */
};

/* Each index of the host's range is one of our workers. */
static void work_on_host(int64_t begin, int64_t end, void *argument)
{
    struct hosted *hosted = argument;
    for (int64_t i = begin; i < end; i++) {
        const int worker = atomic_fetch_add(&hosted->joined, 1);
        if (worker < hosted->workers && atomic_load(&hosted->run->next) < hosted->run->tasks) {
            work(hosted->run, worker);
            atomic_store(&hosted->finished, now());
        }
    }
}

static int is_left_alone(struct lateness *lateness)
{
    const int64_t until = atomic_load_explicit(&lateness->own_until, memory_order_relaxed);
    return until != 0 && now() < until;
}

/* Takes note of how late the host was at `time`, in nanoseconds, in a run that began at `begin`: one that was under way
 * when the host was left alone says nothing new. Callers at once may overwrite each other's notes. */
static void note_lateness(struct lateness *lateness, int64_t late, int64_t begin, int64_t time)
{
    const int64_t until = atomic_load(&lateness->own_until);
    if (begin < until)
        return;
    if (late < LATE_NANOSECONDS) {
        if (until)
            atomic_store(&lateness->own_until, 0);
        return;
    }
    const int64_t last = atomic_exchange(&lateness->last, time);
    if (!until && (last == 0 || time - last > LATE_AGAIN))
        return;
    const int64_t before = atomic_load(&lateness->own_for);
    const int64_t length = !until ? OWN_MIN : before < OWN_MAX ? 2 * before : OWN_MAX;
    atomic_store(&lateness->own_for, length);
    atomic_store(&lateness->own_until, time + length);
}

static void run_on_host(mfa_cpu_threads *threads, struct run *run, int workers)
{
    struct hosted hosted = {.run = run, .workers = workers};
    const int64_t begin = now();
    const int32_t status = threads->host(0, workers, 1, work_on_host, &hosted);
    const int64_t time = now(), finished = atomic_load(&hosted.finished);
    work_on_host(0, 1, &hosted); /* what the host has left: nothing, unless it failed */
    if (status == 0 && finished)
        note_lateness(&threads->lateness, time - finished, begin, time);
}

void mfa_cpu_threads_run(mfa_cpu_threads *threads, int workers, int64_t tasks, mfa_cpu_task task, void *call)
{
    struct run run = {.task = task, .call = call, .tasks = tasks, .next = 0};
    run.mode = mfa_cpu_float_mode_of_run(mfa_cpu_float_mode_get());
    if (workers > tasks)
        workers = (int)tasks;
    if (workers <= 1 || within_task)
        work(&run, 0);
    else if (threads->host && !is_left_alone(&threads->lateness))
        run_on_host(threads, &run, workers);
    else
        run_on_pool(threads, &run, workers);
}

mfa_status mfa_cpu_threads_open(mfa_parallel_for host, mfa_cpu_threads **threads)
{
    mfa_cpu_threads *made = calloc(1, sizeof *made);
    if (!made)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a thread pool");
    made->host = host;
    *threads = made;
    return MFA_OK;
}

static void stop_workers(struct pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
}

void mfa_cpu_threads_close(mfa_cpu_threads *threads)
{
    struct pool *pool = atomic_load(&threads->pool);
    while (pool) {
        struct pool *before = pool->before;
        if (pool->process == mfa_process_number())
            stop_workers(pool);
        free_pool(pool);
        pool = before;
    }
    free(threads);
}

#if defined(__APPLE__)
static int count_processors(void)
{
    int count = 0;
    size_t size = sizeof count;
    /* The performance cores only: the others would delay the end of each run. */
    if (sysctlbyname("hw.perflevel0.physicalcpu", &count, &size, NULL, 0) == 0 && count > 0)
        return count;
    size = sizeof count;
    return sysctlbyname("hw.ncpu", &count, &size, NULL, 0) == 0 ? count : 1;
}
#else
static int count_processors(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}
#endif

#if defined(__linux__)
/* Reads at most two numbers from a file of a control group. Returns how many there are. */
static int read_numbers(const char *folder, const char *name, long long numbers[2])
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return 0;
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    const int count = fscanf(file, "%lld %lld", &numbers[0], &numbers[1]);
    fclose(file);
    return count;
}

/* Processors that a control group may use, rounded up; INT_MAX: it sets no limit. */
static int read_quota(const char *folder)
{
    long long time[2], period[2]; /* microseconds in each period; and its length */
    if (read_numbers(folder, "cpu.max", time) == 2)
        period[0] = time[1]; /* version 2; "max" is no number */
    else if (read_numbers(folder, "cpu.cfs_quota_us", time) < 1 ||
             read_numbers(folder, "cpu.cfs_period_us", period) < 1)
        return INT_MAX;
    if (time[0] <= 0 || period[0] <= 0)
        return INT_MAX;
    const long long processors = (time[0] - 1) / period[0] + 1;
    return processors < INT_MAX ? (int)processors : INT_MAX;
}

/* The least quota of the group at root + path and all above it. In a container, the path may be that
 * of the host: then only the root is there. */
static int least_quota(const char *root, const char *path)
{
    char folder[PATH_MAX];
    const int root_length = (int)strlen(root);
    int length = snprintf(folder, sizeof folder, "%s%s", root, path);
    if (length >= (int)sizeof folder)
        return read_quota(root);
    int least = read_quota(folder);
    while (length > root_length) {
        do
            length--;
        while (length > root_length && folder[length] != '/');
        folder[length] = '\0';
        const int quota = read_quota(folder);
        least = quota < least ? quota : least;
    }
    return least;
}

/* Whether a list such as "cpu,cpuacct" names "cpu". */
static int names_cpu(const char *controllers)
{
    for (const char *at = controllers; (at = strstr(at, "cpu")) != NULL; at += 3)
        if ((at == controllers || at[-1] == ',') && (at[3] == '\0' || at[3] == ','))
            return 1;
    return 0;
}

static int count_quota(void)
{
    int least = INT_MAX;
    char line[PATH_MAX];
    FILE *file = fopen("/proc/self/cgroup", "re");
    while (file && fgets(line, sizeof line, file)) { /* <number>:<controllers>:<path> */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        int quota = INT_MAX;
        if (!*++controllers)
            quota = least_quota("/sys/fs/cgroup", path);
        else if (names_cpu(controllers))
            quota = least_quota("/sys/fs/cgroup/cpu", path);
        least = quota < least ? quota : least;
    }
    if (file)
        fclose(file);
    return least;
}
#else
static int count_quota(void)
{
    return INT_MAX;
}
#endif

int mfa_cpu_threads_available(void)
{
    const int processors = count_processors(), quota = count_quota();
    const int count = quota < processors ? quota : processors;
    return count > 1 ? count : 1;
}
