/* Unusual inputs through the public interface: NaN with every payload, masks of the lowest finite number, no heads or
 * very many, large sinks, workspaces that are too small, extreme softcaps. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mfa.h"
#include "support/context.h"

enum { Q_LEN = 5, KV_LEN = 40, DIM = 8, MANY = 1024 };

static float q[MANY], k[MANY], v[MANY], o[MANY], lse[MANY], mask[MANY], d_o[MANY], dq[MANY], dk[MANY], dv[MANY];
static float dbias[MANY];
static uint8_t allowed[MANY];

static int set_up(void **state)
{
    for (int i = 0; i < MANY; i++) {
        q[i] = sinf((float)i), k[i] = cosf(1.7f * (float)i), v[i] = sinf(0.3f * (float)i + 1), d_o[i] = cosf((float)i);
        mask[i] = 0, allowed[i] = 1;
        o[i] = lse[i] = dq[i] = dk[i] = dv[i] = dbias[i] = NAN;
    }
    return test_context_open(state);
}

static mfa_problem problem_of(mfa_pass pass, mfa_mask kind, int64_t q_len)
{
    mfa_problem p;
    mfa_problem_init(&p, 1, 1, 1, q_len, KV_LEN, DIM, DIM);
    p.pass = pass, p.mask = kind;
    return p;
}

static mfa_buffers buffers_of(const mfa_problem *p)
{
    mfa_buffers b = {.size = sizeof b, .q = {q, 0}, .k = {k, 0}, .v = {v, 0}, .o = {o, 0}, .lse = {lse, 0}};
    if (p->mask != MFA_MASK_NONE)
        b.mask.base = p->mask == MFA_MASK_BOOL ? (void *)allowed : mask;
    if (p->pass == MFA_BACKWARD)
        b.d_o.base = d_o, b.dq.base = dq, b.dk.base = dk, b.dv.base = dv;
    return b;
}

static void run(const mfa_problem *p)
{
    const mfa_buffers b = buffers_of(p);
    const mfa_status status = mfa_attention(test_context, p, &b, NULL);
    if (status != MFA_OK)
        fail_msg("%s: %s", mfa_status_name(status), mfa_last_error());
}

/* A NaN of any payload in a key makes O NaN: integer arithmetic in exp2 could lose it. */
static void test_nan_of_any_payload_stays(void **state)
{
    static const uint32_t payloads[] = {0x7fc00000, 0x7fc00001, 0x7fffffff, 0xffffffff, 0xffc12345, 0x7fc001ff};
    static const int64_t lengths[] = {1, Q_LEN, 12 * Q_LEN};
    (void)state;
    for (size_t i = 0; i < sizeof payloads / sizeof *payloads; i++)
        for (size_t j = 0; j < sizeof lengths / sizeof *lengths; j++) {
            const int64_t q_len = lengths[j];
            const float kept = k[3 * DIM];
            const mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_NONE, q_len);
            memcpy(&k[3 * DIM], &payloads[i], sizeof *payloads);
            run(&p);
            k[3 * DIM] = kept;
            for (int64_t n = 0; n < q_len * DIM; n++)
                if (!isnan(o[n]))
                    fail_msg("K holds NaN 0x%08x, q_len %d, and O[%d] is %g", (unsigned)payloads[i], (int)q_len, (int)n,
                             (double)o[n]);
        }
}

