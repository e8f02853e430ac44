/* Numbers at the ends of their range. Q, K, V and dO are multiplied by powers of two, and the scale by those that leave
 * the scores as they are. No rounding changes then, so results are those of the plain problem bit for bit, each times a
 * power of two, unless an intermediate result overflows or becomes subnormal. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "reference/tolerance.h"
#include "support/compare.h"
#include "support/context.h"
#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1 };

struct shifts { /* exponents of the powers of two */
    int q, k, v, d_o;
};

static void shift(struct inputs *inputs, enum reference_tensor tensor, int exponent)
{
    double *values = inputs->values[tensor];
    for (int64_t at = 0; at < reference_count(&inputs->problem, tensor); at++)
        values[at] = ldexp(values[at], exponent);
}

/* Both passes of the shifted problem, or with `backward` 0 the first alone. */
static void run(const char *text, struct shifts by, int backward, struct reference *results)
{
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    if (mfa_problem_parse(text, &problem) != MFA_OK)
        fail_msg("%s: %s", text, mfa_last_error());
    problem.scale = ldexp(problem.scale, -by.q - by.k);
    inputs_open(&inputs, &problem, (struct variant){0}, SEED, "range");
    shift(&inputs, REFERENCE_Q, by.q);
    shift(&inputs, REFERENCE_K, by.k);
    shift(&inputs, REFERENCE_V, by.v);
    shift(&inputs, REFERENCE_dO, by.d_o);
    memset(results, 0, sizeof *results);
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | (backward ? BACKWARD_OUTPUTS : 0));
    if (operands_run(&operands, test_context, 0) != MFA_OK)
        fail_msg("%s, scale %g: %s", text, problem.scale, mfa_last_error());
    assert_null(operands_collect(&operands, results));
    if (backward) {
        operands_turn(&operands, DENSE, results);
        assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
        assert_null(operands_collect(&operands, results));
    }
    operands_close(&operands);
    inputs_close(&inputs);
}

static void expect_shifted(const char *text, struct shifts by, enum reference_tensor tensor, struct reference *plain,
                           struct reference *got, int exponent)
{
    mfa_problem problem;
    const double *expected = *reference_member(plain, tensor), *values = *reference_member(got, tensor);
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    for (int64_t at = 0; expected && at < reference_count(&problem, tensor); at++)
        if (values[at] != ldexp(expected[at], exponent))
            fail_msg("%s, Q 2^%d, K 2^%d, V 2^%d, dO 2^%d: %s[%d] is %g, expected %g * 2^%d", text, by.q, by.k, by.v,
                     by.d_o, tensor_name(tensor), (int)at, values[at], expected[at], exponent);
}

static void check(const char *text, struct shifts by, int backward)
{
    struct reference plain, got;
    run(text, (struct shifts){0, 0, 0, 0}, backward, &plain);
    run(text, by, backward, &got);
    expect_shifted(text, by, REFERENCE_O, &plain, &got, by.v);
    expect_shifted(text, by, REFERENCE_L, &plain, &got, 0);
    expect_shifted(text, by, REFERENCE_dV, &plain, &got, by.d_o);
    expect_shifted(text, by, REFERENCE_dQ, &plain, &got, by.v + by.d_o - by.q);
    expect_shifted(text, by, REFERENCE_dK, &plain, &got, by.v + by.d_o - by.k);
    reference_close(&plain);
    reference_close(&got);
}

/* More than a panel, a decode step, one with many keys, and the options that change scores. */
static const char *const shapes[] = {
    "b1 h2 q100 kv131 d40",           "b1 h2 q1 kv131 d40",          "b1 h4/2 q3 kv1500 d64 causal",
    "b1 h1 q60 kv1300 d16 mask_bool", "b1 h2 q70 kv90 d64 softcap4",
};

static void check_shapes(const char *dtype, struct shifts by, int backward)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        char text[96];
        snprintf(text, sizeof text, "forward %s %s", dtype, shapes[i]);
        check(text, by, backward);
    }
}

/* Scores are ordinary; the scale, or Q or K times it, is not. A shift of dO compensates for a shift of Q or K that
 * would take a gradient out of range. */
