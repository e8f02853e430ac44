/* One context, many threads: calls of different problems at once, shared plans, thread counts that change
 * meanwhile, a host's thread pool, children after fork. All results are those of one thread, bit for bit. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1, CALLERS = 6, ROUNDS = 10 };

static const char *const problems[] = {
    "forward f32 b2 h4/2 q33 kv70 d32 causal",
    "forward f16 b1 h2 q100 kv129 d64",
    "forward bf16 b1 h8/1 q1 kv1500 d64",
    "forward f64 b1 h2 q40 kv41 d16 lower-9 upper3",
    "forward f32 b1 h2 q65 kv66 d24 softcap5 mask_f32",
    "forward f32 b1 h1 q300 kv513 d64 mask_bool",
};
enum { PROBLEMS = sizeof problems / sizeof *problems };

/* A problem's two passes, which can be run repeatedly, and the expected results. */
struct job {
    struct operands passes[2];
    struct reference expected;
};

static struct job jobs[CALLERS][PROBLEMS]; /* each caller has operands of its own */

static size_t bytes_of(const struct operands *operands, enum reference_tensor tensor)
{
    return (size_t)tensor_count(&operands->tensors[tensor]) * sizeof(double);
}

/* Runs both passes; 1 if the results are the expected ones. */
static int right(mfa_context *context, struct job *job)
{
    for (int pass = 0; pass < 2; pass++) {
        struct operands *operands = &job->passes[pass];
        if (operands_run(operands, context, 0) != MFA_OK)
            return 0;
        int first = pass ? REFERENCE_dQ : REFERENCE_O, end = pass ? REFERENCE_TENSORS : REFERENCE_dQ;
        for (int tensor = first; tensor < end; tensor++) {
            if (!operands->tensors[tensor].memory.mapping)
                continue;
            double *got = tensor_read(&operands->tensors[tensor]);
            int same = !memcmp(got, *reference_member(&job->expected, tensor), bytes_of(operands, tensor));
            free(got);
            if (!same)
                return 0;
        }
    }
    return 1;
}

static void prepare(mfa_context *context, struct job *job, const char *text)
{
    mfa_problem problem;
    struct inputs inputs;
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, SEED, text);
    for (int pass = 0; pass < 2; pass++) {
        struct operands *operands = &job->passes[pass], once;
        operands_open(operands, &inputs, DENSE, pass ? BACKWARD_OUTPUTS : FORWARD_OUTPUTS);
        operands_open(&once, &inputs, DENSE, pass ? BACKWARD_OUTPUTS : FORWARD_OUTPUTS);
        if (pass) {
            operands_turn(operands, DENSE, &job->expected);
            operands_turn(&once, DENSE, &job->expected);
        }
        assert_int_equal(operands_run(&once, context, 0), MFA_OK);
        assert_null(operands_collect(&once, &job->expected));
        operands_close(&once);
    }
    inputs_close(&inputs);
}

/* The expected results come from a context of one thread. */
static int set_up(void **state)
{
    mfa_context *context;
    mfa_context_options options = {.size = sizeof options, .threads = 1};
    (void)state;
    assert_int_equal(mfa_context_create(&options, &context), MFA_OK);
    for (int caller = 0; caller < CALLERS; caller++)
        for (int n = 0; n < PROBLEMS; n++)
            prepare(context, &jobs[caller][n], problems[n]);
    mfa_context_destroy(context);
    for (int n = 0; n < PROBLEMS; n++)
        print_message("both passes of  %s\n", problems[n]);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (int caller = 0; caller < CALLERS; caller++)
        for (int n = 0; n < PROBLEMS; n++) {
            operands_close(&jobs[caller][n].passes[0]);
            operands_close(&jobs[caller][n].passes[1]);
            reference_close(&jobs[caller][n].expected);
        }
    return 0;
}

struct caller {
    mfa_context *context;
    struct job *jobs;
    int first, rounds; /* the problem to begin with */
    int wrong;
};

static void *call(void *argument)
{
    struct caller *caller = argument;
    for (int n = 0; n < caller->rounds * PROBLEMS; n++)
        caller->wrong += !right(caller->context, &caller->jobs[(caller->first + n) % PROBLEMS]);
    return NULL;
}

static mfa_context *open_context(int threads, mfa_parallel_for host)
{
    mfa_context *context;
    mfa_context_options options = {.size = sizeof options, .threads = threads, .host = host};
    assert_int_equal(mfa_context_create(&options, &context), MFA_OK);
    return context;
}

static void start(pthread_t threads[CALLERS], struct caller callers[CALLERS], mfa_context *context)
{
    for (int n = 0; n < CALLERS; n++) {
        callers[n] = (struct caller){context, jobs[n], n % PROBLEMS, ROUNDS, 0};
        assert_int_equal(pthread_create(&threads[n], NULL, call, &callers[n]), 0);
    }
}

