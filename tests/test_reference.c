/* Checks the reference itself: its gradients against central finite differences of
 * its own forward, for every option; its forward and band against cases that can be counted by hand; the
 * 16-bit conversions against all their values; and that tolerances are as small as they should be. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "reference/element.h"
#include "reference/tolerance.h"
#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1 };

static void allocate(const mfa_problem *problem, struct reference *results, int backward)
{
    memset(results, 0, sizeof *results);
    for (int tensor = REFERENCE_O; tensor < (backward ? REFERENCE_TENSORS : REFERENCE_dQ); tensor++)
        if (tensor != REFERENCE_O_LOW && (tensor != REFERENCE_DBIAS || problem->mask == MFA_MASK_ADDITIVE) &&
            (tensor != REFERENCE_DSINKS || problem->sinks))
            *reference_member(results, tensor) = reference_allocate(reference_count(problem, tensor));
}

static void solve(const struct inputs *inputs, struct reference *results)
{
    struct operands operands;
    operands_open(&operands, inputs, DENSE, 0);
    reference_attention(&operands.problem, &operands.buffers, results);
    operands_close(&operands);
}

/* The scalar whose gradients backward computes: the sum of dO * O and of dL * L. */
static double loss(const struct inputs *inputs)
{
    struct reference results;
    const mfa_problem *p = &inputs->problem;
    double sum = 0;
    allocate(p, &results, 0);
    solve(inputs, &results);
    for (int64_t at = 0; at < reference_count(p, REFERENCE_O); at++)
        sum += inputs->values[REFERENCE_dO][at] * results.O[at];
    for (int64_t at = 0; at < reference_count(p, REFERENCE_L) && inputs->values[REFERENCE_dL]; at++)
        if (isfinite(results.L[at]))
            sum += inputs->values[REFERENCE_dL][at] * results.L[at];
    reference_close(&results);
    return sum;
}

/* (f(x + h) - f(x - h)) / 2h for two steps, extrapolated: the error is of the order of h^4. */
static double central_difference(struct inputs *inputs, double *x)
{
    const double h = 0x1p-10, kept = *x;
    double difference[2];
    for (int n = 0; n < 2; n++) {
        double step = n ? h : 2 * h;
        *x = kept + step;
        double above = loss(inputs);
        *x = kept - step;
        difference[n] = (above - loss(inputs)) / (2 * step);
    }
    *x = kept;
    return (4 * difference[1] - difference[0]) / 3;
}

static void differentiate(const char *text, struct variant variant)
{
    static const enum reference_tensor pairs[][2] = {{REFERENCE_Q, REFERENCE_dQ},
                                                     {REFERENCE_K, REFERENCE_dK},
                                                     {REFERENCE_V, REFERENCE_dV},
                                                     {REFERENCE_MASK, REFERENCE_DBIAS},
                                                     {REFERENCE_SINKS, REFERENCE_DSINKS}};
    mfa_problem problem;
    struct inputs inputs;
    struct reference results;
    int64_t compared = 0;
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    inputs_open(&inputs, &problem, variant, SEED, text);
    double *sinks = inputs.values[REFERENCE_SINKS]; /* f32: whole steps, so that their sums with a step are exact */
    for (int64_t at = 0; sinks && at < reference_count(&inputs.problem, REFERENCE_SINKS); at++)
        sinks[at] = round(sinks[at] * 0x1p10) * 0x1p-10;
    allocate(&inputs.problem, &results, 1);
    solve(&inputs, &results);
    for (size_t pair = 0; pair < sizeof pairs / sizeof *pairs; pair++) {
        const double *gradient = *reference_member(&results, pairs[pair][1]);
        double *values = inputs.values[pairs[pair][0]];
        int64_t count = gradient ? reference_count(&inputs.problem, pairs[pair][1]) : 0;
        for (int64_t at = 0; at < count; at += count > 60 ? 3 : 1, compared++) {
            double expected = isfinite(values[at]) ? central_difference(&inputs, &values[at]) : 0;
            if (!(fabs(gradient[at] - expected) <= 1e-8 * (1 + fabs(expected)))) {
                print_error("%s: %s[%lld] is %.12g, by differences %.12g\n", text, tensor_name(pairs[pair][1]),
                            (long long)at, gradient[at], expected);
                fail();
            }
        }
    }
    print_message("%6lld gradients  %s\n", (long long)compared, text);
    reference_close(&results);
    inputs_close(&inputs);
}

