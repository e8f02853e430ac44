/* Runs among PyTorch's own operations, in its command buffer and in their order. This program is linked with the
 * substitute for one of PyTorch's versions (TORCH_... tell which functions it exports). */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "metal_host/host.h"
#include "metal_host/steps.h"
#include "runtime/torch.h"
#include "support/report.h"

static mfa_context *context;

static int begin(void **state)
{
    steps_begin(state);
    context = host_open(steps_folder);
    metalsim_torch_set_concurrent(0);
    return !context;
}

static int end(void **state)
{
    mfa_context_destroy(context);
    metalsim_torch_close();
    return steps_end(state);
}

/* O is a multiple of 64 bytes, and so begins with its buffer. */
static size_t count_of_O(const struct host_pass *pass)
{
    const mfa_problem *p = &pass->operands.problem;
    return (size_t)(p->batch * p->q_heads * p->q_len * p->value_dim);
}

/* PyTorch writes O before the run and halves it afterwards: the run must overwrite all of O, and must finish before
 * PyTorch reads it. The expected O is half of the true one. */
static struct metalsim_counts at_start, at_end;

static void use_before(const struct host_pass *pass)
{
    if (pass->operands.problem.pass == MFA_FORWARD)
        metalsim_torch_scale(pass->buffers.o.base, count_of_O(pass), 3);
    at_start = host_counts();
}

static void use_after(const struct host_pass *pass, void *stream)
{
    at_end = host_counts();
    (void)stream;
    if (pass->operands.problem.pass == MFA_FORWARD)
        metalsim_torch_scale(pass->buffers.o.base, count_of_O(pass), 0.5F);
    metalsim_torch_synchronize();
}

static const struct host_options among = {
    .stream = MFA_STREAM_TORCH, .outputs_used = 1, .before = use_before, .after = use_after};

static void restore(const struct test_case *s, struct reference *results)
{
    for (int64_t i = 0; i < reference_count(&s->inputs.problem, REFERENCE_O); i++)
        results->O[i] *= 2;
}

static void run_right(const char *text)
{
    struct test_case s;
    struct reference results;
    assert_true(host_test_case_open(&s, text, 0, 1));
    const mfa_status status = host_run(context, &s, &among, &results);
    if (status != MFA_OK)
        print_error("%s: %s\n", text, mfa_last_error());
    assert_int_equal(status, MFA_OK);
    restore(&s, &results);
    assert_true(test_case_is_right(&s, s.text, &results));
    reference_close(&results);
    test_case_close(&s);
}

static const char *const texts[] = {
    "forward f32 b1 h2 q16 kv40 d64", "forward f32 b1 h2 q32 kv600 d128 mask_bool",
    "forward f32 b1 h8/2 q2 kv1500 d64 causal",
    "forward f32 b1 h1 q16 kv40 d136", /* whose simdgroups exchange, in threadgroup memory of index 1 */
};

/* A call among PyTorch's operations commits nothing and waits for nothing. */
static void check_counts(void)
{
    const uint64_t buffers = at_end.command_buffers - at_start.command_buffers;
    const uint64_t encoders = at_end.encoders - at_start.encoders, commits = at_end.commits - at_start.commits;
    print_message("a call: %d messages, %d command buffers, %d encoders, %d commits, %d waits, %d dispatch_sync\n",
                  (int)(at_end.messages - at_start.messages), (int)buffers, (int)encoders, (int)commits,
                  (int)(at_end.waits - at_start.waits), (int)(at_end.syncs - at_start.syncs));
    assert_int_equal(at_end.waits, at_start.waits);
    assert_int_equal(at_end.syncs, at_start.syncs + 1);
#if defined(TORCH_SHARES)
    assert_int_equal(buffers + encoders + commits, 0); /* PyTorch's encoder, which is open, is ours too */
#elif defined(TORCH_ENDS)
    assert_int_equal(encoders, 1); /* one of our own, in PyTorch's command buffer */
    assert_int_equal(buffers + commits, 0);
#else
    assert_int_equal(commits, 1); /* by PyTorch itself: there is no other way to end its encoder */
    assert_int_equal(encoders, 1);
#endif
}

static void test_order(void **state)
{
    (void)state;
    for (int again = 0; again < 2; again++)
        for (size_t n = 0; n < sizeof texts / sizeof *texts; n++) {
            print_message("%s\n", texts[n]);
            run_right(texts[n]);
            if (again)
                check_counts();
        }
}

static void wait_for_torch(const struct host_pass *pass, void *stream)
{
    (void)pass, (void)stream;
    metalsim_torch_synchronize();
}

static void test_backward(void **state)
{
    (void)state;
    struct test_case s;
    assert_true(host_test_case_open(&s, "both bf16 b1 h4/2 q33 kv70 d64 causal mask_f32 softcap5", 3, 1));
    assert_true(host_check(context, &s, &(struct host_options){.stream = MFA_STREAM_TORCH, .after = wait_for_torch}));
    test_case_close(&s);
}

static void use_dbias_before(const struct host_pass *pass)
{
    if (pass->operands.problem.pass == MFA_BACKWARD)
        metalsim_torch_scale(pass->buffers.dbias.base, 16, 3);
}

