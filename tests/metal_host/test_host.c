/* How the Metal backend uses Metal: how much of it, whose command buffers, from how many threads. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "metal_host/host.h"
#include "metal_host/objc.h"
#include "metal_host/steps.h"
#include "support/report.h"

static const char forward[] = "forward f16 b1 h2 q33 kv40 d64";

/* --- Counts --------------------------------------------------------------------------------------- */

static void test_cold_start(void **state)
{
    (void)state;
    mfa_context *context = steps_open();
    struct metalsim_counts counts = host_counts();
    steps_print_counts("a context", &counts);
    assert_int_equal(counts.sources + counts.buffers + counts.command_buffers, 0); /* a context compiles nothing */
    steps_run(context, forward, &(struct host_options){0});
    counts = host_counts();
    steps_print_counts("and a first forward run", &counts);
    assert_int_equal(counts.devices, 1);
    assert_int_equal(counts.queues, 1);
    assert_int_equal(counts.sources, 1);
    assert_int_equal(counts.functions, 2); /* attention_forward and layout_test, of one text */
    assert_int_equal(counts.written, 1);
    assert_int_equal(counts.commits, 2); /* the layout test, and the run */
    mfa_context_destroy(context);
    assert_int_equal(host_counts().objects, 0);
}

/* Asserts how many texts and functions a run compiles. */
static void expect_compiled(mfa_context *context, const char *text, uint64_t sources, uint64_t functions)
{
    metalsim_runtime_clear();
    steps_run(context, text, &(struct host_options){0});
    const struct metalsim_counts counts = host_counts();
    steps_print_counts(text, &counts);
    assert_int_equal(counts.sources, sources);
    assert_int_equal(counts.functions, functions);
    assert_int_equal(counts.written, functions > 0);
}

/* A kernel is compiled when a run needs it, and found by later processes; only the first key's text is compiled with
 * layout_test. */
static void test_compiled_when_needed(void **state)
{
    (void)state;
    static const char split[] = "forward f16 b1 h2 q33 kv4000 d64",
                      masked[] = "forward f16 b1 h2 q33 kv40 d64 mask_bool";
    static const char both[] = "both f16 b1 h2 q33 kv40 d64";
    mfa_context *context = steps_open_warm(forward);
    expect_compiled(context, forward, 0, 0);
    expect_compiled(context, split, 1, 1);  /* attention_merge */
    expect_compiled(context, masked, 2, 2); /* attention_forward and block_mask */
    expect_compiled(context, both, 3, 3);   /* backward_preprocess, dQ, dK and dV */
    mfa_context_destroy(context);
    context = steps_open();
    expect_compiled(context, forward, 1, 0);
    expect_compiled(context, split, 1, 0);
    expect_compiled(context, masked, 2, 0);
    expect_compiled(context, both, 3, 0);
    mfa_context_destroy(context);
    context = steps_open(); /* where another key comes first, and needs layout_test, which its archive does not have */
    expect_compiled(context, masked, 2, 1);
    mfa_context_destroy(context);
    context = steps_open();
    expect_compiled(context, masked, 2, 0);
    mfa_context_destroy(context);
}

static void expect_steady(mfa_context *context, const char *text, const struct host_options *options, unsigned passes)
{
    struct test_case s;
    struct reference results;
    assert_true(host_test_case_open(&s, text, 0, 1));
    const uint64_t objects = host_counts().objects;
    metalsim_runtime_clear();
    assert_int_equal(host_run(context, &s, options, &results), MFA_OK);
    const struct metalsim_counts counts = host_counts();
    steps_print_counts(text, &counts);
    assert_int_equal(counts.sources + counts.functions + counts.metallibs + counts.archives + counts.written, 0);
    assert_int_equal(counts.buffers, 0);
    assert_int_equal(counts.command_buffers, passes);
    assert_int_equal(counts.encoders, passes);
    assert_int_equal(counts.commits, passes);
    assert_int_equal(counts.waits, passes);
    assert_int_equal(counts.barriers, 0); /* of a serial encoder */
    assert_int_equal(counts.objects, objects);
    assert_true(test_case_is_right(&s, s.text, &results));
    reference_close(&results);
    test_case_close(&s);
}

static void test_steady_state(void **state)
{
    (void)state;
    mfa_context *context = steps_open_warm("both f16 b1 h2 q70 kv90 d64 mask_bool");
    expect_steady(context, "both f16 b1 h2 q70 kv90 d64 mask_bool", &(struct host_options){0}, 2);
    expect_steady(context, "both f16 b1 h2 q39 kv1 d64 mask_bool", &(struct host_options){0}, 2);
    expect_steady(context, "both f16 b2 h2 q33 kv40 d61 mask_bool", &(struct host_options){.arrangement = PADDED}, 2);
    expect_steady(context, "forward f16 b1 h2 q39 kv17 d64 mask_bool", &(struct host_options){.own_workspace = 1}, 1);
    mfa_context_destroy(context);
}