static void test_gradients_are_finite_differences(void **state)
{
    (void)state;
    static const char *const problems[] = {
        "forward f64 b1 h1 q5 kv7 d3",
        "forward f64 b2 h2 q3 kv4 d3v5",
        "forward f64 b1 h4/2 q4 kv5 d3",
        "forward f64 b1 h1 q6 kv6 d3 causal",
        "forward f64 b1 h1 q4 kv7 d3 upper3",
        "forward f64 b1 h1 q8 kv8 d3 lower-2 upper1",
        "forward f64 b1 h1 q8 kv3 d3 upper-5",
        "forward f64 b1 h1 q5 kv7 d3 scale-0.7",
        "forward f64 b1 h1 q5 kv7 d3 scale0",
        "forward f64 b1 h1 q5 kv7 d3 scale2 softcap1.5",
        "forward f64 b1 h2 q7 kv7 d3 mask_bool",
        "forward f64 b1 h2 q7 kv7 d3 mask_f64",
        "forward f64 b2 h4/2 q6 kv7 d3v2 lower-3 upper2 scale1 softcap2 mask_f64",
        "forward f64 b2 h4/2 q6 kv4 d3v2 alibi",
        "forward f64 b1 h2 q4 kv7 d3 upper3 softcap2 mask_f64 alibi",
        "forward f64 b2 h4/2 q5 kv7 d3v2 sinks",
        "forward f64 b1 h2 q7 kv4 d3 upper-3 softcap2 mask_f64 alibi sinks",
        "forward f64 b1 h2 q20 kv37 d2 block_map_q16 block_map_kv16 mask_f64",
        "forward f64 b2 h4/2 q5 kv17 d3v2 dropout0.3",
        "forward f64 b1 h2 q7 kv14 d3 upper8 softcap2 mask_f64 alibi sinks dropout0.6",
        "forward f64 b1 h2 q4 kv9 d3 sinks dropout1",
    };
    for (size_t n = 0; n < sizeof problems / sizeof *problems; n++)
        for (int dlse = 0; dlse < 2; dlse++)
            differentiate(problems[n], (struct variant){.dlse = dlse});
}

static void test_dsinks_are_summed_along_stride_0(void **state)
{
    (void)state;
    for (int along = 1; along < 4; along++)
        differentiate("forward f64 b2 h2 q4 kv5 d3 sinks", (struct variant){.heads_broadcast = along, .dlse = 1});
}

static void test_dbias_of_a_broadcast_mask_is_summed(void **state)
{
    (void)state;
    for (int along = 1; along < 16; along++)
        differentiate("forward f64 b2 h2 q4 kv5 d3 softcap3 mask_f64",
                      (struct variant){.mask_broadcast = along, .dbias_broadcast = along, .dlse = along % 2});
}

