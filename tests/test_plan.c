/* Plans and calls through the public ABI: the description of a plan, one call against a plan, empty problems,
 * merged results. What is rejected: test_errors.c. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "support/context.h"
#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1 };

static mfa_problem parsed(const char *text)
{
    mfa_problem problem;
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    return problem;
}

/* --- Descriptions ----------------------------------------------------------------------------- */

static void test_describe(void **state)
{
    (void)state;
    mfa_problem problem = parsed("forward f32 b1 h2 q100 kv200 d64 causal");
    mfa_plan *plan;
    char text[256], small[256];
    assert_int_equal(mfa_plan_create(test_context, &problem, &plan), MFA_OK);
    assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
    print_message("%s\n", text);
    int block_q = 0, block_kv = 0, threads = 0, words;
    size_t workspace = 0;
    char pass[16], machine[16];
    words = sscanf(text, "cpu %15[a-z]_f32_d64_q%d_k%d_band_%15s threads %d workspace %zu", pass, &block_q, &block_kv,
                   machine, &threads, &workspace);
    assert_int_equal(words, 6);
    assert_string_equal(pass, "forward");
    assert_true(block_q > 0 && block_kv > 0 && threads > 0);
    assert_true(workspace == mfa_plan_workspace(plan));

    memset(small, 'x', sizeof small);
    assert_int_equal(mfa_plan_describe(plan, small, strlen(text)), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "capacity"));
    assert_int_equal(small[0], 'x');
    assert_int_equal(mfa_plan_describe(plan, small, strlen(text) + 1), MFA_OK);
    assert_string_equal(small, text);
    mfa_plan_destroy(plan);
    mfa_plan_destroy(NULL);
}

/* The kernel's key does not depend on lengths, and the workspace grows no faster than they do. */
static void test_growing_lengths(void **state)
{
    (void)state;
    static const char *const problems[] = {"forward f32 b1 h2 q64 kv64 d64", "backward f16 b2 h4/2 q64 kv64 d40 causal",
                                           "backward f32 b1 h1 q64 kv64 d64 mask_f32"};
    for (size_t n = 0; n < sizeof problems / sizeof *problems; n++) {
        char key[256] = "", text[256];
        for (int64_t length = 1024; length <= 1 << 20; length *= 4) {
            mfa_problem model = parsed(problems[n]), problem;
            mfa_problem_init(&problem, model.batch, model.q_heads, model.kv_heads, length, length, model.head_dim,
                             model.value_dim);
            problem.pass = model.pass;
            problem.dtype = model.dtype;
            problem.upper = model.upper;
            problem.mask = model.mask;
            mfa_plan *plan;
            assert_int_equal(mfa_plan_create(test_context, &problem, &plan), MFA_OK);
            assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
            print_message("length %7lld: %s\n", (long long)length, text);
            *strstr(text, " threads") = 0;
            if (*key)
                assert_string_equal(text, key);
            strcpy(key, text);
            /* a fixed amount, and a few rows of f32 for each query and key: much less than length squared */
            double rows = (double)(problem.batch * problem.q_heads * length) * (double)problem.head_dim * 4;
            assert_true((double)mfa_plan_workspace(plan) <= 16 * rows + 0x1p26);
            mfa_plan_destroy(plan);
        }
    }
    assert_true(mfa_plan_workspace(NULL) == 0);
}

/* --- Running ---------------------------------------------------------------------------------- */

static void assert_same(const struct operands *operands, struct reference *a, struct reference *b)
{
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        double *x = *reference_member(a, tensor), *y = *reference_member(b, tensor);
        assert_true(!x == !y);
        if (x)
            assert_memory_equal(x, y, (size_t)reference_count(&operands->problem, tensor) * sizeof *x);
    }
}

/* A plan with its own workspace or the context's, and the one-call form, give the same bits; the plan keeps no
 * pointer to its problem. */