/* A decode loop: kv_len grows, and now and then a larger workspace is needed, but not each time. */
static void test_growing(void **state)
{
    (void)state;
    mfa_context *context = steps_open_warm("forward f16 b1 h4/2 q1 kv600 d64");
    metalsim_runtime_clear();
    for (int kv_len = 601; kv_len < 2000; kv_len += 100) {
        char text[64];
        snprintf(text, sizeof text, "forward f16 b1 h4/2 q1 kv%d d64", kv_len);
        steps_run(context, text, &(struct host_options){0});
    }
    const struct metalsim_counts counts = host_counts();
    steps_print_counts("14 steps with a growing kv_len", &counts);
    assert_int_equal(counts.sources + counts.functions, 0);
    assert_true(counts.buffers <= 6);
    assert_int_equal(counts.command_buffers, 14);
    mfa_context_destroy(context);
}

/* A run that would take the GPU long is cut into command buffers, of which two are under way at any time. */
static void test_long_run(void **state)
{
    (void)state;
    mfa_context *context = steps_open_warm(forward);
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.idle = 1;
    host_set(&settings);
    assert_int_equal(steps_run_long(context, NULL), MFA_OK);
    const struct metalsim_counts counts = host_counts();
    steps_print_counts("a long run", &counts);
    assert_true(counts.command_buffers > 1);
    assert_int_equal(counts.commits, counts.command_buffers);
    assert_int_equal(counts.waits, counts.command_buffers);
    assert_int_equal(counts.encoders, counts.command_buffers);
    steps_check_long(&counts);
    for (unsigned after = 0; after < counts.command_buffers; after++) {
        settings.fault = METALSIM_FAULT_COMMAND_ERROR, settings.after = after, settings.times = 1;
        host_set(&settings);
        assert_int_equal(steps_run_long(context, NULL), MFA_DEVICE_FAILED);
        settings.fault = METALSIM_FAULT_NO_ENCODER;
        host_set(&settings);
        assert_int_equal(steps_run_long(context, NULL), MFA_DEVICE_FAILED);
        print_message("%s\n", mfa_last_error());
        assert_true(host_is_clean(0));
    }
    mfa_context_destroy(context);
}

/* Threads with a queue in common, each waiting for its own commands. */
static void *run_often(void *argument)
{
    struct test_case s;
    int good = host_test_case_open(&s, "both f16 b1 h2 q33 kv40 d64 mask_bool", 0, 1);
    for (int n = 0; n < 5; n++)
        good = host_check(argument, &s, &(struct host_options){0}) && good;
    test_case_close(&s);
    return good ? argument : NULL;
}

static void test_threads(void **state)
{
    (void)state;
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    mfa_context *context = steps_open();
    for (int n = 0; n < THREADS; n++)
        assert_int_equal(pthread_create(&threads[n], NULL, run_often, context), 0);
    for (int n = 0; n < THREADS; n++) {
        void *good = NULL;
        pthread_join(threads[n], &good);
        assert_ptr_equal(good, context);
    }
    const struct metalsim_counts counts = host_counts();
    steps_print_counts("4 threads", &counts);
    assert_true(counts.buffers <= 1 + 2 * THREADS); /* the layout test's, and workspaces, each of which may grow once */
    mfa_context_destroy(context);
}

/* Whether a run in a child of the process that opened the device fails, without a message to Metal. */
static int fails_without_metal(mfa_context *context)
{
    struct test_case s;
    struct reference results;
    const uint64_t messages = host_counts().messages;
    host_test_case_open(&s, forward, 0, 1);
    const mfa_status status = host_run(context, &s, &(struct host_options){0}, &results);
    return status == MFA_UNAVAILABLE && strstr(mfa_last_error(), "fork()") && host_counts().messages == messages;
}

/* Metal does not work after fork(), neither in the parent's context nor in a new one. */
static void test_fork(void **state)
{
    (void)state;
    mfa_context *context = steps_open_warm(forward);
    const pid_t process = fork();
    assert_true(process >= 0);
    if (process == 0) {
        alarm(30);
        const int failed = fails_without_metal(context) && fails_without_metal(host_open(steps_folder));
        const uint64_t messages = host_counts().messages;
        mfa_context_destroy(context);
        _exit(!failed || host_counts().messages != messages);
    }
    int status = -1;
    assert_int_equal(waitpid(process, &status, 0), process);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    mfa_context_destroy(context);
}