/* With Q = 0 every visible key weighs the same: O is their mean, L the logarithm of their number. */
static void test_band_and_mask_by_counting(void **state)
{
    (void)state;
    static const int64_t edges[] = {INT64_MIN, -9, -5, -2, 0, 1, 4, 8, INT64_MAX};
    const int count = sizeof edges / sizeof *edges;
    mfa_problem problem;
    for (int at = 0; at < count * count; at++) {
        struct inputs inputs;
        struct reference results;
        mfa_problem_init(&problem, 1, 1, 1, 6, 7, 2, 1);
        problem.dtype = MFA_F64;
        problem.mask = MFA_MASK_BOOL;
        problem.lower = edges[at / count];
        problem.upper = edges[at % count];
        inputs_open(&inputs, &problem, (struct variant){0}, SEED, NULL);
        memset(inputs.values[REFERENCE_Q], 0, 12 * sizeof(double));
        allocate(&problem, &results, 0);
        solve(&inputs, &results);
        for (int i = 0; i < 6; i++) {
            double visible = 0, sum = 0;
            for (int j = 0; j < 7; j++)
                if (problem.lower <= j - i && j - i <= problem.upper && inputs.values[REFERENCE_MASK][i * 7 + j] != 0) {
                    visible++;
                    sum += inputs.values[REFERENCE_V][j];
                }
            assert_true(fabs(results.O[i] - (visible > 0 ? sum / visible : 0)) < 1e-14);
            assert_true(visible > 0 ? fabs(results.L[i] - log(visible)) < 1e-14 : results.L[i] == -INFINITY);
        }
        reference_close(&results);
        inputs_close(&inputs);
    }
    print_message("%d bands\n", count * count);
}

/* One key outweighs 2000 equal ones. In plain sums their roundings would go one way, and L and O be off by three
 * hundred times u. L and O are known, and dS = P (dP - D) is 0, since all values are equal. */
static void test_sums_of_equal_terms(void **state)
{
    (void)state;
    enum { KEYS = 2001 };
    const double u = 0x1p-53, value = 0.7;
    for (double score = -0.1; score > -3; score -= 0.1) {
        mfa_problem problem;
        struct inputs inputs;
        struct reference results;
        mfa_problem_init(&problem, 1, 1, 1, 1, KEYS, 1, 1);
        problem.dtype = MFA_F64;
        inputs_open(&inputs, &problem, (struct variant){0}, SEED, NULL);
        inputs.values[REFERENCE_Q][0] = inputs.values[REFERENCE_dO][0] = 1;
        for (int64_t j = 0; j < KEYS; j++) {
            inputs.values[REFERENCE_K][j] = j == KEYS / 2 ? 0 : score;
            inputs.values[REFERENCE_V][j] = value;
        }
        allocate(&problem, &results, 1);
        solve(&inputs, &results);
        const double L = log(1 + (KEYS - 1) * exp(score));
        if (!(fabs(results.L[0] - L) <= 32 * u && fabs(results.O[0] - value) <= 32 * u &&
              fabs(results.dQ[0]) <= 32 * u * -score))
            fail_msg("score %g: L is off by %g u, O by %g u, dQ by %g u", score, (results.L[0] - L) / u,
                     (results.O[0] - value) / u, results.dQ[0] / u);
        reference_close(&results);
        inputs_close(&inputs);
    }
}

/* A block map is a bool mask of which each block has one value. */
static void test_block_map_is_a_mask(void **state)
{
    (void)state;
    static const char *const sizes = "forward f64 b2 h4/2 q50 kv70 d3v2 lower-30 softcap2";
    mfa_problem mapped, masked;
    for (int along = 0; along < 12; along++) {
        struct inputs map_inputs, mask_inputs;
        struct reference of_map, of_mask;
        char text[128];
        snprintf(text, sizeof text, "%s block_map_q16 block_map_kv32", sizes);
        assert_int_equal(mfa_problem_parse(text, &mapped), MFA_OK);
        snprintf(text, sizeof text, "%s mask_bool", sizes);
        assert_int_equal(mfa_problem_parse(text, &masked), MFA_OK);
        inputs_open(&map_inputs, &mapped, (struct variant){.map_broadcast = along}, SEED, NULL);
        inputs_open(&mask_inputs, &masked, (struct variant){0}, SEED, NULL);
        const struct reference_view map =
            reference_view(&map_inputs.problem, REFERENCE_BLOCK_MAP, map_inputs.values[REFERENCE_BLOCK_MAP]);
        for (int tensor = REFERENCE_Q; tensor <= REFERENCE_dO; tensor++)
            if (map_inputs.values[tensor] && mask_inputs.values[tensor])
                memcpy(mask_inputs.values[tensor], map_inputs.values[tensor],
                       (size_t)reference_count(&masked, tensor) * sizeof(double));
        double *mask = mask_inputs.values[REFERENCE_MASK];
        for (int64_t at = 0; at < reference_count(&masked, REFERENCE_MASK); at++) {
            const int64_t j = at % 70, i = at / 70 % 50, h = at / 3500 % 4, b = at / 14000;
            mask[at] = map.values[b * map.batch + h * map.head + i / 16 * map.row + j / 32 * map.column];
        }
        allocate(&mapped, &of_map, 1);
        allocate(&masked, &of_mask, 1);
        solve(&map_inputs, &of_map);
        solve(&mask_inputs, &of_mask);
        for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++)
            if (*reference_member(&of_map, tensor))
                assert_memory_equal(*reference_member(&of_map, tensor), *reference_member(&of_mask, tensor),
                                    (size_t)reference_count(&mapped, tensor) * sizeof(double));
        reference_close(&of_map);
        reference_close(&of_mask);
        inputs_close(&map_inputs);
        inputs_close(&mask_inputs);
    }
}