/* The same for f32 operands of a bf16 problem: P and dS are rounded to bf16, perhaps by integer arithmetic. */
static void test_nan_beside_bf16(void **state)
{
    static const uint32_t payloads[] = {0x7fc00000, 0x7fffffff, 0xffffffff, 0x7fff8000};
    enum { ROWS = 12 * Q_LEN, KEY = 3 };
    static uint16_t in[4][ROWS * DIM], out[4][ROWS * DIM]; /* Q, K, V, dO; O, dQ, dK, dV */
    static float L[ROWS], dL[ROWS], bias[KV_LEN];
    (void)state;
    mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_ADDITIVE, ROWS);
    p.dtype = MFA_BF16, p.mask_layout = (mfa_layout){0, 0, 0, 1};
    mfa_buffers b = {.size = sizeof b, .q = {in[0], 0}, .k = {in[1], 0}, .v = {in[2], 0}, .mask = {bias, 0}};
    b.o.base = out[0], b.lse.base = L;
    for (int i = 0; i < ROWS * DIM; i++)
        for (int j = 0; j < 4; j++)
            in[j][i] = (uint16_t)(0x3f00 + (7 * i + j) % 64);
    memset(bias, 0, sizeof bias);
    memset(dL, 0, sizeof dL);
    assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);

    p.pass = MFA_BACKWARD;
    b.d_o.base = in[3], b.dlse.base = dL, b.dq.base = out[1], b.dk.base = out[2], b.dv.base = out[3];
    const struct {
        const char *name;
        float *at;
        int n, last;
    } places[] = {{"the mask", bias + KEY, 1, 3}, {"L", L, ROWS, 3}, {"dL", dL, ROWS, 2}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        for (size_t j = 0; j < sizeof payloads / sizeof *payloads; j++) {
            float kept[ROWS];
            memcpy(kept, places[i].at, (size_t)places[i].n * sizeof *kept);
            for (int n = 0; n < places[i].n; n++)
                memcpy(places[i].at + n, &payloads[j], sizeof *payloads);
            assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);
            memcpy(places[i].at, kept, (size_t)places[i].n * sizeof *kept);
            for (int of = 1; of <= places[i].last; of++) {
                const uint16_t bits = out[of][KEY * DIM];
                if ((bits & 0x7fff) <= 0x7f80)
                    fail_msg("%s holds NaN 0x%08x, and gradient %d of row %d is 0x%04x", places[i].name,
                             (unsigned)payloads[j], of, KEY, (unsigned)bits);
            }
        }
}

/* A bool mask, or -inf in an additive one, hides a key whose scores are NaN. */
static void test_mask_hides_nan_scores(void **state)
{
    (void)state;
    for (int kind = MFA_MASK_BOOL; kind <= MFA_MASK_ADDITIVE; kind++)
        for (int64_t q_len = 1; q_len <= Q_LEN; q_len += Q_LEN - 1) {
            const mfa_problem p = problem_of(MFA_FORWARD, (mfa_mask)kind, q_len);
            const float kept = k[3 * DIM];
            k[3 * DIM] = NAN;
            for (int64_t i = 0; i < q_len; i++)
                allowed[i * KV_LEN + 3] = 0, mask[i * KV_LEN + 3] = -INFINITY;
            run(&p);
            k[3 * DIM] = kept;
            for (int64_t n = 0; n < q_len * DIM; n++)
                assert_false(isnan(o[n]));
        }
}

/* The lowest finite number does not mask a key: a row of it gives the mean of V, as in PyTorch. */
static void test_lowest_finite_mask(void **state)
{
    static const float lowest[] = {-3.40282347e38f, -3.3895314e38f, -2e38f, -1e38f};
    (void)state;
    for (size_t i = 0; i < sizeof lowest / sizeof *lowest; i++)
        for (int64_t q_len = 1; q_len <= Q_LEN; q_len += Q_LEN - 1) {
            mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_ADDITIVE, q_len);
            for (int64_t n = 0; n < KV_LEN; n++)
                mask[n] = lowest[i];
            run(&p);
            for (int d = 0; d < DIM; d++) {
                double mean = 0;
                for (int j = 0; j < KV_LEN; j++)
                    mean += (double)v[j * DIM + d] / KV_LEN;
                if (!(fabs((double)o[d] - mean) < 1e-6))
                    fail_msg("mask %g, q_len %d: O[%d] is %g; the mean of V is %g", (double)lowest[i], (int)q_len, d,
                             (double)o[d], mean);
            }
            assert_true(isfinite(lse[0]));
            p.pass = MFA_BACKWARD;
            run(&p);
            for (int n = 0; n < KV_LEN * DIM; n++)
                assert_true(isfinite(dk[n]) && isfinite(dv[n]));
        }
}

/* No query heads, and gradients for a mask and a sink that are broadcast over them. */
static void test_no_query_heads(void **state)
{
    mfa_problem p;
    float dsink = NAN;
    (void)state;
    mfa_problem_init(&p, 1, 0, 2, Q_LEN, KV_LEN, DIM, DIM);
    p.pass = MFA_BACKWARD, p.mask = MFA_MASK_ADDITIVE, p.sinks = 1;
    p.mask_layout = p.dbias_layout = (mfa_layout){0, 0, KV_LEN, 1};
    p.dsinks_layout = (mfa_layout){0, 0, 0, 0};
    mfa_buffers b = buffers_of(&p);
    b.dbias.base = dbias, b.dsinks.base = &dsink;
    assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);
    assert_true(dsink == 0);
    for (int n = 0; n < Q_LEN * KV_LEN; n++)
        assert_true(dbias[n] == 0);
    for (int n = 0; n < 2 * KV_LEN * DIM; n++)
        assert_true(dk[n] == 0 && dv[n] == 0);
}