static void test_scales(void **state)
{
    static const struct shifts all[] = {
        {83, 63, 0, 0},      {83, 70, 0, 0},  {-66, -63, 0, 0}, {33, -110, 0, 0}, {-110, 33, 0, 0},
        {-60, -110, 0, -10}, {80, -80, 0, 0}, {100, 90, 0, 20}, {3, 0, 0, 0},     {0, -7, 0, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        check_shapes("f32", all[i], 1);
        check_shapes("f64", all[i], 1);
    }
}

/* bf16 has the range of f32. A shifted scale may select other kernels, so the plain problem is shifted as well. */
static void test_scales_of_bf16(void **state)
{
    static const struct shifts shifted[] = {{63, 63, 0, 0}, {-66, -63, 0, 0}, {-60, -100, 0, 0}};
    (void)state;
    for (size_t i = 0; i < sizeof shifted / sizeof *shifted; i++)
        for (size_t n = 0; n < sizeof shapes / sizeof *shapes; n++) {
            struct reference plain, got;
            char text[96];
            snprintf(text, sizeof text, "forward bf16 %s", shapes[n]);
            const struct shifts by = shifted[i];
            const int half = by.q + by.k > 0 ? 25 : -25; /* 2^50 exceeds what bf16 products take */
            run(text, (struct shifts){half, half, 0, 0}, 1, &plain);
            run(text, by, 1, &got);
            expect_shifted(text, by, REFERENCE_O, &plain, &got, 0);
            expect_shifted(text, by, REFERENCE_L, &plain, &got, 0);
            expect_shifted(text, by, REFERENCE_dV, &plain, &got, by.d_o);
            expect_shifted(text, by, REFERENCE_dQ, &plain, &got, by.d_o - by.q + half);
            expect_shifted(text, by, REFERENCE_dK, &plain, &got, by.d_o - by.k + half);
            reference_close(&plain);
            reference_close(&got);
        }
}

/* O before the division by l exceeds the largest number. */
static void test_large_values(void **state)
{
    (void)state;
    check_shapes("f32", (struct shifts){0, 0, 124, 0}, 0);
    check_shapes("bf16", (struct shifts){0, 0, 124, 0}, 0);
    check_shapes("f64", (struct shifts){0, 0, 1020, 0}, 0);
    check_shapes("f32", (struct shifts){0, 0, 100, -90}, 1);
    check_shapes("f32", (struct shifts){0, 0, -90, 100}, 1);
}

/* An infinite or NaN element of V reaches O unchanged. */
static void test_values_that_are_not_finite(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        char text[96];
        mfa_problem problem;
        struct inputs inputs;
        struct operands operands;
        struct reference results;
        snprintf(text, sizeof text, "forward f32 %s", shapes[i]);
        assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
        inputs_open(&inputs, &problem, (struct variant){0}, SEED, "range");
        shift(&inputs, REFERENCE_V, 122);
        inputs.values[REFERENCE_V][0] = INFINITY; /* of key 0, which the last query of any of the shapes may see */
        inputs.values[REFERENCE_V][1] = NAN;
        memset(&results, 0, sizeof results);
        operands_open(&operands, &inputs, DENSE, OUTPUT(O));
        assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
        assert_null(operands_collect(&operands, &results));
        int infinite = 0, nan = 0;
        for (int64_t row = 0; row < problem.q_len; row++) { /* of head 0 */
            const double *O = results.O + row * problem.value_dim;
            infinite += O[0] == INFINITY, nan += isnan(O[1]) != 0;
            for (int64_t d = 2; d < problem.value_dim; d++)
                assert_true(isfinite(O[d]));
        }
        assert_true(infinite > 0 && nan > 0);
        reference_close(&results);
        operands_close(&operands);
        inputs_close(&inputs);
    }
}

/* Whatever the cap, softcap * tanh(s / softcap) of scores far below it is s, and far above it the cap. */
static void test_caps(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct reference plain, got;
        run("forward f32 b1 h2 q70 kv90 d64", (struct shifts){i ? -30 : 0, i ? 30 : 0, 0, 0}, 1, &plain);
        run("forward f32 b1 h2 q70 kv90 d64 softcap1e30", (struct shifts){i ? -30 : 0, i ? 30 : 0, 0, 0}, 1, &got);
        for (int64_t at = 0; at < 2 * 70 * 64; at++)
            if (fabs(got.O[at] - plain.O[at]) > 1e-5 || fabs(got.dQ[at] - plain.dQ[at]) > ldexp(1e-4, i ? 30 : 0))
                fail_msg("O[%d] is %g, without a cap %g; dQ %g and %g", (int)at, got.O[at], plain.O[at], got.dQ[at],
                         plain.dQ[at]);
        reference_close(&plain);
        reference_close(&got);
    }
    struct reference equal, capped; /* all scores are within 1e-30 of each other */
    run("forward f32 b1 h2 q70 kv90 d64 scale0", (struct shifts){0, 0, 0, 0}, 0, &equal);
    run("forward f32 b1 h2 q70 kv90 d64 softcap1e-30", (struct shifts){0, 0, 0, 0}, 0, &capped);
    for (int64_t at = 0; at < 2 * 70 * 64; at++)
        assert_true(fabs(capped.O[at] - equal.O[at]) < 1e-6);
    reference_close(&equal);
    reference_close(&capped);
}