static void test_grouped_heads_are_repeated_ones(void **state)
{
    (void)state;
    mfa_problem grouped, repeated;
    struct inputs grouped_inputs, repeated_inputs;
    struct reference shared, alone;
    assert_int_equal(mfa_problem_parse("forward f64 b2 h6/2 q5 kv7 d3v4 causal", &grouped), MFA_OK);
    assert_int_equal(mfa_problem_parse("forward f64 b2 h6 q5 kv7 d3v4 causal", &repeated), MFA_OK);
    inputs_open(&grouped_inputs, &grouped, (struct variant){.dlse = 1}, SEED, NULL);
    inputs_open(&repeated_inputs, &repeated, (struct variant){.dlse = 1}, SEED, NULL);
    for (int tensor = REFERENCE_Q; tensor <= REFERENCE_dL; tensor++) {
        int64_t count = grouped_inputs.values[tensor] ? reference_count(&repeated, tensor) : 0;
        int64_t head = tensor == REFERENCE_K ? 7 * 3 : 7 * 4;
        int of_keys = tensor == REFERENCE_K || tensor == REFERENCE_V;
        for (int64_t at = 0; at < count; at++) /* head h of 12 in both batches reads h / 3 */
            repeated_inputs.values[tensor][at] =
                grouped_inputs.values[tensor][of_keys ? at / head / 3 * head + at % head : at];
    }
    allocate(&grouped, &shared, 1);
    allocate(&repeated, &alone, 1);
    solve(&grouped_inputs, &shared);
    solve(&repeated_inputs, &alone);
    for (int64_t at = 0; at < reference_count(&grouped, REFERENCE_dQ); at++)
        assert_true(fabs(shared.dQ[at] - alone.dQ[at]) < 1e-14);
    for (int64_t at = 0; at < reference_count(&grouped, REFERENCE_dV); at++) {
        int64_t first = at / 28 * 3 * 28 + at % 28;
        assert_true(fabs(shared.dV[at] - alone.dV[first] - alone.dV[first + 28] - alone.dV[first + 56]) < 1e-13);
    }
    reference_close(&shared);
    reference_close(&alone);
    inputs_close(&grouped_inputs);
    inputs_close(&repeated_inputs);
}

