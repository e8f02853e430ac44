/* Products of int8 (MFA_FAST_INT8): which problems have them, that results lie within the bound that include/mfa.h
 * states, and usually far within; what becomes of numbers that are not finite, very large or very small. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "reference/attention.h"
#include "support/context.h"
#include "support/generator.h"

enum { HEADS = 2, Q_LEN = 60, KV_LEN = 900, DIM = 64, QUERIES = HEADS * Q_LEN, KEYS = HEADS * KV_LEN };

static float Q[QUERIES][DIM], O[QUERIES][DIM], L[QUERIES], K_scale[KEYS], V_scale[KEYS];
static int8_t K[KEYS][DIM], V[KEYS][DIM];

static const mfa_buffers buffers = {.size = sizeof buffers,
                                    .q = {Q, 0},
                                    .k = {K, 0},
                                    .v = {V, 0},
                                    .o = {O, 0},
                                    .lse = {L, 0},
                                    .k_scale = {K_scale, 0},
                                    .v_scale = {V_scale, 0}};

/* Whether the plan of a line has them. */
static int has_int8(const char *line)
{
    mfa_problem problem;
    mfa_plan *plan = NULL;
    char text[256];
    if (mfa_problem_parse(line, &problem) != MFA_OK || mfa_plan_create(test_context, &problem, &plan) != MFA_OK)
        fail_msg("%s: %s", line, mfa_last_error());
    assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
    mfa_plan_destroy(plan);
    return strstr(text, " forward_int8_") != NULL;
}

#define CODES " k_int8 v_int8"

/* On sets that have them at all. */
static void test_which_problems(void **state)
{
    static const char *const with[] = {
        "forward bf16 b1 h1 q100 kv100 d64" CODES " fast_int8",
        "forward f16 b1 h1 q100 kv100 d512v1 scale-1" CODES " fast_int8",
        "forward f32 b1 h1 q1 kv100 d64 dropout0.1" CODES " fast_int8",
        "forward bf16 b1 h1 q100 kv100 d64 k_group64 v_group64" CODES " fast_int8",
    };
    static const char *const without[] = {
        "forward bf16 b1 h1 q100 kv100 d64" CODES,
        "forward f64 b1 h1 q100 kv100 d64" CODES " fast_int8",
        "forward bf16 b1 h1 q1 kv100 d64" CODES " fast_int8",
        "forward bf16 b1 h1 q100 kv100 d64 scale1.1" CODES " fast_int8",
        "forward bf16 b1 h1 q100 kv100 d64 scale1e-20" CODES " fast_int8",
    };
    const int any = has_int8(with[0]);
    (void)state;
    for (size_t n = 0; n < sizeof with / sizeof *with; n++)
        assert_int_equal(has_int8(with[n]), any);
    for (size_t n = 0; n < sizeof without / sizeof *without; n++)
        assert_int_equal(has_int8(without[n]), 0);
}

/* Normal numbers, quantised; one in `outliers` rows (0: none) and columns 3 and 40 of all K and Q are `size` times as
 * large. */
static void fill_in(int outliers, float size)
{
    struct generator r;
    generator_seed(&r, 1, "int8");
    for (int row = 0; row < KEYS; row++) {
        float k[DIM], v[DIM];
        const float of_row = outliers && row % outliers == 0 ? size : 1;
        for (int c = 0; c < DIM; c++) {
            const float of_column = outliers && (c == 3 || c == 40) ? size : 1;
            k[c] = of_column * (float)generator_normal(&r), v[c] = of_row * (float)generator_normal(&r);
            if (row < QUERIES)
                Q[row][c] = of_column * (float)generator_normal(&r);
        }
        assert_int_equal(mfa_kv_quantize(MFA_KV_INT8, MFA_F32, 1, DIM, 0, k, DIM, K[row], DIM, &K_scale[row], 1), 0);
        assert_int_equal(mfa_kv_quantize(MFA_KV_INT8, MFA_F32, 1, DIM, 0, v, DIM, V[row], DIM, &V_scale[row], 1), 0);
    }
}