static void finish(pthread_t threads[CALLERS], struct caller callers[CALLERS])
{
    for (int n = 0; n < CALLERS; n++) {
        assert_int_equal(pthread_join(threads[n], NULL), 0);
        assert_int_equal(callers[n].wrong, 0);
    }
}

static void test_many_callers_of_one_context(void **state)
{
    (void)state;
    pthread_t threads[CALLERS];
    struct caller callers[CALLERS];
    for (int count = 1; count <= 4; count++) {
        mfa_context *context = open_context(count, NULL);
        start(threads, callers, context);
        finish(threads, callers);
        mfa_context_destroy(context);
    }
}

static void test_thread_count_changes_meanwhile(void **state)
{
    (void)state;
    pthread_t threads[CALLERS];
    struct caller callers[CALLERS];
    mfa_context *context = open_context(0, NULL);
    start(threads, callers, context);
    for (int n = 0; n < 200; n++) {
        assert_int_equal(mfa_context_set_threads(context, n % 8), MFA_OK);
        usleep(200);
    }
    finish(threads, callers);
    mfa_context_destroy(context);
}

struct sharer {
    const mfa_plan *plan;
    struct job *job;
    int wrong;
};

static void *run_shared_plan(void *argument)
{
    struct sharer *sharer = argument;
    struct operands *operands = &sharer->job->passes[0];
    mfa_buffers buffers = operands->buffers;
    buffers.d_o = buffers.dlse = (mfa_buffer){NULL, 0};
    for (int n = 0; n < ROUNDS; n++) {
        double *got = NULL;
        if (mfa_plan_run(sharer->plan, &buffers, NULL) == MFA_OK)
            got = tensor_read(&operands->tensors[REFERENCE_O]);
        sharer->wrong += !got || memcmp(got, sharer->job->expected.O, bytes_of(operands, REFERENCE_O));
        free(got);
    }
    return NULL;
}

static void test_many_runs_of_one_plan(void **state)
{
    (void)state;
    mfa_context *context = open_context(3, NULL);
    for (int problem = 0; problem < PROBLEMS; problem++) {
        mfa_plan *plan;
        pthread_t threads[CALLERS];
        struct sharer sharers[CALLERS];
        assert_int_equal(mfa_plan_create(context, &jobs[0][problem].passes[0].problem, &plan), MFA_OK);
        for (int n = 0; n < CALLERS; n++) {
            sharers[n] = (struct sharer){plan, &jobs[n][problem], 0};
            assert_int_equal(pthread_create(&threads[n], NULL, run_shared_plan, &sharers[n]), 0);
        }
        for (int n = 0; n < CALLERS; n++) {
            assert_int_equal(pthread_join(threads[n], NULL), 0);
            assert_int_equal(sharers[n].wrong, 0);
        }
        mfa_plan_destroy(plan);
    }
    mfa_context_destroy(context);
}

/* --- Cancellation ------------------------------------------------------------------------------ */

struct cancelled {
    struct caller caller;
    atomic_int finished;
};

/* Is cancelled at the next cancellation point, which no call is. */
static void *call_cancelled(void *argument)
{
    struct cancelled *cancelled = argument;
    mfa_context *another = NULL;
    pthread_cancel(pthread_self());
    const mfa_status created = mfa_context_create(NULL, &another); /* which reads files */
    const mfa_status limited = mfa_context_set_threads(cancelled->caller.context, 3);
    mfa_context_destroy(another);
    call(&cancelled->caller);
    cancelled->caller.wrong += created != MFA_OK || limited != MFA_OK;
    atomic_store(&cancelled->finished, 1);
    pthread_testcancel();
    return NULL;
}

static void test_cancelled_callers(void **state)
{
    (void)state;
    mfa_context *context = open_context(3, NULL);
    pthread_t threads[CALLERS];
    struct cancelled cancelled[CALLERS];
    alarm(120); /* a context that waits for a thread that has ended hangs */
    for (int n = 0; n < CALLERS; n++) {
        cancelled[n] = (struct cancelled){{context, jobs[n], n, 1, 0}, 0};
        assert_int_equal(pthread_create(&threads[n], NULL, call_cancelled, &cancelled[n]), 0);
    }
    for (int n = 0; n < CALLERS; n++) {
        void *result = NULL;
        assert_int_equal(pthread_join(threads[n], &result), 0);
        assert_ptr_equal(result, PTHREAD_CANCELED);
        assert_int_equal(atomic_load(&cancelled[n].finished), 1);
        assert_int_equal(cancelled[n].caller.wrong, 0);
    }
    mfa_context_destroy(context);
    alarm(0);
}