static void test_plan_and_one_call_are_the_same(void **state)
{
    (void)state;
    enum { FORMS = 3 }; /* one call; a plan with a workspace of its own; a plan with the context's */
    static const char *const problems[] = {"forward f32 b2 h4/2 q33 kv70 d32 causal", "forward f16 b1 h2 q5 kv1500 d64",
                                           "forward f64 b1 h1 q70 kv30 d16v8 softcap2 mask_f32"};
    for (size_t n = 0; n < sizeof problems / sizeof *problems; n++) {
        struct inputs inputs;
        struct operands operands;
        struct reference results[FORMS];
        mfa_problem problem = parsed(problems[n]);
        inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, SEED, problems[n]);
        for (int form = 0; form < FORMS; form++) {
            memset(&results[form], 0, sizeof results[form]);
            operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
            for (int pass = 0; pass < 2; pass++) {
                mfa_problem given = operands.problem;
                mfa_plan *plan;
                assert_int_equal(mfa_plan_create(test_context, &given, &plan), MFA_OK);
                memset(&given, 0xff, sizeof given);
                mfa_buffers buffers = operands.buffers;
                if (pass == 0)
                    buffers.d_o = buffers.dlse = buffers.dq = buffers.dk = buffers.dv = buffers.dbias = buffers.dsinks =
                        (mfa_buffer){NULL, 0};
                assert_int_equal(form == FORMS - 1 ? mfa_plan_run(plan, &buffers, NULL)
                                                   : operands_run(&operands, test_context, form),
                                 MFA_OK);
                mfa_plan_destroy(plan);
                assert_null(operands_collect(&operands, &results[form]));
                if (pass == 0)
                    operands_turn(&operands, DENSE, &results[form]);
            }
            operands_close(&operands);
        }
        assert_same(&operands, &results[0], &results[1]);
        assert_same(&operands, &results[0], &results[2]);
        print_message("all forms: %s\n", problems[n]);
        for (int form = 0; form < FORMS; form++)
            reference_close(&results[form]);
        inputs_close(&inputs);
    }
}

/* With the layouts of mfa_problem_init, in which an empty tensor has strides 0. */
static void test_empty_problems(void **state)
{
    (void)state;
    float row[8] = {1, 2, 3, 4, 5, 6, 7, 8}, o[8], lse[2], dk[8], dv[8], dq[8];
    mfa_problem problem;
    mfa_problem_init(&problem, 1, 2, 2, 1, 0, 4, 4); /* no keys: zeros, and L = -inf */
    mfa_buffers buffers = {
        .size = sizeof buffers, .q = {row, 0}, .k = {row, 0}, .v = {row, 0}, .o = {o, 0}, .lse = {lse, 0}};
    memset(o, 0xff, sizeof o);
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    for (int at = 0; at < 8; at++)
        assert_true(o[at] == 0);
    assert_true(lse[0] == -INFINITY && lse[1] == -INFINITY);

    problem.pass = MFA_BACKWARD;
    memset(dq, 0xff, sizeof dq);
    buffers.d_o.base = row;
    buffers.dq.base = dq;
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    for (int at = 0; at < 8; at++)
        assert_true(dq[at] == 0);

    mfa_problem_init(&problem, 1, 2, 2, 0, 1, 4, 4); /* no queries: zero gradients of the keys */
    problem.pass = MFA_BACKWARD;
    memset(dk, 0xff, sizeof dk);
    memset(dv, 0xff, sizeof dv);
    buffers = (mfa_buffers){.size = sizeof buffers, .k = {row, 0}, .v = {row, 0}, .dk = {dk, 0}, .dv = {dv, 0}};
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    for (int at = 0; at < 8; at++)
        assert_true(dk[at] == 0 && dv[at] == 0);

    mfa_problem_init(&problem, 0, 2, 2, 5, 5, 4, 4); /* nothing at all, and no buffers either */
    buffers = (mfa_buffers){.size = sizeof buffers};
    assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    print_message("no keys, no queries, no batch\n");
}

/* Keys divided into two parts: merging O and L of the parts, and running backward of each part with the merged
 * ones, gives the results of the whole. */
