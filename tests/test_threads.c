/* The thread pool: every task is run once, tasks are taken in ascending order, by workers whose numbers are unique and
 * in range, whatever else happens at the same time. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cpu/threads.h"

#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif

/* In a PID namespace a child may have the number that its parent has in another. */
pid_t getpid(void)
{
    return 7;
}

#define TASKS_MAX 4096
#define WORKERS_MAX 16

struct record {
    atomic_int runs[TASKS_MAX];
    atomic_int busy[WORKERS_MAX]; /* a worker number is never in use twice at once */
    int64_t last[WORKERS_MAX];    /* each worker's tasks ascend */
    int workers;
    atomic_int wrong;
};

static void begin(struct record *record, int workers)
{
    memset(record, 0, sizeof *record);
    record->workers = workers;
    for (int i = 0; i < WORKERS_MAX; i++)
        record->last[i] = -1;
}

static void note(void *call, int64_t task, int worker)
{
    struct record *record = call;
    if (worker < 0 || worker >= record->workers || atomic_exchange(&record->busy[worker], 1)) {
        atomic_fetch_add(&record->wrong, 1);
        return;
    }
    if (task <= record->last[worker])
        atomic_fetch_add(&record->wrong, 1);
    record->last[worker] = task;
    atomic_fetch_add(&record->runs[task], 1);
    atomic_store(&record->busy[worker], 0);
}

static void check(const struct record *record, int64_t tasks)
{
    assert_int_equal(atomic_load(&record->wrong), 0);
    for (int64_t i = 0; i < TASKS_MAX; i++)
        assert_int_equal(atomic_load(&record->runs[i]), i < tasks);
}

static mfa_cpu_threads *open_threads(mfa_parallel_for host)
{
    mfa_cpu_threads *threads = NULL;
    assert_int_equal(mfa_cpu_threads_open(host, &threads), MFA_OK);
    return threads;
}

static void run_all(mfa_cpu_threads *threads)
{
    static const int workers[] = {1, 2, 3, 7};
    static const int64_t tasks[] = {0, 1, 2, 3, 5, 64, TASKS_MAX};
    static struct record record;
    for (int repeat = 0; repeat < 20; repeat++)
        for (size_t w = 0; w < sizeof workers / sizeof *workers; w++)
            for (size_t t = 0; t < sizeof tasks / sizeof *tasks; t++) {
                begin(&record, workers[w]);
                mfa_cpu_threads_run(threads, workers[w], tasks[t], note, &record);
                check(&record, tasks[t]);
            }
}

static void test_every_task_once(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    run_all(threads);
    mfa_cpu_threads_close(threads);
}

static void test_after_sleep(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    const struct timespec pause = {0, 2000000}; /* much longer than workers spin */
    static struct record record;
    for (int repeat = 0; repeat < 20; repeat++) {
        begin(&record, 3);
        mfa_cpu_threads_run(threads, 3, 100, note, &record);
        check(&record, 100);
        nanosleep(&pause, NULL);
    }
    mfa_cpu_threads_close(threads);
}

static void test_open_and_close(void **state)
{
    (void)state;
    for (int repeat = 0; repeat < 20; repeat++) {
        mfa_cpu_threads *threads = open_threads(NULL);
        static struct record record;
        begin(&record, 4);
        if (repeat % 2)
            mfa_cpu_threads_run(threads, 4, 10, note, &record);
        check(&record, repeat % 2 ? 10 : 0);
        mfa_cpu_threads_close(threads);
    }
}

/* Each task waits for the one before it: this ends only if tasks are taken in ascending order, and every worker runs
 * the task that it has taken. */
static void wait_for_lower(void *call, int64_t task, int worker)
{
    (void)worker;
    _Atomic int64_t *done = call;
    while (atomic_load(done) != task)
        sched_yield();
    atomic_store(done, task + 1);
}