/* PyTorch's operations leave threadgroup memory set in their encoder, more than a kernel of ours leaves room for. */
static void test_leftovers(void **state)
{
    (void)state;
    struct test_case s;
    const struct host_options options = {.stream = MFA_STREAM_TORCH,
                                         .outputs = FORWARD_OUTPUTS | OUTPUT(DBIAS),
                                         .outputs_used = 1,
                                         .before = use_dbias_before,
                                         .after = wait_for_torch};
    assert_true(host_test_case_open(&s, "both f32 b1 h1 q32 kv32 d8 mask_f32", 0, 1));
    assert_true(host_check(context, &s, &options));
    assert_true(host_is_clean(0));
    test_case_close(&s);
}

/* An encoder whose dispatches may overlap. */
static void test_concurrent(void **state)
{
    metalsim_torch_set_concurrent(1);
    test_order(state);
    test_backward(state);
}

/* Many calls before PyTorch waits, with workspaces that grow while others are still in use. */
static void test_many_in_flight(void **state)
{
    (void)state;
    enum { RUNS = 8 };
    static char lines[RUNS][64];
    struct test_case test_cases[RUNS];
    struct host_pass passes[RUNS];
    struct reference results[RUNS];
    const struct host_options options = {.stream = MFA_STREAM_TORCH};
    for (int n = 0; n < RUNS; n++) {
        snprintf(lines[n], sizeof lines[n], "forward f32 b1 h2 q2 kv%d d64 mask_bool", 300 + 400 * n);
        assert_true(host_test_case_open(&test_cases[n], lines[n], 0, 1));
        host_pass_open(&passes[n], &test_cases[n], &options);
        assert_int_equal(host_start(context, &options, &passes[n]), MFA_OK);
    }
    metalsim_torch_synchronize();
    for (int n = 0; n < RUNS; n++) {
        memset(&results[n], 0, sizeof results[n]);
        host_collect(&passes[n], &results[n], lines[n]);
        assert_true(test_case_is_right(&test_cases[n], test_cases[n].text, &results[n]));
        reference_close(&results[n]);
        operands_close(&passes[n].operands);
        test_case_close(&test_cases[n]);
    }
}

/* Several threads meet in PyTorch's stream. */
static void *run_often(void *argument)
{
    struct test_case *s = argument;
    const struct host_options options = {.stream = MFA_STREAM_TORCH};
    struct host_pass pass;
    struct reference results = {.O = NULL};
    int good = 1;
    for (int n = 0; n < 5; n++) {
        host_pass_open(&pass, s, &options);
        good = host_start(context, &options, &pass) == MFA_OK && good;
        metalsim_torch_synchronize();
        host_collect(&pass, &results, s->text);
        operands_close(&pass.operands);
        good = test_case_is_right(s, s->text, &results) && good;
        reference_close(&results);
    }
    return good ? argument : NULL;
}

static void test_threads(void **state)
{
    (void)state;
    enum { THREADS = 3 };
    struct test_case test_cases[THREADS];
    pthread_t threads[THREADS];
    for (int n = 0; n < THREADS; n++)
        assert_true(host_test_case_open(&test_cases[n], texts[1], 0, (uint64_t)n));
    for (int n = 0; n < THREADS; n++)
        assert_int_equal(pthread_create(&threads[n], NULL, run_often, &test_cases[n]), 0);
    for (int n = 0; n < THREADS; n++) {
        void *good = NULL;
        pthread_join(threads[n], &good);
        assert_ptr_equal(good, &test_cases[n]);
        test_case_close(&test_cases[n]);
    }
}

/* A failure leaves PyTorch's stream as it was. */
static void test_failure(void **state)
{
    (void)state;
    struct test_case s;
    struct reference results;
    struct metalsim_settings settings;
    run_right(texts[0]);
    assert_true(host_test_case_open(&s, texts[1], 0, 1));
    metalsim_runtime_defaults(&settings);
    settings.fault = METALSIM_FAULT_NO_BUFFER, settings.after = 0;
    host_set(&settings);
    assert_int_equal(host_run(context, &s, &among, &results), MFA_OUT_OF_MEMORY);
    print_message("%s\n", mfa_last_error());
    assert_true(host_is_untouched(&results));
    reference_close(&results);
    test_case_close(&s);
    assert_true(host_is_clean(0));
    host_reset();
    run_right(texts[1]);
}

/* A PyTorch without MPS, which throws when it is asked for its stream; and one that has it after all. */
static void test_without_mps(void **state)
{
    (void)state;
    struct test_case s;
    struct reference results;
    assert_true(host_test_case_open(&s, texts[0], 0, 1));
    metalsim_torch_set_available(0);
    assert_int_equal(host_run(context, &s, &among, &results), MFA_UNAVAILABLE);
    metalsim_torch_set_available(1);
    print_message("%s\n", mfa_last_error());
    assert_true(host_is_untouched(&results));
    reference_close(&results);
    test_case_close(&s);
    run_right(texts[0]);
}