/* --- A host's own parallel_for ---------------------------------------------------------------- */

static atomic_int host_calls;

static int32_t serial_host(int64_t begin, int64_t end, int64_t grain, void (*worker)(int64_t, int64_t, void *),
                           void *argument)
{
    host_calls++;
    for (int64_t at = end; at > begin; at -= grain) /* the last range first */
        worker(at - grain > begin ? at - grain : begin, at, argument);
    return 0;
}

struct range {
    int64_t begin, end;
    void (*worker)(int64_t, int64_t, void *);
    void *argument;
};

static void *run_range(void *argument)
{
    struct range *range = argument;
    range->worker(range->begin, range->end, range->argument);
    return NULL;
}

static int32_t thread_host(int64_t begin, int64_t end, int64_t grain, void (*worker)(int64_t, int64_t, void *),
                           void *argument)
{
    enum { MAX_RANGES = 16 };
    struct range ranges[MAX_RANGES];
    pthread_t threads[MAX_RANGES];
    int count = 0;
    host_calls++;
    while (begin < end && count < MAX_RANGES - 1) {
        int64_t next = begin + grain < end ? begin + grain : end;
        ranges[count] = (struct range){begin, next, worker, argument};
        if (pthread_create(&threads[count], NULL, run_range, &ranges[count]))
            break;
        begin = next;
        count++;
    }
    if (begin < end)
        worker(begin, end, argument);
    while (count > 0)
        pthread_join(threads[--count], NULL);
    return 0;
}

static void test_host_parallel_for(void **state)
{
    (void)state;
    const mfa_parallel_for hosts[] = {serial_host, thread_host};
    for (int host = 0; host < 2; host++) {
        mfa_context *context = open_context(5, hosts[host]);
        pthread_t threads[CALLERS];
        struct caller callers[CALLERS], alone = {context, jobs[0], 0, 2, 0};
        host_calls = 0;
        call(&alone);
        assert_int_equal(alone.wrong, 0);
        assert_true(host_calls > 0);
        start(threads, callers, context);
        finish(threads, callers);
        mfa_context_destroy(context);
    }
}

/* --- fork ------------------------------------------------------------------------------------- */

#if !defined(__SANITIZE_THREAD__) /* the thread sanitizer does not support fork() in a program with threads */

/* In a PID namespace a child may have the number that its parent has in another. */
pid_t getpid(void)
{
    return 7;
}

static void child_is_right(mfa_context *context)
{
    pid_t child = fork();
    if (child == 0) {
        struct caller caller = {context, jobs[0], 0, 1, 0};
        alarm(60); /* a child that hangs is a failure too */
        call(&caller);
        mfa_context_destroy(context);
        _exit(caller.wrong != 0);
    }
    int status = -1;
    assert_true(child > 0 && waitpid(child, &status, 0) == child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_child_after_fork(void **state)
{
    (void)state;
    mfa_context *context = open_context(3, NULL);
    child_is_right(context); /* before the parent has run anything */
    struct caller caller = {context, jobs[0], 0, 1, 0};
    call(&caller);
    assert_int_equal(caller.wrong, 0);
    child_is_right(context);
    call(&caller); /* and the parent goes on */
    assert_int_equal(caller.wrong, 0);
    mfa_context_destroy(context);
}

static void test_fork_while_others_run(void **state)
{
    (void)state;
    mfa_context *context = open_context(3, NULL);
    pthread_t threads[CALLERS - 1];
    struct caller callers[CALLERS];
    for (int n = 1; n < CALLERS; n++) {
        callers[n] = (struct caller){context, jobs[n], n, ROUNDS, 0};
        assert_int_equal(pthread_create(&threads[n - 1], NULL, call, &callers[n]), 0);
    }
    for (int n = 0; n < 5; n++)
        child_is_right(context);
    for (int n = 1; n < CALLERS; n++) {
        assert_int_equal(pthread_join(threads[n - 1], NULL), 0);
        assert_int_equal(callers[n].wrong, 0);
    }
    mfa_context_destroy(context);
}

#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_many_callers_of_one_context),
        cmocka_unit_test(test_thread_count_changes_meanwhile),
        cmocka_unit_test(test_many_runs_of_one_plan),
        cmocka_unit_test(test_cancelled_callers),
        cmocka_unit_test(test_host_parallel_for),
#if !defined(__SANITIZE_THREAD__)
        cmocka_unit_test(test_child_after_fork),
        cmocka_unit_test(test_fork_while_others_run),
#endif
    };
    report_begin("test_concurrency", SEED);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, set_up, tear_down));
}