static void wait_in(mfa_cpu_threads *threads)
{
    static const int workers[] = {1, 2, 3, 7};
    for (int repeat = 0; repeat < 10; repeat++)
        for (size_t w = 0; w < sizeof workers / sizeof *workers; w++) {
            _Atomic int64_t done = 0;
            mfa_cpu_threads_run(threads, workers[w], 200, wait_for_lower, &done);
            assert_int_equal(atomic_load(&done), 200);
        }
}

static void test_waits_on_lower_tasks(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    wait_in(threads);
    mfa_cpu_threads_close(threads);
}

/* Two tasks that wait for each other: passes only if two threads run at the same time. */
static void meet(void *call, int64_t task, int worker)
{
    (void)task;
    (void)worker;
    atomic_int *arrived = call;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < 2)
        sched_yield();
}

static void test_threads_run_at_once(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    for (int repeat = 0; repeat < 20; repeat++) {
        atomic_int arrived = 0;
        mfa_cpu_threads_run(threads, 2, 2, meet, &arrived);
        assert_int_equal(atomic_load(&arrived), 2);
    }
    mfa_cpu_threads_close(threads);
}

struct outer {
    mfa_cpu_threads *threads;
    atomic_int wrong, inner_tasks;
};

struct inner {
    pthread_t thread;
    struct outer *outer;
    int64_t next;
};

static void inner_task(void *call, int64_t task, int worker)
{
    struct inner *inner = call;
    if (worker != 0 || task != inner->next++ || !pthread_equal(pthread_self(), inner->thread))
        atomic_fetch_add(&inner->outer->wrong, 1);
    atomic_fetch_add(&inner->outer->inner_tasks, 1);
}

static void outer_task(void *call, int64_t task, int worker)
{
    (void)task;
    (void)worker;
    struct outer *outer = call;
    struct inner inner = {pthread_self(), outer, 0};
    mfa_cpu_threads_run(outer->threads, 4, 10, inner_task, &inner);
}

static void test_nested_is_serial(void **state)
{
    (void)state;
    static const int workers[] = {1, 3};
    mfa_cpu_threads *threads = open_threads(NULL);
    for (int i = 0; i < 2; i++) {
        struct outer outer = {threads, 0, 0};
        mfa_cpu_threads_run(threads, workers[i], 50, outer_task, &outer);
        assert_int_equal(atomic_load(&outer.wrong), 0);
        assert_int_equal(atomic_load(&outer.inner_tasks), 500);
    }
    mfa_cpu_threads_close(threads);
}

struct caller {
    mfa_cpu_threads *threads;
    int wrong;
};

static void *call_often(void *argument)
{
    struct caller *caller = argument;
    struct record *record = malloc(sizeof *record);
    for (int repeat = 0; repeat < 50; repeat++) {
        begin(record, 3);
        mfa_cpu_threads_run(caller->threads, 3, 200, note, record);
        caller->wrong += atomic_load(&record->wrong);
        for (int i = 0; i < TASKS_MAX; i++)
            caller->wrong += atomic_load(&record->runs[i]) != (i < 200);
    }
    free(record);
    return NULL;
}