static void test_backward_takes_merged_results(void **state)
{
    (void)state;
    enum { Q = 7, KV = 300, CUT = 130, D = 8 };
    static double q[Q * D], kv[2][KV * D], d_o[Q * D], o[3][Q * D], lse[3][Q];
    static double dq[3][Q * D], dk[2][KV * D], dv[2][KV * D];
    double *all[] = {q, kv[0], kv[1], d_o};
    for (int n = 0; n < 4; n++)
        for (int at = 0; at < (n == 1 || n == 2 ? KV : Q) * D; at++)
            all[n][at] = sin(1.7 * at + n);
    for (int part = 0; part < 3; part++) { /* the whole, the first part, the second part */
        mfa_problem problem;
        int first = part == 2 ? CUT : 0, end = part == 1 ? CUT : KV;
        mfa_problem_init(&problem, 1, 1, 1, Q, end - first, D, D);
        problem.dtype = MFA_F64;
        mfa_buffers buffers = {.size = sizeof buffers,
                               .q = {q, 0},
                               .k = {kv[0] + first * D, 0},
                               .v = {kv[1] + first * D, 0},
                               .o = {o[part], 0},
                               .lse = {lse[part], 0}};
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    }
    for (int i = 0; i < Q; i++) { /* into part 1 */
        double L = log(exp(lse[1][i]) + exp(lse[2][i]));
        assert_true(fabs(L - lse[0][i]) < 1e-12);
        for (int c = 0; c < D; c++) {
            double merged = exp(lse[1][i] - L) * o[1][i * D + c] + exp(lse[2][i] - L) * o[2][i * D + c];
            assert_true(fabs(merged - o[0][i * D + c]) < 1e-12);
            o[1][i * D + c] = merged;
        }
        lse[1][i] = L;
    }
    for (int part = 0; part < 3; part++) {
        mfa_problem problem;
        int first = part == 2 ? CUT : 0, end = part == 1 ? CUT : KV;
        mfa_problem_init(&problem, 1, 1, 1, Q, end - first, D, D);
        problem.dtype = MFA_F64;
        problem.pass = MFA_BACKWARD;
        mfa_buffers buffers = {.size = sizeof buffers,
                               .q = {q, 0},
                               .k = {kv[0] + first * D, 0},
                               .v = {kv[1] + first * D, 0},
                               .o = {o[part > 0], 0},
                               .lse = {lse[part > 0], 0},
                               .d_o = {d_o, 0},
                               .dq = {dq[part], 0},
                               .dk = {dk[part > 0] + first * D, 0},
                               .dv = {dv[part > 0] + first * D, 0}};
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    }
    for (int at = 0; at < Q * D; at++)
        assert_true(fabs(dq[0][at] - dq[1][at] - dq[2][at]) < 1e-12);
    for (int at = 0; at < KV * D; at++)
        assert_true(fabs(dk[0][at] - dk[1][at]) < 1e-12 && fabs(dv[0][at] - dv[1][at]) < 1e-12);
    print_message("%d keys in parts of %d and %d\n", KV, CUT, KV - CUT);
}

/* Models mask keys with the lowest finite number as well as with -inf. If a query attends to another key, results are
 * the same; if not, there must be no NaN. */
static void test_lowest_finite_mask(void **state)
{
    (void)state;
    enum { Q = 30, KV = 300, D = 8 };
    static float q[KV * D], mask[Q * KV], o[2][Q * D], lse[2][Q], dq[2][Q * D], dk[2][KV * D], dv[2][KV * D];
    mfa_problem problem;
    for (int at = 0; at < KV * D; at++)
        q[at] = (float)sin(1.7 * at);
    for (int lowest = 0; lowest < 2; lowest++) { /* the last query sees nothing */
        for (int at = 0; at < Q * KV; at++)
            mask[at] = at % KV % 7 == 0 && at % KV > 140 && at < (Q - 1) * KV ? 0.5F : lowest ? -FLT_MAX : -INFINITY;
        mfa_problem_init(&problem, 1, 1, 1, Q, KV, D, D);
        problem.mask = MFA_MASK_ADDITIVE;
        mfa_buffers buffers = {.size = sizeof buffers,
                               .q = {q, 0},
                               .k = {q, 0},
                               .v = {q, 0},
                               .mask = {mask, 0},
                               .o = {o[lowest], 0},
                               .lse = {lse[lowest], 0}};
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
        problem.pass = MFA_BACKWARD;
        buffers.d_o.base = q;
        buffers.dq.base = dq[lowest];
        buffers.dk.base = dk[lowest];
        buffers.dv.base = dv[lowest];
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OK);
    }
    for (int at = 0; at < (Q - 1) * D; at++)
        assert_true(fabsf(o[0][at] - o[1][at]) < 1e-6F && fabsf(dq[0][at] - dq[1][at]) < 1e-6F);
    for (int at = (Q - 1) * D; at < Q * D; at++)
        assert_true(o[0][at] == 0 && dq[0][at] == 0 && isfinite(o[1][at]) && isfinite(dq[1][at]));
    for (int at = 0; at < KV * D; at++)
        assert_true(isfinite(dk[0][at]) && isfinite(dk[1][at]) && isfinite(dv[0][at]) && isfinite(dv[1][at]));
    assert_true(lse[0][Q - 1] == -INFINITY && !isnan(lse[1][Q - 1]));
    print_message("%d queries, %d keys\n", Q, KV);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_describe),
        cmocka_unit_test(test_growing_lengths),
        cmocka_unit_test(test_plan_and_one_call_are_the_same),
        cmocka_unit_test(test_empty_problems),
        cmocka_unit_test(test_backward_takes_merged_results),
        cmocka_unit_test(test_lowest_finite_mask),
    };
    report_begin("test_plan", SEED);
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