/* Unsupported problems and buffers that are too short are rejected before anything is encoded. */
static void test_rejected_calls(void **state)
{
    (void)state;
    mfa_context *context = steps_open_warm(forward);
    mfa_problem problem;
    char bytes[64 * 64 * 2];
    metalsim_runtime_clear();
    mfa_problem_init(&problem, 1, 1, 1, 4, 4, 64, 64);
    problem.device = MFA_DEVICE_METAL, problem.dtype = MFA_F64;
    assert_int_equal(mfa_problem_supported(context, &problem), MFA_UNSUPPORTED);
    print_message("%s\n", mfa_last_error());
    problem.dtype = MFA_F16;
    for (int operand = 0; operand < 4; operand++) {
        mfa_buffers buffers = {.size = sizeof buffers};
        mfa_buffer *const given[] = {&buffers.q, &buffers.k, &buffers.v, &buffers.o};
        for (int n = 0; n < 4; n++)
            given[n]->base = metalsim_runtime_buffer(bytes, 4 * 64 * 2 - (n == operand), 0);
        assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_INVALID);
        print_message("%s\n", mfa_last_error());
        for (int n = 0; n < 4; n++)
            metalsim_runtime_release(given[n]->base);
    }
    assert_int_equal(host_counts().command_buffers, 0);
    mfa_context_destroy(context);
}

/* A gradient that is summed over no keys is zero, and is written: its buffer has to hold it. */
static void test_empty_sum(void **state)
{
    (void)state;
    enum { QUERIES = 5, DIM = 8 };
    float numbers[QUERIES * DIM], sums[QUERIES];
    mfa_context *context = steps_open();
    mfa_problem problem;
    mfa_buffers buffers = {.size = sizeof buffers};
    mfa_problem_init(&problem, 1, 1, 1, QUERIES, 0, DIM, DIM);
    problem.device = MFA_DEVICE_METAL, problem.pass = MFA_BACKWARD, problem.mask = MFA_MASK_ADDITIVE;
    problem.dbias_layout = (mfa_layout){0, 0, 1, 0};
    for (int n = 0; n < QUERIES * DIM; n++)
        numbers[n] = 1;
    mfa_buffer *const given[] = {&buffers.q, &buffers.o, &buffers.d_o, &buffers.lse, &buffers.dbias};
    for (int n = 0; n < 4; n++)
        given[n]->base = metalsim_runtime_buffer(numbers, sizeof numbers, 0);
    buffers.dbias.base = metalsim_runtime_buffer(sums, sizeof sums, 1);
    assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_OK);
    for (int n = 0; n < QUERIES; n++)
        assert_true(sums[n] == 0);
    for (uint64_t offset = sizeof *sums; offset <= sizeof sums; offset += sizeof *sums) {
        buffers.dbias.offset = offset;
        assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_INVALID);
        assert_non_null(strstr(mfa_last_error(), "dbias begins at byte"));
    }
    for (int n = 0; n < QUERIES * DIM; n++)
        assert_true(numbers[n] == 1);
    for (int n = 0; n < 5; n++)
        metalsim_runtime_release(given[n]->base);
    mfa_context_destroy(context);
}

/* A NaN is kept, and reaches only the queries that attend to its key. */
static void test_not_a_number(void **state)
{
    (void)state;
    enum { QUERIES = 40, DIM = 64, KEY = 20 };
    struct test_case s;
    struct reference usual, results;
    mfa_context *context = steps_open();
    assert_true(host_test_case_open(&s, "both f16 b1 h1 q40 kv40 d64 causal", 0, 1));
    assert_int_equal(host_run(context, &s, &(struct host_options){0}, &usual), MFA_OK);
    s.inputs.values[REFERENCE_K][KEY * DIM] = NAN;
    assert_int_equal(host_run(context, &s, &(struct host_options){0}, &results), MFA_OK);
    for (int n = 0; n < QUERIES * DIM; n++) {
        const int attends = n / DIM >= KEY;
        assert_true(attends ? isnan(results.O[n]) : results.O[n] == usual.O[n]);
        assert_true(attends ? isnan(results.L[n / DIM]) : results.L[n / DIM] == usual.L[n / DIM]);
        assert_true(!attends || isnan(results.dQ[n]));
    }
    for (int j = 0; j < QUERIES * DIM; j++)
        assert_true(isnan(results.dK[j]) && isnan(results.dV[j])); /* sums over all queries: 0 times NaN is NaN */
    reference_close(&usual);
    reference_close(&results);
    test_case_close(&s);
    mfa_context_destroy(context);
}

/* --- A command buffer of the caller --------------------------------------------------------------- */

static id test_queue;

static void commit_and_wait(const struct host_pass *pass, void *commands)
{
    (void)pass;
    DO(commands, "commit");
    DO(commands, "waitUntilCompleted");
    assert_int_equal(NUMBER(commands, "status"), 4);
}