static mfa_problem problem_of(const char *rest)
{
    char line[256];
    mfa_problem problem;
    snprintf(line, sizeof line, "forward f32 b1 h%d q%d kv%d d%d%s" CODES " fast_int8", HEADS, Q_LEN, KV_LEN, DIM,
             rest);
    assert_int_equal(mfa_problem_parse(line, &problem), MFA_OK);
    return problem;
}

static mfa_problem run(const char *rest)
{
    const mfa_problem problem = problem_of(rest);
    if (mfa_attention(test_context, &problem, &buffers, NULL) != MFA_OK)
        fail_msg("%s: %s", rest, mfa_last_error());
    return problem;
}

/* The most by which the scores of a query are off: of keys [0, end) of its head. */
static double score_bound(const mfa_problem *p, int64_t query, int64_t end)
{
    const int64_t first = query / Q_LEN * KV_LEN;
    double largest = 0, most = 0;
    for (int c = 0; c < DIM; c++)
        largest = fmax(largest, fabs((double)Q[query][c]));
    for (int64_t j = first; j < first + end; j++) {
        double sum = 0;
        for (int c = 0; c < DIM; c++)
            sum += fabs(K[j][c] * (double)K_scale[j]);
        most = fmax(most, sum);
    }
    return fabs(p->scale) * largest / 127 / 2 * most;
}

/* P of a query, of keys [0, end) of its head, by the exact L. */
static void weights(const mfa_problem *p, int64_t query, int64_t end, double exact_L, double *P)
{
    const int64_t first = query / Q_LEN * KV_LEN;
    for (int64_t j = 0; j < end; j++) {
        double dot = 0;
        for (int c = 0; c < DIM; c++)
            dot += (double)Q[query][c] * K[first + j][c];
        P[j] = exp(p->scale * dot * (double)K_scale[first + j] - exact_L);
    }
}

/* Checks the bound, in which blocks are taken to be the whole row; returns the relative error of O, in L2. */
static double check_bound(const char *rest)
{
    const mfa_problem p = run(rest);
    struct reference truth = {.O = reference_allocate(QUERIES * DIM), .L = reference_allocate(QUERIES)};
    double errors = 0, squares = 0, *P = reference_allocate(KV_LEN);
    reference_attention(&p, &buffers, &truth);
    for (int64_t i = 0; i < QUERIES; i++) {
        const int64_t first = i / Q_LEN * KV_LEN, last = p.upper == INT64_MAX ? KV_LEN - 1 : i % Q_LEN + p.upper;
        const double d = score_bound(&p, i, last + 1), rounding = 1e-5;
        double most = 0;
        weights(&p, i, last + 1, truth.L[i], P);
        for (int64_t j = 0; j <= last; j++)
            most = fmax(most, P[j] * (double)V_scale[first + j]);
        assert_true(fabs((double)L[i] - truth.L[i]) <= d + rounding * (1 + fabs(truth.L[i])));
        for (int c = 0; c < DIM; c++) {
            double values = 0, codes = 0;
            for (int64_t j = 0; j <= last; j++) {
                values += P[j] * fabs(V[first + j][c] * (double)V_scale[first + j]);
                codes += fabs((double)V[first + j][c]);
            }
            const double exact = truth.O[i * DIM + c], error = fabs((double)O[i][c] - exact);
            assert_true(error <= (exp(2 * d) - 1) * values + exp(2 * d) / 510 * most * codes + rounding);
            errors += error * error, squares += exact * exact;
        }
    }
    free(P);
    free(truth.O);
    free(truth.L);
    return sqrt(errors / squares);
}

static void test_bound(void **state)
{
    (void)state;
    fill_in(0, 1);
    const double normal = check_bound(""), causal = check_bound(" upper840");
    fill_in(50, 8);
    const double outliers = check_bound("");
    print_message("relative errors: normal %.4f, causal %.4f, outliers %.4f\n", normal, causal, outliers);
    assert_true(normal < 0.02 && causal < 0.02 && outliers < 0.1);
}

/* Which elements of a query's O are NaN: all, or none. */
static int is_nan(int64_t query)
{
    int count = 0;
    for (int c = 0; c < DIM; c++)
        count += isnan(O[query][c]);
    assert_true(count == 0 || count == DIM);
    return count == DIM;
}