/* O keeps its digits where a sink is so large that the weight of its sum, exp(m - sink) / l, is subnormal. */
static void test_weights_below_a_sink(void **state)
{
    static const char *const of_sinks[] = {"forward f32 b1 h2/1 q60 kv200 d40 sinks",
                                           "forward f32 b1 h1 q1 kv300 d64 sinks"};
    (void)state;
    for (size_t n = 0; n < sizeof of_sinks / sizeof *of_sinks; n++) {
        mfa_problem problem;
        struct inputs inputs;
        struct operands operands;
        struct reference truth = {0}, results = {0};
        double largest = 0;
        assert_int_equal(mfa_problem_parse(of_sinks[n], &problem), MFA_OK);
        inputs_open(&inputs, &problem, (struct variant){0}, SEED, "range");
        shift(&inputs, REFERENCE_V, 60);
        for (int64_t h = 0; h < problem.q_heads; h++)
            inputs.values[REFERENCE_SINKS][h] = 104;
        operands_open(&operands, &inputs, DENSE, OUTPUT(O));
        const int64_t count = reference_count(&problem, REFERENCE_O);
        truth.O = reference_allocate(count);
        reference_attention(&operands.problem, &operands.buffers, &truth);
        assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
        assert_null(operands_collect(&operands, &results));
        for (int64_t at = 0; at < count; at++)
            largest = fmax(largest, fabs(truth.O[at]));
        for (int64_t at = 0; at < count; at++)
            if (!(fabs(results.O[at] - truth.O[at]) < 2e-6 * largest))
                fail_msg("%s: O[%d] is %g, expected %g", of_sinks[n], (int)at, results.O[at], truth.O[at]);
        reference_close(&truth);
        reference_close(&results);
        operands_close(&operands);
        inputs_close(&inputs);
    }
}

/* Sinks that far exceed all scores. Each P comes near the least normal number, 2^-126 in f32, or below it, where it
 * counts as 0; gradients are off by what is lost so, which their tolerances count. */
static void check_sinks(const char *text, double sink)
{
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference truth = {0}, results = {0};
    struct tolerance tolerance;
    char what[128];
    snprintf(what, sizeof what, "%s, sinks of %g", text, sink);
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, SEED, "range");
    for (int64_t h = 0; h < problem.q_heads; h++)
        inputs.values[REFERENCE_SINKS][h] = sink;
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++)
        if (tensor != REFERENCE_O_LOW && (tensor != REFERENCE_DBIAS || problem.mask == MFA_MASK_ADDITIVE))
            *reference_member(&truth, tensor) = reference_allocate(reference_count(&problem, tensor));
    reference_attention(&operands.problem, &operands.buffers, &truth);
    reference_tolerance(&operands.problem, &operands.buffers, &truth, &tolerance);
    assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
    assert_null(operands_collect(&operands, &results));
    operands_turn(&operands, DENSE, &results);
    assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
    assert_null(operands_collect(&operands, &results));
    const double tolerances[REFERENCE_TENSORS] = {
        [REFERENCE_O] = tolerance.O,          [REFERENCE_L] = tolerance.L,   [REFERENCE_dQ] = tolerance.dQ,
        [REFERENCE_dK] = tolerance.dK,        [REFERENCE_dV] = tolerance.dV, [REFERENCE_DBIAS] = tolerance.dbias,
        [REFERENCE_DSINKS] = tolerance.dsinks};
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(&results, tensor), *expected = *reference_member(&truth, tensor);
        int64_t shape[4];
        reference_shape(&problem, tensor, shape);
        if (got && expected && compare_close(what, tensor_name(tensor), shape, got, expected, tolerances[tensor], NULL))
            report_pass();
    }
    reference_close(&truth);
    reference_close(&results);
    operands_close(&operands);
    inputs_close(&inputs);
}

static void test_sinks_above_all_scores(void **state)
{
    static const char *const of_sinks[] = {"h1 q5 kv900 d64 mask_f32 sinks", "h1 q1 kv300 d64 sinks",
                                           "h2/1 q40 kv131 d40 sinks", "h1 q30 kv200 d16 softcap4 sinks"};
    static const char *const dtypes[] = {"f32", "bf16", "f64"};
    static const double above[] = {20, 80, 84, 86, 88, 90, 94, 98, 106, 300};
    (void)state;
    for (size_t i = 0; i < sizeof of_sinks / sizeof *of_sinks; i++)
        for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++)
            for (size_t n = 0; n < sizeof above / sizeof *above; n++) {
                char text[96];
                snprintf(text, sizeof text, "forward %s b1 %s", dtypes[d], of_sinks[i]);
                check_sinks(text, above[n]);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_scales, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_scales_of_bf16, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_large_values, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_values_that_are_not_finite, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_caps, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_weights_below_a_sink, test_context_open, test_context_close),
        cmocka_unit_test_setup_teardown(test_sinks_above_all_scores, test_context_open, test_context_close),
    };
    report_begin("test_range", SEED);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
