/* Backward recomputes the P of forward, however large the scores are: both passes round scores alike. So a row's sum of
 * P differs from 1 by little more than the rounding of L. With scores of hundreds, as here, scores that were rounded
 * differently would make that difference ten times as large where one key outweighs the others. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "support/context.h"
#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1 };

/* dO is the unit matrix over all rows that share a KV head, so that dV = P^T dO is P^T. */
static void make_unit(const struct inputs *inputs)
{
    const mfa_problem *p = &inputs->problem;
    const int64_t rows = p->q_heads / p->kv_heads * p->q_len;
    assert_int_equal(p->value_dim, rows);
    for (int64_t at = 0; at < reference_count(p, REFERENCE_dO); at++)
        inputs->values[REFERENCE_dO][at] = at / rows % rows == at % rows;
}

/* Both passes: L and dV. */
static void run(const struct inputs *inputs, struct reference *results)
{
    struct operands operands;
    memset(results, 0, sizeof *results);
    operands_open(&operands, inputs, DENSE, FORWARD_OUTPUTS | OUTPUT(dV));
    assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
    assert_null(operands_collect(&operands, results));
    operands_turn(&operands, DENSE, results);
    assert_int_equal(operands_run(&operands, test_context, 0), MFA_OK);
    assert_null(operands_collect(&operands, results));
    operands_close(&operands);
}

/* Of one of the rows that share a KV head, which is counted through all batches. */
static double sum_of_P(const mfa_problem *p, const struct reference *results, int64_t kv_head, int64_t row)
{
    double sum = 0;
    for (int64_t j = 0; j < p->kv_len; j++)
        sum += results->dV[(kv_head * p->kv_len + j) * p->value_dim + row];
    return sum;
}

static void check_sums(const char *text)
{
    mfa_problem problem;
    struct inputs inputs;
    struct reference results;
    double size = 0;
    if (mfa_problem_parse(text, &problem) != MFA_OK)
        fail_msg("%s: %s", text, mfa_last_error());
    const double unit = problem.dtype == MFA_F64 ? 0x1p-53 : 0x1p-24;
    inputs_open(&inputs, &problem, (struct variant){0}, SEED, text);
    make_unit(&inputs);
    run(&inputs, &results);
    for (int64_t at = 0; at < reference_count(&problem, REFERENCE_L); at++) {
        const double sum = sum_of_P(&problem, &results, at / problem.value_dim, at % problem.value_dim);
        const double L = results.L[at], expected = L == -INFINITY ? 0 : 1;
        const double allowed = unit * (isfinite(L) ? 16 + 2 * fabs(L) : 0);
        if (!(fabs(sum - expected) <= allowed))
            fail_msg("%s: P of row %d, whose L is %g, sums up to 1 %+.2e; allowed is %.2e", text, (int)at, L, sum - 1,
                     allowed);
        size = fmax(size, isfinite(L) ? fabs(L) : 0);
    }
    assert_true(size > 150);
    reference_close(&results);
    inputs_close(&inputs);
}

static void test_sums_of_P(void **state)
{
    /* Rows that share a KV head are so few, or so many, that every instruction set uses decode kernels for both passes
     * or for none: these sum up a score in another order. */
    static const char *const texts[] = {
        "forward f32 b1 h3 q100 kv310 d64v100 scale8",
        "forward f32 b1 h3 q100 kv310 d64v100 scale8 causal",
        "forward f32 b1 h3 q97 kv200 d128v97 scale6 lower-30 upper40",
        "forward f32 b1 h3 q33 kv210 d70v33 scale8 mask_f32",
        "forward f32 b1 h3 q100 kv210 d96v100 scale8 mask_bool",
        "forward f32 b1 h3 q100 kv310 d64v100 scale8 softcap300",
        "forward f32 b1 h4 q1 kv310 d64v1 scale12",
        "forward f32 b2 h4/2 q1 kv310 d72v2 scale12 softcap300",
        "forward f32 b2 h4/2 q1 kv310 d96v2 scale12 mask_f32",
        "forward f64 b1 h3 q100 kv310 d64v100 scale8 causal",
        "forward f64 b2 h4/2 q1 kv310 d96v2 scale12 mask_f64",
    };
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        check_sums(texts[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_sums_of_P, test_context_open, test_context_close)};
    report_begin("test_scores", SEED);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