/* A scale of a key that a query does not see changes no bit of its result. */
static void test_scales_of_hidden_keys(void **state)
{
    enum { SEEN = KV_LEN - 1 - 840 }; /* queries that do not see the last key */
    static float before[QUERIES][DIM];
    (void)state;
    fill_in(0, 1);
    run(" upper840");
    memcpy(before, O, sizeof O);
    V_scale[KV_LEN - 1] = V_scale[KEYS - 1] = 1e6f;
    run(" upper840");
    for (int64_t i = 0; i < QUERIES; i++)
        assert_int_equal(!memcmp(before[i], O[i], sizeof O[i]), i % Q_LEN < SEEN);
}

static void test_not_finite(void **state)
{
    (void)state;
    fill_in(0, 1);
    Q[5][7] = INFINITY, Q[9][0] = NAN, Q[11][63] = -INFINITY;
    run("");
    for (int64_t i = 0; i < QUERIES; i++)
        assert_int_equal(is_nan(i), i == 5 || i == 9 || i == 11);
    fill_in(0, 1);
    K_scale[KV_LEN + 20] = NAN; /* of the second head */
    run(" upper0");
    for (int64_t i = 0; i < QUERIES; i++)
        assert_int_equal(is_nan(i), i >= Q_LEN + 20);
    for (int n = 0; n < 4; n++) {
        fill_in(0, 1);
        K_scale[KV_LEN + 20] = n % 2 ? INFINITY : -INFINITY;
        run(n / 2 ? " upper0 softcap30" : " upper0");
        for (int64_t i = 0; i < QUERIES; i++)
            assert_int_equal(is_nan(i), i >= Q_LEN + 20);
    }
    fill_in(0, 1);
    V_scale[KV_LEN - 1] = NAN; /* of the first head */
    run("");
    for (int64_t i = 0; i < QUERIES; i++)
        assert_int_equal(is_nan(i), i < Q_LEN);
}

/* Queries near the largest and the least number, with K to match; values near the largest; scales of V that are 0 or
 * negative. Each must be as good as usual numbers. */
static void test_range(void **state)
{
    static const struct {
        float of_Q, of_K, of_V;
        const char *scale;
    } sizes[] = {{1, 1, 1, ""},
                 {0x1p124f, 0x1p-124f, 1, ""},
                 {0x1p-90f, 0x1p90f, 1, ""},
                 {0x1p-30f, 0x1p69f, 1, " scale1e-12"},
                 {0x1p10f, 0x1p-10f, -0x1p119f, ""},
                 {1, 1, 0x1p-100f, ""}};
    (void)state;
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        fill_in(0, 1);
        for (int row = 0; row < KEYS; row++) {
            K_scale[row] *= sizes[n].of_K;
            V_scale[row] *= sizes[n].of_V * (float)(row % 7 == 3 ? -1 : row % 5 != 0);
            for (int c = 0; c < DIM && row < QUERIES; c++)
                Q[row][c] *= sizes[n].of_Q;
        }
        const mfa_problem p = run(sizes[n].scale);
        struct reference truth = {.O = reference_allocate(QUERIES * DIM)};
        double errors = 0, squares = 0;
        reference_attention(&p, &buffers, &truth);
        for (int64_t at = 0; at < QUERIES * DIM; at++) {
            const double exact = truth.O[at] / (double)fabsf(sizes[n].of_V);
            const double got = (double)O[at / DIM][at % DIM] / (double)fabsf(sizes[n].of_V);
            errors += (got - exact) * (got - exact), squares += exact * exact;
        }
        free(truth.O);
        if (!(errors < 0.02 * 0.02 * squares))
            fail_msg("sizes %d: a relative error of %g", (int)n, sqrt(errors / squares));
    }
    memset(Q, 0, sizeof Q); /* all weights are 1 / KV_LEN */
    run("");
    assert_true(fabsf(L[0] - logf(KV_LEN)) < 1e-5f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_which_problems),
        cmocka_unit_test(test_bound),
        cmocka_unit_test(test_scales_of_hidden_keys),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_range),
    };
    return cmocka_run_group_tests(tests, test_context_open, test_context_close);
}