static void test_command_buffer(void **state)
{
    (void)state;
    static const char *const kinds[] = {"commandBuffer", "commandBufferWithUnretainedReferences"};
    mfa_context *context = steps_open_warm(forward);
    void *pool = objc_autoreleasePoolPush();
    id device = MTLCreateSystemDefaultDevice();
    test_queue = GET(device, "newCommandQueue");
    for (int kind = 0; kind < 2; kind++) {
        metalsim_runtime_clear();
        const struct host_options options = {
            .own_workspace = kind, .stream = GET(test_queue, kinds[kind]), .after = commit_and_wait};
        steps_run(context, forward, &options);
        const struct metalsim_counts counts = host_counts();
        steps_print_counts(kinds[kind], &counts);
        assert_int_equal(counts.encoders, 1);
        assert_int_equal(counts.commits, 1); /* ours, of the test */
        assert_int_equal(counts.waits, 1);
        assert_int_equal(counts.command_buffers, 1);
    }
    DO(test_queue, "release");
    DO(device, "release");
    objc_autoreleasePoolPop(pool);
    mfa_context_destroy(context);
}

/* Two runs in one command buffer that the caller commits later; the second reads what the first has written. */
static void test_two_runs_in_one(void **state)
{
    (void)state;
    static const char text[] = "forward f16 b1 h1 q40 kv600 d64 mask_bool"; /* which needs a workspace */
    mfa_context *context = steps_open_warm(text);
    void *pool = objc_autoreleasePoolPush();
    id device = MTLCreateSystemDefaultDevice();
    test_queue = GET(device, "newCommandQueue");
    id commands = GET(test_queue, "commandBuffer");
    struct test_case s;
    struct reference none;
    assert_true(host_test_case_open(&s, text, 0, 1));
    /* Its buffers are gone when it is executed, but the command buffer holds them. */
    assert_int_equal(host_run(context, &s, &(struct host_options){.stream = commands}, &none), MFA_OK);
    assert_true(host_is_untouched(&none)); /* as nothing has been committed */
    reference_close(&none);
    test_case_close(&s);
    const uint64_t encoders = host_counts().encoders;
    steps_run(context, text,
              &(struct host_options){.stream = GET(test_queue, "commandBuffer"), .after = commit_and_wait});
    assert_int_equal(host_counts().encoders, encoders + 1);
    DO(test_queue, "release");
    DO(device, "release");
    objc_autoreleasePoolPop(pool);
    mfa_context_destroy(context);
}

/* A command buffer that retains nothing cannot be given a workspace that is made for the run. */
static void test_careless_command_buffer(void **state)
{
    (void)state;
    static const char text[] = "forward f16 b1 h1 q40 kv600 d64 mask_bool";
    mfa_context *context = steps_open_warm(text);
    struct test_case s;
    struct reference results;
    void *pool = objc_autoreleasePoolPush();
    id device = MTLCreateSystemDefaultDevice();
    test_queue = GET(device, "newCommandQueue");
    id commands = GET(test_queue, "commandBufferWithUnretainedReferences");
    assert_true(host_test_case_open(&s, text, 0, 1));
    assert_int_equal(host_run(context, &s, &(struct host_options){.stream = commands}, &results), MFA_INVALID);
    print_message("%s\n", mfa_last_error());
    assert_non_null(strstr(mfa_last_error(), "workspace"));
    reference_close(&results);
    test_case_close(&s);
    DO(test_queue, "release");
    DO(device, "release");
    objc_autoreleasePoolPop(pool);
    mfa_context_destroy(context);
}

/* PyTorch is not in this process. */
static void test_no_torch(void **state)
{
    (void)state;
    struct test_case s;
    struct reference results;
    mfa_context *context = steps_open();
    assert_true(host_test_case_open(&s, forward, 0, 1));
    assert_int_equal(host_run(context, &s, &(struct host_options){.stream = MFA_STREAM_TORCH}, &results),
                     MFA_UNAVAILABLE);
    print_message("%s\n", mfa_last_error());
    assert_non_null(strstr(mfa_last_error(), "PyTorch"));
    assert_true(host_is_untouched(&results));
    reference_close(&results);
    test_case_close(&s);
    mfa_context_destroy(context);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_cold_start),
        TEST(test_compiled_when_needed),
        TEST(test_steady_state),
        TEST(test_growing),
        TEST(test_long_run),
        TEST(test_threads),
        TEST(test_fork),
        TEST(test_rejected_calls),
        TEST(test_command_buffer),
        TEST(test_empty_sum),
        TEST(test_not_a_number),
        TEST(test_two_runs_in_one),
        TEST(test_careless_command_buffer),
        TEST(test_no_torch),
    };
    report_begin("test_host", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