static void call_from_many(mfa_cpu_threads *threads)
{
    enum { CALLERS = 4 };
    pthread_t callers[CALLERS];
    struct caller calls[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        calls[i] = (struct caller){threads, 0};
        assert_int_equal(pthread_create(&callers[i], NULL, call_often, &calls[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(callers[i], NULL);
        assert_int_equal(calls[i].wrong, 0);
    }
}

static void test_concurrent_callers(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    call_from_many(threads);
    mfa_cpu_threads_close(threads);
}

struct held {
    mfa_cpu_threads *threads;
    atomic_int running, release;
};

static void hold(void *call, int64_t task, int worker)
{
    (void)task;
    (void)worker;
    struct held *held = call;
    atomic_fetch_add(&held->running, 1);
    while (!atomic_load(&held->release))
        sched_yield();
}

static void *hold_pool(void *argument)
{
    struct held *held = argument;
    mfa_cpu_threads_run(held->threads, 2, 2, hold, held);
    return NULL;
}

static pthread_t hold_in_thread(struct held *held)
{
    pthread_t holder;
    assert_int_equal(pthread_create(&holder, NULL, hold_pool, held), 0);
    while (atomic_load(&held->running) < 2)
        sched_yield();
    return holder;
}

static void release(struct held *held, pthread_t holder)
{
    atomic_store(&held->release, 1);
    pthread_join(holder, NULL);
}

/* Gives other threads time to join, if any were woken. */
static void slow_inner_task(void *call, int64_t task, int worker)
{
    const struct timespec pause = {0, 500000};
    nanosleep(&pause, NULL);
    inner_task(call, task, worker);
}

static void test_pool_in_use(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    struct held held = {threads, 0, 0};
    const pthread_t holder = hold_in_thread(&held);
    struct outer outer = {threads, 0, 0};
    struct inner inner = {pthread_self(), &outer, 0};
    alarm(30); /* a deadlock ends here */
    mfa_cpu_threads_run(threads, 3, 50, slow_inner_task, &inner);
    alarm(0);
    assert_int_equal(atomic_load(&outer.wrong), 0);
    assert_int_equal(atomic_load(&outer.inner_tasks), 50);
    release(&held, holder);
    mfa_cpu_threads_close(threads);
}

/* Runs in a child, which may not assert: returns 0 if all is well. */
static int run_child(mfa_cpu_threads *threads)
{
    alarm(30); /* a deadlock ends here */
    atomic_int arrived = 0;
    mfa_cpu_threads_run(threads, 2, 2, meet, &arrived);
    struct caller caller = {threads, 0};
    call_often(&caller);
    mfa_cpu_threads_close(threads);
    return caller.wrong != 0 || atomic_load(&arrived) != 2;
}

static void expect_good_child(mfa_cpu_threads *threads)
{
    const pid_t process = fork();
    assert_true(process >= 0);
    if (process == 0)
        _exit(run_child(threads));
    int status = -1;
    assert_int_equal(waitpid(process, &status, 0), process);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void test_forked_child(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(NULL);
    expect_good_child(threads); /* before the first run */
    run_all(threads);
#if defined(THREAD_SANITIZER)
    print_message("           children of a process with threads: not run, ThreadSanitizer cannot\n");
#else
    expect_good_child(threads); /* workers idle */

    struct held held = {threads, 0, 0}; /* another thread within a run */
    const pthread_t holder = hold_in_thread(&held);
    expect_good_child(threads);
    release(&held, holder);
#endif
    run_all(threads); /* the parent's pool still works */
    mfa_cpu_threads_close(threads);
}

/* A host's pool: a thread for each range. */
struct range {
    int64_t begin, end;
    void (*worker)(int64_t begin, int64_t end, void *argument);
    void *argument;
};

static void *run_range(void *argument)
{
    const struct range *range = argument;
    range->worker(range->begin, range->end, range->argument);
    return NULL;
}

static int32_t threaded_host(int64_t begin, int64_t end, int64_t grain,
                             void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    struct range ranges[WORKERS_MAX];
    pthread_t threads[WORKERS_MAX];
    int count = 0;
    for (int64_t i = begin; i < end; i += grain, count++) {
        ranges[count] = (struct range){i, i + grain < end ? i + grain : end, worker, argument};
        if (pthread_create(&threads[count], NULL, run_range, &ranges[count]) != 0)
            abort();
    }
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    return 0;
}

static int32_t serial_host(int64_t begin, int64_t end, int64_t grain,
                           void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    (void)grain;
    worker(begin, end, argument);
    return 0;
}

static int host_calls;

static int32_t counting_host(int64_t begin, int64_t end, int64_t grain,
                             void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    host_calls++;
    return serial_host(begin, end, grain, worker, argument);
}

static void test_nested_spares_the_host(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(counting_host);
    struct outer outer = {threads, 0, 0};
    mfa_cpu_threads_run(threads, 3, 50, outer_task, &outer);
    assert_int_equal(host_calls, 1);
    mfa_cpu_threads_run(threads, 1, 50, outer_task, &outer);
    assert_int_equal(host_calls, 1);
    assert_int_equal(atomic_load(&outer.wrong), 0);
    assert_int_equal(atomic_load(&outer.inner_tasks), 1000);
    mfa_cpu_threads_close(threads);
}

static int32_t half_a_host(int64_t begin, int64_t end, int64_t grain,
                           void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    (void)grain;
    worker(begin, begin + (end - begin) / 2, argument);
    return 1;
}

static int32_t failing_host(int64_t begin, int64_t end, int64_t grain,
                            void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    (void)begin;
    (void)end;
    (void)grain;
    (void)worker;
    (void)argument;
    return 1;
}

static void test_host_pools(void **state)
{
    (void)state;
    static const mfa_parallel_for hosts[] = {threaded_host, serial_host, half_a_host, failing_host};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        mfa_cpu_threads *threads = open_threads(hosts[i]);
        run_all(threads);
        wait_in(threads);
        call_from_many(threads);
        mfa_cpu_threads_close(threads);
    }
    mfa_cpu_threads *threads = open_threads(threaded_host);
    atomic_int arrived = 0;
    mfa_cpu_threads_run(threads, 2, 2, meet, &arrived);
    assert_int_equal(atomic_load(&arrived), 2);
    mfa_cpu_threads_close(threads);
}

static const struct timespec late = {0, 3000000}; /* nanoseconds */
static int is_late;

static int32_t late_host(int64_t begin, int64_t end, int64_t grain,
                         void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    const int32_t status = counting_host(begin, end, grain, worker, argument);
    if (is_late)
        nanosleep(&late, NULL);
    return status;
}

/* Runs until the host is called, for at most five seconds, which must be after `milliseconds`. */
static void run_until_host_is_called(mfa_cpu_threads *threads, double milliseconds)
{
    static struct record record;
    const int calls = host_calls;
    struct timespec begin_time, time;
    double passed = 0;
    clock_gettime(CLOCK_MONOTONIC, &begin_time);
    while (host_calls == calls && passed < 5000) {
        begin(&record, 2);
        mfa_cpu_threads_run(threads, 2, 10, note, &record);
        check(&record, 10);
        clock_gettime(CLOCK_MONOTONIC, &time);
        passed = (double)(time.tv_sec - begin_time.tv_sec) * 1e3 + (double)(time.tv_nsec - begin_time.tv_nsec) / 1e6;
    }
    assert_int_equal(host_calls, calls + 1);
    assert_true(passed >= milliseconds);
}

/* A host that ends two runs milliseconds after their last task is left alone for a tenth of a second, then tried, and
 * left alone for twice as long if it is late again; one that is in time gets every run. */
static void test_late_host(void **state)
{
    (void)state;
    mfa_cpu_threads *threads = open_threads(late_host);
    host_calls = 0, is_late = 1;
    run_until_host_is_called(threads, 0);
    run_until_host_is_called(threads, 0);
    run_until_host_is_called(threads, 90);
    run_until_host_is_called(threads, 190);
    is_late = 0;
    run_until_host_is_called(threads, 390);
    run_until_host_is_called(threads, 0);
    mfa_cpu_threads_close(threads);
}

static void test_available(void **state)
{
    (void)state;
    const int available = mfa_cpu_threads_available();
    print_message("           threads available: %d\n", available);
    assert_in_range(available, 1, 1 << 20);
#if defined(__linux__)
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &before))
            CPU_SET(i, &one);
    if (sched_setaffinity(0, sizeof one, &one) == 0) {
        assert_int_equal(mfa_cpu_threads_available(), 1);
        assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
    }
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_task_once),     cmocka_unit_test(test_after_sleep),
        cmocka_unit_test(test_open_and_close),      cmocka_unit_test(test_waits_on_lower_tasks),
        cmocka_unit_test(test_threads_run_at_once), cmocka_unit_test(test_nested_is_serial),
        cmocka_unit_test(test_concurrent_callers),  cmocka_unit_test(test_forked_child),
        cmocka_unit_test(test_pool_in_use),         cmocka_unit_test(test_nested_spares_the_host),
        cmocka_unit_test(test_host_pools),          cmocka_unit_test(test_late_host),
        cmocka_unit_test(test_available),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