/* dsink of queries without keys, for dL = 1, 2, ...: L is the sink, and dsink the sum of dL. */
static void check_large_sink(int32_t dtype, int64_t q_len, float sink)
{
    mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_NONE, q_len);
    float dL[Q_LEN], sum = 0, dsink = NAN;
    p.dtype = dtype, p.sinks = 1, p.upper = -q_len;
    mfa_buffers b = buffers_of(&p);
    b.sinks.base = &sink;
    assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);
    for (int64_t n = 0; n < q_len; n++)
        sum += dL[n] = (float)(n + 1);
    p.pass = MFA_BACKWARD;
    b = buffers_of(&p);
    b.sinks.base = &sink, b.dlse.base = dL, b.dsinks.base = &dsink;
    assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);
    if (dsink != sum)
        fail_msg("%s, q_len %d, sink %g: dsink is %g; the sum of dL is %g", dtype == MFA_F32 ? "f32" : "bf16",
                 (int)q_len, (double)sink, (double)dsink, (double)sum);
}

/* The difference of the sink and L is exact, however large they are. */
static void test_gradient_of_large_sinks(void **state)
{
    static const float sinks[] = {1e4f, -3e5f, 1e30f, -1e30f, -6e37f, 1e38f};
    static const int32_t dtypes[] = {MFA_F32, MFA_BF16};
    (void)state;
    memset(d_o, 0, sizeof d_o);
    for (size_t i = 0; i < sizeof sinks / sizeof *sinks; i++)
        for (size_t j = 0; j < sizeof dtypes / sizeof *dtypes; j++)
            for (int64_t q_len = 1; q_len <= Q_LEN; q_len += Q_LEN - 1)
                check_large_sink(dtypes[j], q_len, sinks[i]);
}

static void test_workspace_too_small(void **state)
{
    const mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_NONE, Q_LEN);
    mfa_plan *plan = NULL;
    (void)state;
    assert_int_equal(mfa_plan_create(test_context, &p, &plan), MFA_OK);
    const size_t bytes = mfa_plan_workspace(plan);
    mfa_buffers b = buffers_of(&p);
    b.workspace.base = aligned_alloc(64, (bytes + 63) / 64 * 64);
    b.workspace_size = bytes - 1;
    o[0] = 42;
    assert_int_equal(mfa_plan_run(plan, &b, NULL), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "workspace_size"));
    assert_true(o[0] == 42);
    b.workspace_size = bytes;
    assert_int_equal(mfa_plan_run(plan, &b, NULL), MFA_OK);
    free(b.workspace.base);
    mfa_plan_destroy(plan);
}

static void test_strange_caps(void **state)
{
    static const double refused[] = {1e-40, 1e-31, 1e31, 3.5e38, 1e300}, good[] = {1e-30, 1e-3, 1e30};
    mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_NONE, Q_LEN);
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        p.softcap = refused[i];
        assert_int_equal(mfa_problem_supported(test_context, &p), MFA_UNSUPPORTED);
        assert_non_null(strstr(mfa_last_error(), "softcap"));
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        p.softcap = good[i];
        run(&p);
        for (int n = 0; n < Q_LEN * DIM; n++)
            assert_true(isfinite(o[n]));
    }
}

/* The stride of a single row has no effect, and may be any number, even one whose products would overflow. */
static void test_stride_of_one_row(void **state)
{
    (void)state;
    for (int64_t q_len = 1; q_len <= 4 * Q_LEN; q_len += 4 * Q_LEN - 1) {
        mfa_problem p = problem_of(MFA_FORWARD, MFA_MASK_NONE, q_len);
        p.kv_len = 1;
        p.k_layout.row = INT64_MAX, p.v_layout.row = INT64_MIN + 1;
        if (q_len == 1)
            p.q_layout.row = p.o_layout.row = p.d_o_layout.row = p.dq_layout.row = INT64_MAX;
        run(&p);
        for (int64_t n = 0; n < q_len * DIM; n++)
            assert_true(o[n] == v[n % DIM]);
        p.pass = MFA_BACKWARD;
        run(&p);
        for (int64_t n = 0; n < q_len * DIM; n++)
            assert_true(fabsf(dq[n]) < 1e-5f);
    }
}

