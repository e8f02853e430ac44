/* Every failure of Metal, at every call where it can occur: the Metal backend fails with a message and writes nothing,
 * or falls back and gives right results. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "metal_host/host.h"
#include "metal_host/steps.h"
#include "support/report.h"

/* The expected status and message of each fault. A run that succeeds all the same must be right. */
static const struct expectation {
    enum metalsim_fault fault;
    mfa_status status; /* MFA_OK: no run may fail */
    const char *words; /* in the message */
    int is_final;      /* the context does not try again, because that takes long and gives the same result */
} expectations[] = {
    {METALSIM_FAULT_NO_DEVICE, MFA_UNAVAILABLE, "none on this machine", 1},
    {METALSIM_FAULT_NO_DEFAULT, MFA_OK, NULL, 0},
    {METALSIM_FAULT_NO_QUEUE, MFA_UNAVAILABLE, "no command queue", 1},
    {METALSIM_FAULT_NO_BUFFER, MFA_OUT_OF_MEMORY, "MTLBuffer", 0},
    {METALSIM_FAULT_COMPILE_ERROR, MFA_COMPILE_FAILED, "an injected one", 1},
    {METALSIM_FAULT_NO_FUNCTION, MFA_COMPILE_FAILED, "no such function", 1},
    {METALSIM_FAULT_NO_PIPELINE, MFA_COMPILE_FAILED, "stack space", 1},
    {METALSIM_FAULT_LIMITED_THREADS, MFA_UNSUPPORTED, "at most 16 threads", 1},
    {METALSIM_FAULT_NARROW, MFA_UNSUPPORTED, "16 threads", 1},
    {METALSIM_FAULT_ARCHIVE_REFUSED, MFA_OK, NULL, 0},
    {METALSIM_FAULT_ARCHIVE_UNMADE, MFA_OK, NULL, 0},
    {METALSIM_FAULT_ARCHIVE_MISSES, MFA_OK, NULL, 0},
    {METALSIM_FAULT_ARCHIVE_FULL, MFA_OK, NULL, 0},
    {METALSIM_FAULT_ARCHIVE_UNWRITTEN, MFA_OK, NULL, 0},
    {METALSIM_FAULT_NO_COMMAND_BUFFER, MFA_DEVICE_FAILED, "no command buffer", 0},
    {METALSIM_FAULT_NO_ENCODER, MFA_DEVICE_FAILED, "no compute encoder", 0},
    {METALSIM_FAULT_COMMAND_ERROR, MFA_DEVICE_FAILED, "GPU Timeout", 0},
    {METALSIM_FAULT_LAYOUT, MFA_UNAVAILABLE, "simdgroup matrices", 1},
};

static void fail_with(enum metalsim_fault fault, unsigned after, unsigned times)
{
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.fault = fault, settings.after = after, settings.times = times, settings.threads = 16;
    host_set(&settings);
}

/* Runs forward and backward; a failure must be the expected one. Returns the status. */
static mfa_status run_faulty(mfa_context *context, const struct expectation *e, unsigned after)
{
    struct test_case s;
    struct reference results;
    assert_true(host_test_case_open(&s, "both f16 b1 h1 q40 kv600 d64 mask_bool", 0, 1)); /* which has a workspace */
    const mfa_status status = host_run(context, &s, &(struct host_options){0}, &results);
    print_message("%s after %u: %s%s%s\n", metalsim_runtime_fault_name(e->fault), after, mfa_status_name(status),
                  status ? ": " : "", status ? mfa_last_error() : "");
    if (status == MFA_OK) {
        assert_true(test_case_is_right(&s, s.text, &results));
    } else {
        assert_int_equal(status, e->status);
        assert_non_null(strstr(mfa_last_error(), e->words));
        assert_true(host_is_untouched(&results));
    }
    reference_close(&results);
    test_case_close(&s);
    return status;
}

/* Each fault once, at each call where it can occur: the run fails with a message and writes nothing, or is right. After
 * the fault, the context works, or keeps reporting the failure. Nothing leaks. */