/* Every 16-bit number survives a round trip; numbers between two round to the nearer, halfway to the even one. */
static void test_conversions(void **state)
{
    (void)state;
    static const int32_t dtypes[] = {MFA_F16, MFA_BF16};
    for (int n = 0; n < 2; n++) {
        uint16_t infinity = dtypes[n] == MFA_F16 ? 0x7c00 : 0x7f80;
        for (uint32_t bits = 0; bits < 0x10000; bits++) {
            uint16_t stored = (uint16_t)bits, back, magnitude = stored & 0x7fff;
            double value = element_load(dtypes[n], &stored, 0);
            element_store(dtypes[n], &back, 0, value);
            if (magnitude > infinity) {
                assert_true(isnan(value) && (back & 0x7fff) > infinity);
                continue;
            }
            assert_int_equal(back, stored);
            if (magnitude + 1 >= infinity || bits >> 15)
                continue;
            uint16_t next = stored + 1, even = stored & 1 ? next : stored;
            double above = element_load(dtypes[n], &next, 0), middle = (value + above) / 2;
            assert_true(above > value);
            assert_true(element_round(dtypes[n], middle) == element_load(dtypes[n], &even, 0));
            assert_true(element_round(dtypes[n], nextafter(middle, 0)) == value);
            assert_true(element_round(dtypes[n], nextafter(middle, above)) == above);
        }
    }
    assert_true(element_round(MFA_F16, 65519.999) == 65504 && isinf(element_round(MFA_F16, 65520)));
    assert_true(element_round(MFA_F16, -1e300) == -INFINITY && element_round(MFA_BF16, 1e-300) == 0);
    assert_true(element_round(MFA_BF16, 1 + 0x1p-8 + 0x1p-40) == 1 + 0x1p-7); /* by way of f32 it would be 1 */
}

/* A tolerance that grew would hide errors: these bounds are in ulp of the largest element. */
static void test_tolerances_are_a_few_ulp(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        double max_ulps;
    } problems[] = {{"forward f32 b1 h1 q64 kv64 d64", 40},          {"forward f16 b1 h1 q64 kv64 d64", 4},
                    {"forward bf16 b1 h1 q64 kv64 d64", 4},          {"forward f16 b1 h1 q64 kv64 d64 out_f32", 40},
                    {"forward bf16 b1 h1 q64 kv64 d64 out_f32", 40}, {"forward f64 b1 h1 q64 kv64 d64", 64},
                    {"forward f32 b1 h1 q64 kv512 d64", 64}};
    for (size_t n = 0; n < sizeof problems / sizeof *problems; n++) {
        mfa_problem problem;
        struct inputs inputs;
        struct operands operands;
        struct reference truth;
        struct tolerance tolerance;
        assert_int_equal(mfa_problem_parse(problems[n].text, &problem), MFA_OK);
        inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, SEED, NULL);
        allocate(&problem, &truth, 1);
        operands_open(&operands, &inputs, DENSE, 0);
        reference_attention(&operands.problem, &operands.buffers, &truth);
        reference_tolerance(&operands.problem, &operands.buffers, &truth, &tolerance);
        const double tolerances[] = {tolerance.O, tolerance.L, 0, tolerance.dQ, tolerance.dK, tolerance.dV};
        int is_tight = 1;
        print_message("%s:", problems[n].text);
        for (int tensor = REFERENCE_O; tensor < REFERENCE_DBIAS; tensor++) {
            const double *values = *reference_member(&truth, tensor);
            double largest = 0;
            if (tensor == REFERENCE_O_LOW)
                continue;
            for (int64_t at = 0; at < reference_count(&problem, tensor); at++)
                largest = fmax(largest, fabs(values[at]));
            double ulps = tolerances[tensor - REFERENCE_O] / largest / element_ulp(reference_dtype(&problem, tensor));
            print_message(" %s %.1f", tensor_name(tensor), ulps);
            is_tight = is_tight && ulps >= 1 && ulps <= (tensor == REFERENCE_L ? 8 : problems[n].max_ulps);
        }
        print_message(" ulp\n");
        assert_true(is_tight);
        operands_close(&operands);
        reference_close(&truth);
        inputs_close(&inputs);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversions),
        cmocka_unit_test(test_band_and_mask_by_counting),
        cmocka_unit_test(test_sums_of_equal_terms),
        cmocka_unit_test(test_block_map_is_a_mask),
        cmocka_unit_test(test_grouped_heads_are_repeated_ones),
        cmocka_unit_test(test_gradients_are_finite_differences),
        cmocka_unit_test(test_dsinks_are_summed_along_stride_0),
        cmocka_unit_test(test_dbias_of_a_broadcast_mask_is_summed),
        cmocka_unit_test(test_tolerances_are_a_few_ulp),
    };
    report_begin("test_reference", SEED);
    guarded_report_faults();
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
