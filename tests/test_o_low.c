/* o_low, the rounding error of O in f16 and bf16. Without it, results do not change; with it, D, and so dQ and dK, are
 * computed from the O before rounding. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "reference/element.h"
#include "support/cases.h"
#include "support/context.h"
#include "support/report.h"
#include "support/test_case.h"

enum { SEED = 1 };

static const char *const dtypes[] = {"f16", "bf16"};

static void open_test_case(struct test_case *test_case, struct one_case *one, const char *dtype, const char *rest,
                           uint64_t seed)
{
    char text[CASE_TEXT];
    snprintf(text, sizeof text, "both %s %s", dtype, rest);
    if (!case_parse(text, one))
        fail_msg("%s: %s", text, mfa_last_error());
    test_case_open(test_case, one, (struct variant){.dlse = 1}, seed);
}

static void run(const struct test_case *test_case, unsigned wanted, struct reference *results)
{
    struct operands operands;
    memset(results, 0, sizeof *results);
    operands_open(&operands, &test_case->inputs, DENSE, wanted);
    for (int pass = 0; pass < 2; pass++) {
        if (operands_run(&operands, test_context, 0) != MFA_OK)
            fail_msg("%s: %s", test_case->text, mfa_last_error());
        assert_null(operands_collect(&operands, results));
        if (pass == 0)
            operands_turn(&operands, DENSE, results);
    }
    operands_close(&operands);
}

/* With few keys, dK sums the D of hundreds of queries, so the errors that rounding O causes in D add up. O, L and dV do
 * not depend on D. */
static void test_gradients_are_more_exact(void **state)
{
    (void)state;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    for (int n = 0; n < 2; n++) {
        double without = 0, with = 0;
        for (uint64_t seed = 1; seed <= 8; seed++) {
            struct one_case one;
            struct test_case test_case;
            struct reference plain, exact;
            open_test_case(&test_case, &one, dtypes[n], "b1 h2/1 q300 kv3 d64", seed);
            run(&test_case, all, &plain);
            run(&test_case, all | OUTPUT(O_LOW), &exact);
            assert_true(test_case_is_right(&test_case, one.text, &plain));
            for (int tensor = REFERENCE_O; tensor <= REFERENCE_dV; tensor++)
                if (tensor != REFERENCE_O_LOW && tensor != REFERENCE_dQ && tensor != REFERENCE_dK)
                    assert_memory_equal(*reference_member(&plain, tensor), *reference_member(&exact, tensor),
                                        (size_t)reference_count(&one.problem, tensor) * sizeof(double));
            without += test_case_mean_square(&test_case, REFERENCE_dK, &plain);
            with += test_case_mean_square(&test_case, REFERENCE_dK, &exact);
            reference_close(&plain);
            reference_close(&exact);
            test_case_close(&test_case);
        }
        print_message("%s: dK is off by %.3g without o_low and by %.3g with it\n", dtypes[n], sqrt(without),
                      sqrt(with));
        assert_true(with < 0.9 * without);
    }
}

/* A caller that was compiled before o_low existed: the library must not read memory beyond its shorter struct. */
static void test_older_struct(void **state)
{
    (void)state;
    enum { ROWS = 4, DIM = 8 };
    static uint16_t in[ROWS * DIM], o[ROWS * DIM], low[ROWS * DIM], untouched[ROWS * DIM];
    mfa_problem problem;
    mfa_problem_init(&problem, 1, 1, 1, ROWS, ROWS, DIM, DIM);
    problem.dtype = MFA_F16;
    mfa_buffers buffers = {
        .size = offsetof(mfa_buffers, o_low), .q = {in, 0}, .k = {in, 0}, .v = {in, 0}, .o = {o, 0}, .o_low = {low, 0}};
    for (int n = 0; n < ROWS * DIM; n++)
        element_store(MFA_F16, in, n, 0.1 + 0.01 * n), low[n] = untouched[n] = 0xa5a5;
    assert_int_equal(buffers.size, 224);
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    assert_memory_equal(low, untouched, sizeof low);
    buffers.size = sizeof buffers;
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    assert_memory_not_equal(low, untouched, sizeof low);
    for (int n = 0; n < ROWS * DIM; n++)
        assert_true(element_load(MFA_F16, low, n) * 2 <= 0x1p-11);
}

/* Where O is rounded to infinity, o_low is 0: infinity less infinity would be NaN. */
static void test_overflow(void **state)
{
    (void)state;
    enum { COLUMNS = 21 }; /* vectors and a rest */
    for (int n = 0; n < 2; n++) {
        static uint16_t q, v[3 * COLUMNS], o[COLUMNS], low[COLUMNS];
        const int32_t dtype = n ? MFA_BF16 : MFA_F16;
        const double largest = n ? 0x1.fep127 : 65504;
        mfa_problem problem;
        mfa_problem_init(&problem, 1, 1, 1, 1, 3, 1, COLUMNS);
        problem.dtype = dtype;
        problem.k_layout.row = 0;
        for (int c = 0; c < COLUMNS; c++)
            for (int j = 0; j < 3; j++)
                element_store(dtype, v, j * COLUMNS + c, c % 3 == 0 ? INFINITY : c % 3 == 1 ? largest : 1 + j * 0.25);
        const mfa_buffers buffers = {
            .size = sizeof buffers, .q = {&q, 0}, .k = {&q, 0}, .v = {v, 0}, .o = {o, 0}, .o_low = {low, 0}};
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
        for (int c = 0; c < COLUMNS; c++) {
            const double O = element_load(dtype, o, c), rest = element_load(dtype, low, c);
            if (isfinite(O))
                assert_true(fabs(rest) <= element_ulp(dtype) / 2 * fabs(O));
            else
                assert_true(rest == 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients_are_more_exact),
        cmocka_unit_test(test_older_struct),
        cmocka_unit_test(test_overflow),
    };
    report_begin("test_o_low", SEED);
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