static void test_each_fault_once(void **state)
{
    (void)state;
    for (size_t n = 0; n < sizeof expectations / sizeof *expectations; n++) {
        const struct expectation *e = &expectations[n];
        uint64_t faults = 1;
        unsigned after;
        for (after = 0; faults; after++) {
            fail_with(e->fault, after, 1);
            mfa_context *context = steps_open();
            const mfa_status status = run_faulty(context, e, after);
            faults = host_counts().faults;
            assert_true(host_is_clean(0));
            host_reset();
            if (status != MFA_OK && e->is_final)
                assert_int_equal(run_faulty(context, e, after), status);
            else
                steps_run(context, "forward f16 b1 h1 q40 kv600 d64 mask_bool", &(struct host_options){0});
            mfa_context_destroy(context);
            assert_true(host_is_clean(1));
            host_remove(steps_folder);
        }
        assert_true(after > 1 || e->fault == METALSIM_FAULT_ARCHIVE_REFUSED); /* no file is there to be refused */
    }
}

/* Each fault, permanently. */
static void test_each_fault_forever(void **state)
{
    (void)state;
    for (size_t n = 0; n < sizeof expectations / sizeof *expectations; n++) {
        const struct expectation *e = &expectations[n];
        fail_with(e->fault, 0, 0);
        mfa_context *context = steps_open();
        for (int again = 0; again < 2; again++)
            assert_int_equal(run_faulty(context, e, 0), e->status);
        assert_true(host_is_clean(0));
        mfa_context_destroy(context);
        assert_true(host_is_clean(1));
        host_remove(steps_folder);
    }
}

/* A pipeline that gets half the threads that its tile takes is followed by one with a simpler tile. */
static void test_simpler_tiles(void **state)
{
    (void)state;
    static const struct {
        const char *function, *text;
    } cases[] = {
        {"attention_forward", "forward f16 b1 h2 q33 kv40 d64"},
        {"attention_forward", "forward f32 b1 h2 q33 kv40 d128 mask_bool"},
        {"attention_decode", "forward bf16 b1 h8/2 q1 kv700 d64"},
        {"attention_decode_vector", "forward bf16 b1 h4/2 q1 kv700 d264"},
        {"attention_backward_dq", "both f16 b1 h2 q33 kv70 d64 causal"},
        {"attention_backward_dkv", "both f16 b1 h2 q33 kv70 d64 mask_f32"},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        struct metalsim_settings settings;
        metalsim_runtime_defaults(&settings);
        settings.fault = METALSIM_FAULT_LIMITED_THREADS, settings.threads = 64, settings.function = cases[n].function;
        host_set(&settings);
        mfa_context *context = steps_open();
        steps_run(context, cases[n].text, &(struct host_options){0});
        assert_true(host_counts().faults > 0);
        const uint64_t sources = host_counts().sources;
        steps_run(context, cases[n].text, &(struct host_options){.own_workspace = 1});
        assert_int_equal(host_counts().sources, sources); /* a source that failed is not compiled again */
        mfa_context_destroy(context);
        assert_true(host_is_clean(1));
        print_message("%s: 64 threads are enough, after %d texts\n", cases[n].text, (int)sources);
    }
}

static void test_old_family(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.family = 5;
    host_set(&settings);
    const struct expectation e = {METALSIM_FAULT_NONE, MFA_UNAVAILABLE, "Apple5; Apple7 (M1) or later is needed", 1};
    mfa_context *context = steps_open();
    assert_int_equal(run_faulty(context, &e, 0), MFA_UNAVAILABLE);
    mfa_context_destroy(context);
}

/* Every family and system that there is. */
static void test_families(void **state)
{
    (void)state;
    static const int machines[][2] = {{7, 14}, {8, 14}, {9, 15}, {10, 26}};
    for (size_t n = 0; n < sizeof machines / sizeof *machines; n++) {
        struct metalsim_settings settings;
        metalsim_runtime_defaults(&settings);
        settings.family = machines[n][0], settings.macos = machines[n][1];
        host_set(&settings);
        mfa_context *context = steps_open();
        steps_run(context, "both bf16 b1 h2 q33 kv40 d128 causal", &(struct host_options){0});
        mfa_context_destroy(context);
        assert_true(host_is_clean(1));
    }
}

/* A buffer larger than the device has. */
static void test_no_memory(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.memory = 4096;
    host_set(&settings);
    const struct expectation e = {METALSIM_FAULT_NONE, MFA_OUT_OF_MEMORY, "the device's limit is 4096", 0};
    mfa_context *context = steps_open();
    assert_int_equal(run_faulty(context, &e, 0), MFA_OUT_OF_MEMORY);
    mfa_context_destroy(context);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_each_fault_once), TEST(test_each_fault_forever), TEST(test_simpler_tiles),
        TEST(test_old_family),      TEST(test_families),           TEST(test_no_memory),
    };
    report_begin("test_host_faults", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