/* Many heads of one query each, whose rows are padded: the size of the workspace does not wrap. */
static void test_workspace_of_many_heads(void **state)
{
    (void)state;
    for (int32_t dtype = MFA_F32; dtype <= MFA_F64; dtype++) {
        mfa_problem p;
        mfa_plan *plan;
        size_t before = 0;
        for (int log = 30; log <= 43; log++) {
            mfa_problem_init(&p, 1, INT64_C(1) << log, 1, 1, 3, 500, 512);
            p.pass = MFA_BACKWARD, p.dtype = dtype;
            assert_int_equal(mfa_plan_create(test_context, &p, &plan), MFA_OK);
            assert_true(mfa_plan_workspace(plan) > before + before / 2);
            before = mfa_plan_workspace(plan);
            mfa_plan_destroy(plan);
        }
        mfa_problem_init(&p, 1, INT64_C(1) << 44, 1, 1, 3, 500, 512);
        assert_int_equal(mfa_plan_create(test_context, &p, &plan), MFA_INVALID);
        assert_non_null(strstr(mfa_last_error(), "at most 2^43"));
    }
}

/* INT32_MAX threads: the plan clamps them to the largest number that the library supports. */
static void test_too_many_threads(void **state)
{
    mfa_problem p;
    mfa_plan *plan = NULL;
    char text[256];
    int threads;
    (void)state;
    mfa_problem_init(&p, 64, 64, 64, 1024, 1024, DIM, DIM);
    assert_int_equal(mfa_context_set_threads(test_context, INT32_MAX), MFA_OK);
    assert_int_equal(mfa_plan_create(test_context, &p, &plan), MFA_OK);
    assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
    assert_int_equal(sscanf(strstr(text, "threads"), "threads %d", &threads), 1);
    assert_true(threads <= 4096);
    mfa_plan_destroy(plan);
}

/* One key outweighs each of many others by so much that 1 + P is 1 in f32, and yet all others together count. */
static void test_many_small_weights_add_up(void **state)
{
    enum { KEYS = 1 << 16, ROWS = 64 };
    static const int64_t lengths[] = {1, 2, 5, ROWS};
    double rest = 0;
    float *const keys = calloc(KEYS, sizeof *keys), *const values = calloc(KEYS, sizeof *values);
    (void)state;
    assert_non_null(keys);
    assert_non_null(values);
    for (int64_t j = 0; j < KEYS; j++)
        keys[j] = j > 0 ? -17.2f - 0.01f * (float)(j * j % 97 + j * 7919 % 61) : 0, values[j] = 1;
    for (int64_t j = 1; j < KEYS; j++)
        rest += exp((double)keys[j]);
    for (int i = 0; i < ROWS; i++)
        q[i] = 1;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const double allowed = lengths[i] < ROWS ? 4e-6 : 1e-4; /* decode has more sums side by side */
        mfa_problem p;
        mfa_problem_init(&p, 1, 1, 1, lengths[i], KEYS, 1, 1);
        mfa_buffers b = {.size = sizeof b, .q = {q, 0}, .k = {keys, 0}, .v = {values, 0}, .o = {o, 0}, .lse = {lse, 0}};
        assert_int_equal(mfa_attention(test_context, &p, &b, NULL), MFA_OK);
        for (int64_t n = 0; n < lengths[i]; n++)
            if (fabs((double)lse[n] - log1p(rest)) > allowed || fabs((double)o[n] - 1) > allowed)
                fail_msg("%d queries: L is %.9g and not %.9g, O %.9g and not 1", (int)lengths[i], (double)lse[n],
                         log1p(rest), (double)o[n]);
    }
    free(keys);
    free(values);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, test_context_close)
    const struct CMUnitTest tests[] = {
        TEST(test_many_small_weights_add_up), TEST(test_nan_of_any_payload_stays), TEST(test_nan_beside_bf16),
        TEST(test_mask_hides_nan_scores),     TEST(test_lowest_finite_mask),       TEST(test_no_query_heads),
        TEST(test_gradient_of_large_sinks),   TEST(test_workspace_too_small),      TEST(test_strange_caps),
        TEST(test_stride_of_one_row),         TEST(test_workspace_of_many_heads),  TEST(test_too_many_threads),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    printf("%d passed, %d failed\n", (int)(sizeof tests / sizeof *tests) - failed, failed);
    return failed != 0;
}