/* A run that would take the GPU long is cut into command buffers, and none is waited for. */
static struct metalsim_counts run_idle(void)
{
    struct metalsim_settings settings;
    run_right(texts[0]);
    metalsim_runtime_defaults(&settings);
    settings.idle = 1;
    host_set(&settings);
    assert_int_equal(steps_run_long(context, MFA_STREAM_TORCH), MFA_OK);
    const struct metalsim_counts counts = host_counts();
    steps_print_counts("a long run", &counts);
    steps_check_long(&counts);
    assert_int_equal(counts.waits, 0);
    metalsim_torch_synchronize();
    return counts;
}

static void test_long_run(void **state)
{
    (void)state;
    const struct metalsim_counts counts = run_idle();
    assert_true(counts.commits >= 3);
    assert_true(counts.encoders >= counts.commits);
    assert_true(host_is_clean(0));
}

/* Runs that are short one by one, in a command buffer that PyTorch does not commit. */
static void test_many_short_runs(void **state)
{
    (void)state;
    enum { RUNS = 20 };
    static char none[64];
    struct metalsim_settings settings;
    mfa_problem problem;
    mfa_buffers buffers = {.size = sizeof buffers};
    mfa_problem_init(&problem, 1, 32, 32, 1024, 1024, 128, 128); /* 17 GFLOP */
    problem.device = MFA_DEVICE_METAL, problem.dtype = MFA_F16;
    mfa_buffer *const given[] = {&buffers.q, &buffers.k, &buffers.v, &buffers.o};
    run_right(texts[0]);
    metalsim_runtime_defaults(&settings);
    settings.idle = 1;
    host_set(&settings);
    for (int n = 0; n < 4; n++)
        given[n]->base = metalsim_runtime_buffer(none, (size_t)32 * 1024 * 128 * 2, 0);
    const uint64_t before = host_counts().commits;
    for (int n = 0; n < RUNS; n++)
        assert_int_equal(mfa_attention(context, &problem, &buffers, MFA_STREAM_TORCH), MFA_OK);
    const uint64_t commits = host_counts().commits - before;
    print_message("%d runs of 17 GFLOP: %d commits\n", RUNS, (int)commits);
    assert_true(commits >= 3);
    metalsim_torch_synchronize();
    for (int n = 0; n < 4; n++)
        metalsim_runtime_release(given[n]->base);
}

/* PyTorch does not ask whether the GPU has completed its commands: the next run does, and works again after that. */
static void test_failed_commands(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    struct test_case s;
    const struct host_options options = {.stream = MFA_STREAM_TORCH, .after = wait_for_torch};
    struct reference results;
    run_right(texts[0]);
    assert_true(host_test_case_open(&s, texts[1], 0, 1));
    metalsim_runtime_defaults(&settings);
    settings.fault = METALSIM_FAULT_COMMAND_ERROR;
    host_set(&settings);
    assert_int_equal(host_run(context, &s, &options, &results), MFA_OK);
    assert_true(host_is_untouched(&results)); /* the commands failed, and nobody has said so */
    reference_close(&results);
    host_reset();
    assert_int_equal(host_run(context, &s, &options, &results), MFA_DEVICE_FAILED);
    print_message("%s\n", mfa_last_error());
    assert_non_null(strstr(mfa_last_error(), "GPU Timeout"));
    assert_non_null(strstr(mfa_last_error(), "PyTorch's stream"));
    assert_true(host_is_untouched(&results));
    reference_close(&results);
    test_case_close(&s);
    run_right(texts[1]);
}

#if defined(TORCH_SHARES)
/* While a graph is recorded nothing is committed: its commands stay together. */
static void test_recording(void **state)
{
    (void)state;
    metalsim_torch_record(1);
    for (int n = 0; n < 2; n++)
        run_right(texts[n]);
    const struct metalsim_counts counts = run_idle();
    metalsim_torch_record(0);
    assert_int_equal(counts.commits, 0);
    assert_true(host_is_clean(0));
}
#endif

#if defined(TORCH_ENDS)
/* The functions that give PyTorch's command buffer are those of its default stream. */
static void test_another_stream(void **state)
{
    (void)state;
    struct test_case s;
    struct reference results;
    assert_true(host_test_case_open(&s, texts[0], 0, 1));
    metalsim_torch_leave(1);
    assert_int_equal(host_run(context, &s, &(struct host_options){.stream = MFA_STREAM_TORCH}, &results),
                     MFA_UNAVAILABLE);
    metalsim_torch_leave(0);
    print_message("%s\n", mfa_last_error());
    assert_true(host_is_untouched(&results));
    reference_close(&results);
    test_case_close(&s);
    run_right(texts[0]);
}
#endif

#undef TEST
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_order),          TEST(test_backward),        TEST(test_concurrent),      TEST(test_many_in_flight),
        TEST(test_threads),        TEST(test_failure),         TEST(test_leftovers),       TEST(test_without_mps),
        TEST(test_long_run),       TEST(test_many_short_runs), TEST(test_failed_commands),
#if defined(TORCH_SHARES)
        TEST(test_recording),
#endif
#if defined(TORCH_ENDS)
        TEST(test_another_stream),
#endif
    };
    report_begin("test_torch", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
