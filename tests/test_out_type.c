/* Outputs in f32 of operands in f16 and bf16: what is written is what would have been rounded to the dtype, and D is
 * computed from all digits of O. */
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

static void open_test_case(struct test_case *test_case, struct one_case *one, const char *dtype, const char *pass,
                           const char *rest, uint64_t seed)
{
    char text[CASE_TEXT];
    snprintf(text, sizeof text, "%s %s %s", pass, dtype, rest);
    if (!case_parse(text, one))
        fail_msg("%s: %s", text, mfa_last_error());
    test_case_open(test_case, one, (struct variant){.dlse = 1}, seed);
}

/* Runs the passes of the case. Backward gets the O and L of `given`, or, if that is NULL, of its own forward pass. */
static void run(const struct test_case *test_case, int32_t out_type, enum arrangement arrangement,
                const struct reference *given, struct reference *results)
{
    struct inputs inputs = test_case->inputs;
    struct operands operands;
    inputs.problem.out_type = out_type;
    memset(results, 0, sizeof *results);
    operands_open(&operands, &inputs, arrangement, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    for (int pass = 0; pass < (test_case->passes & CASE_BACKWARD ? 2 : 1); pass++) {
        if (operands_run(&operands, test_context, 0) != MFA_OK)
            fail_msg("%s: %s", test_case->text, mfa_last_error());
        assert_null(operands_collect(&operands, results));
        if (pass == 0)
            operands_turn(&operands, arrangement, given ? given : results);
    }
    operands_close(&operands);
}

/* Returns how many elements have more digits than the dtype. */
static int64_t expect_rounded(const struct test_case *s, enum reference_tensor tensor, struct reference *whole,
                              struct reference *rounded)
{
    const mfa_problem *p = &s->inputs.problem;
    const double *got = *reference_member(whole, tensor), *right = *reference_member(rounded, tensor);
    int64_t longer = 0;
    assert_true(!got == !right);
    for (int64_t n = 0; got && n < reference_count(p, tensor); n++) {
        const double value = element_round(reference_dtype(p, tensor), got[n]);
        if (value != right[n])
            fail_msg("%s: %s[%lld] is %.9g in f32 and %.9g in the dtype", s->text, tensor_name(tensor), (long long)n,
                     got[n], right[n]);
        longer += got[n] != value;
    }
    return longer;
}

/* Given the same O and L, both types of outputs come from the same sums. */
static void test_outputs_are_not_rounded(void **state)
{
    static const char *const cases[][2] = {
        {"both", "b2 h2 q33 kv35 d16"},
        {"both", "b1 h2 q97 kv390 d128 causal softcap3 sinks"},
        {"both", "b1 h4/2 q27 kv70 d17v33 causal mask_f32 alibi"},
        {"both", "b1 h4/2 q60 kv500 d32 dropout0.1 mask_bool"},
        {"both", "b2 h2 q150 kv290 d24 block_map_q64 block_map_kv64"},
        {"both", "b3 h4/2 q70 kv90 d64 total_q150 total_kv170 varlen_q varlen_kv seqused_k"},
        {"both", "b2 h8/2 q1 kv300 d64"},
        {"both", "b1 h4/1 q3 kv290 d33 lower-90 upper287 mask_f16 sinks"},
        {"forward", "b1 h2 q33 kv4000 d64"},
        {"forward", "b1 h8/1 q1 kv4099 d64"},
        {"forward", "b3 h4/1 q6 kv400 d64 causal kv_batch60 page_size7 k_int8 v_nf4 seqused_k"},
    };
    static const enum arrangement arrangements[] = {DENSE, COLUMN_MAJOR, PADDED};
    static const char *const dtypes[] = {"f16", "bf16"};
    (void)state;
    for (size_t n = 0; n < 2 * sizeof cases / sizeof *cases; n++) {
        struct one_case one;
        struct test_case s;
        struct reference rounded, whole;
        const enum arrangement arrangement = arrangements[n % 3];
        open_test_case(&s, &one, dtypes[n % 2], cases[n / 2][0], cases[n / 2][1], SEED);
        run(&s, MFA_OUT_SAME, arrangement, NULL, &rounded);
        run(&s, MFA_OUT_F32, arrangement, &rounded, &whole);
        for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
            const int64_t longer = expect_rounded(&s, tensor, &whole, &rounded);
            const int is_out = tensor == REFERENCE_O || (tensor >= REFERENCE_dQ && tensor <= REFERENCE_dV);
            assert_true(!*reference_member(&whole, tensor) || (longer > 0) == is_out);
        }
        reference_close(&rounded);
        reference_close(&whole);
        test_case_close(&s);
    }
}

/* With few keys, dK sums the D of hundreds of queries, so the errors that rounding O causes in D add up. */
static void test_D_is_of_all_digits(void **state)
{
    static const char *const dtypes[] = {"f16", "bf16"};
    (void)state;
    for (int n = 0; n < 2; n++) {
        double rounded_D = 0, exact_D = 0;
        for (uint64_t seed = 1; seed <= 8; seed++) {
            struct one_case one;
            struct test_case s;
            struct reference rounded, whole, of_rounded;
            open_test_case(&s, &one, dtypes[n], "both", "b1 h2/1 q300 kv3 d64", seed);
            run(&s, MFA_OUT_SAME, DENSE, NULL, &rounded);
            run(&s, MFA_OUT_F32, DENSE, &rounded, &of_rounded);
            run(&s, MFA_OUT_F32, DENSE, NULL, &whole);
            rounded_D += test_case_mean_square(&s, REFERENCE_dK, &of_rounded);
            exact_D += test_case_mean_square(&s, REFERENCE_dK, &whole);
            reference_close(&rounded);
            reference_close(&whole);
            reference_close(&of_rounded);
            test_case_close(&s);
        }
        print_message("%s: dK in f32 is off by %.3g with D of the rounded O and by %.3g with D of O in f32\n",
                      dtypes[n], sqrt(rounded_D), sqrt(exact_D));
        assert_true(exact_D < 0.9 * rounded_D);
    }
}

/* A caller that was compiled before out_type existed: what lies beyond its shorter struct is not read. */
static void test_older_struct(void **state)
{
    enum { ROWS = 4, DIM = 8 };
    static uint16_t in[ROWS * DIM];
    static float o[2 * ROWS * DIM];
    mfa_problem problem;
    mfa_buffers buffers = {.size = sizeof buffers, .q = {in, 0}, .k = {in, 0}, .v = {in, 0}, .o = {o, 0}};
    (void)state;
    for (int n = 0; n < ROWS * DIM; n++)
        element_store(MFA_F16, in, n, 0.1 + 0.01 * n);
    for (int older = 0; older < 2; older++) {
        mfa_problem_init(&problem, 1, 1, 1, ROWS, ROWS, DIM, DIM);
        problem.dtype = MFA_F16;
        problem.out_type = MFA_OUT_F32;
        problem.size = older ? offsetof(mfa_problem, out_type) : sizeof problem;
        for (int n = 0; n < 2 * ROWS * DIM; n++)
            o[n] = -1;
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
        for (int n = 0; n < ROWS * DIM; n++)
            assert_true(fabs(element_load(older ? MFA_F16 : MFA_F32, o, n) - 0.25) < 0.2);
        assert_true(o[ROWS * DIM] == -1 && (o[ROWS * DIM / 2] == -1) == older);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_outputs_are_not_rounded),
        cmocka_unit_test(test_D_is_of_all_digits),
        cmocka_unit_test(test_older_struct),
    };
    report_begin("test_out_type", SEED);
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
