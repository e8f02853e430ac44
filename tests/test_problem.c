/* Problems: invalid ones and their messages, the canonical form, and the line of text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/key.h"
#include "core/operand.h"
#include "core/problem.h"
#include "mfa.h"
#include "support/random.h"

static mfa_problem sound(void)
{
    mfa_problem problem;
    mfa_problem_make(&problem, 2, 8, 2, 100, 300, 64, 32);
    return problem;
}

/* Every failure is a sentence that holds `words`, and leaves the result as it was. */
static void expect(mfa_status status, const mfa_problem *problem, const char *words)
{
    mfa_problem canonical, before;
    memset(&canonical, 0x5a, sizeof canonical);
    before = canonical;
    const mfa_status given = mfa_problem_check(problem, &canonical);
    if (given != status || (status != MFA_OK && !strstr(mfa_last_error(), words)))
        print_error("expected \"%s\", got %s: %s\n", words, mfa_status_name(given), mfa_last_error());
    assert_int_equal(given, status);
    if (status == MFA_OK)
        return;
    assert_non_null(strstr(mfa_last_error(), words));
    assert_memory_equal(&canonical, &before, sizeof before);
}

#define EXPECT(status, member, value, words) \
    do {                                     \
        mfa_problem changed = sound();       \
        changed.pass = MFA_BACKWARD;         \
        changed.member = (value);            \
        expect(status, &changed, words);     \
    } while (0)

static void test_members(void **state)
{
    (void)state;
    EXPECT(MFA_OK, dtype, MFA_F64, "");
    EXPECT(MFA_OK, size, offsetof(mfa_problem, slopes_layout), ""); /* the first version's */
    EXPECT(MFA_INVALID, size, offsetof(mfa_problem, slopes_layout) - 1, "size of mfa_problem is");
    EXPECT(MFA_INVALID, size, sizeof(mfa_problem) + 8, "size of mfa_problem is");
    EXPECT(MFA_INVALID, size, 0, "size of mfa_problem is 0");
    EXPECT(MFA_INVALID, pass, 2, "pass is 2");
    EXPECT(MFA_INVALID, pass, -1, "pass is -1");
    EXPECT(MFA_INVALID, device, 2, "device is 2");
    EXPECT(MFA_INVALID, dtype, 4, "dtype is 4");
    EXPECT(MFA_INVALID, dtype, -1, "dtype is -1");
    EXPECT(MFA_INVALID, mask, 3, "mask is 3");
    EXPECT(MFA_INVALID, alibi, -1, "alibi is -1");
    EXPECT(MFA_INVALID, batch, -1, "batch is -1; it must be 0 or more");
    EXPECT(MFA_INVALID, q_heads, -8, "q_heads is -8");
    EXPECT(MFA_INVALID, kv_heads, -2, "kv_heads is -2");
    EXPECT(MFA_INVALID, q_len, INT64_MIN, "q_len is -9223372036854775808");
    EXPECT(MFA_INVALID, kv_len, -1, "kv_len is -1");
    EXPECT(MFA_INVALID, head_dim, -1, "head_dim is -1");
    EXPECT(MFA_INVALID, value_dim, -1, "value_dim is -1");
    EXPECT(MFA_INVALID, kv_heads, 3, "q_heads is 8 and kv_heads is 3; q_heads must be a multiple of kv_heads");
    EXPECT(MFA_INVALID, kv_heads, 16, "q_heads is 8 and kv_heads is 16");
    EXPECT(MFA_INVALID, kv_heads, 0, "q_heads is 8 and kv_heads is 0");
    EXPECT(MFA_OK, q_heads, 0, "");
    EXPECT(MFA_UNSUPPORTED, head_dim, 0, "head_dim is 0; kernels exist for 1 to 512");
    EXPECT(MFA_UNSUPPORTED, head_dim, 513, "head_dim is 513");
    EXPECT(MFA_UNSUPPORTED, value_dim, 513, "value_dim is 513");
    EXPECT(MFA_OK, head_dim, 512, "");
    EXPECT(MFA_INVALID, softcap, -1.0, "softcap is -1");
    EXPECT(MFA_INVALID, softcap, (double)NAN, "softcap is");
    EXPECT(MFA_INVALID, softcap, (double)INFINITY, "softcap is inf");
    EXPECT(MFA_INVALID, scale, (double)NAN, "scale is nan; it must be finite");
    EXPECT(MFA_INVALID, scale, -(double)INFINITY, "scale is -inf; it must be finite");
    EXPECT(MFA_UNSUPPORTED, scale, -1e61, "scale is -1e+61; kernels exist for 0 and, of either sign, 1e-60 to 1e60");
    EXPECT(MFA_UNSUPPORTED, scale, 1e-61, "scale is 1e-61");
    EXPECT(MFA_OK, scale, -1e60, "");
    EXPECT(MFA_OK, scale, 1e-60, "");
    EXPECT(MFA_OK, scale, 0.0, "");
    EXPECT(MFA_OK, mask_dtype, 77, ""); /* no additive mask */
}

static void test_empty(void **state)
{
    (void)state;
    EXPECT(MFA_OK, batch, 0, "");
    EXPECT(MFA_OK, q_len, 0, "");
    EXPECT(MFA_OK, kv_len, 0, "");
    mfa_problem problem;
    mfa_problem_make(&problem, 1, 0, 0, 4, 4, 8, 8);
    expect(MFA_OK, &problem, "");
    problem.o_layout = (mfa_layout){0, 0, 0, 0}; /* no element of it exists */
    expect(MFA_OK, &problem, "");
}

static void test_overflow(void **state)
{
    (void)state;
    EXPECT(MFA_INVALID, batch, INT64_MAX, "batch is 9223372036854775807");
    EXPECT(MFA_INVALID, q_len, INT64_MAX, "their product must be at most 2^43");
    EXPECT(MFA_INVALID, q_len, INT64_C(1) << 40, "their product must be at most 2^43");
    EXPECT(MFA_INVALID, kv_len, INT64_C(1) << 42, "their product must be at most 2^43");
    EXPECT(MFA_INVALID, q_layout.row, INT64_MAX, "q_layout is");
    EXPECT(MFA_INVALID, q_layout.row, INT64_MIN, "q_layout is");
    EXPECT(MFA_INVALID, k_layout.row, INT64_MAX / 299 / 4 + 1, "k_layout is");
    EXPECT(MFA_OK, k_layout.row, INT64_MAX / 299 / 4 - 200, "");
    EXPECT(MFA_INVALID, v_layout.head, INT64_MAX / 4 + 1, "the bytes from the first element to the last");
    EXPECT(MFA_INVALID, dv_layout.batch, -(INT64_MAX / 2), "dv_layout is");
    EXPECT(MFA_OK, lse_layout.column, INT64_MAX, ""); /* it has no columns */
    EXPECT(MFA_OK, mask_layout.row, INT64_MAX, "");   /* there is no mask */

    mfa_problem problem = sound(); /* each side alone is valid, both together are not */
    problem.k_layout.head = INT64_MAX / 8;
    problem.k_layout.batch = -(INT64_MAX / 8) - 1;
    expect(MFA_INVALID, &problem, "k_layout is");

    mfa_problem_make(&problem, 2, 2, 2, 1, 1, 1, 1);
    problem.k_layout.head = INT64_MAX;
    problem.k_layout.batch = -INT64_MAX;
    expect(MFA_INVALID, &problem, "k_layout is");

    mfa_problem_make(&problem, 1, 1, 1, INT64_C(1) << 40, INT64_C(1) << 40, 8, 8);
    expect(MFA_OK, &problem, "");
    problem.mask = MFA_MASK_BOOL;
    expect(MFA_INVALID, &problem, "mask_layout is");
    problem.mask_layout = (mfa_layout){0, 0, 0, 1};
    expect(MFA_OK, &problem, "");
    problem.mask = MFA_MASK_ADDITIVE;
    problem.mask_dtype = 4;
    expect(MFA_INVALID, &problem, "mask_dtype is 4");
}

static void test_layouts_of_the_pass(void **state)
{
    (void)state;
    mfa_problem problem = sound();
    problem.dq_layout.row = INT64_MAX; /* a forward pass has no dq */
    expect(MFA_OK, &problem, "");
    problem.pass = MFA_BACKWARD;
    expect(MFA_INVALID, &problem, "dq_layout is");

    problem = sound();
    problem.k_layout = problem.v_layout = problem.q_layout = (mfa_layout){0, 0, 0, 0};
    expect(MFA_OK, &problem, ""); /* inputs may be broadcast */
    problem.o_layout.row = 0;
    expect(MFA_INVALID, &problem, "o_layout.row is 0 over 100 elements; an output must not overlap itself");
    problem.pass = MFA_BACKWARD;
    expect(MFA_OK, &problem, ""); /* o is an input there */

    problem = sound();
    problem.lse_layout.head = 0;
    expect(MFA_INVALID, &problem, "lse_layout.head is 0");

    EXPECT(MFA_INVALID, dq_layout.column, 0, "dq_layout.column is 0 over 64");
    EXPECT(MFA_INVALID, dk_layout.head, 0, "dk_layout.head is 0 over 2");
    EXPECT(MFA_INVALID, dv_layout.batch, 0, "dv_layout.batch is 0 over 2");
    EXPECT(MFA_OK, d_o_layout.row, 0, "");
    EXPECT(MFA_OK, dlse_layout.row, 0, "");

    problem = sound();
    problem.pass = MFA_BACKWARD;
    problem.mask = MFA_MASK_ADDITIVE;
    problem.dbias_layout = (mfa_layout){0, 0, 0, 1}; /* the gradient is summed */
    expect(MFA_OK, &problem, "");
    problem.dbias_layout.row = INT64_MAX;
    expect(MFA_INVALID, &problem, "dbias_layout is");

    mfa_problem_make(&problem, 1, 1, 1, 5, 5, 8, 8);
    problem.o_layout.batch = problem.o_layout.head = 0; /* along dimensions of 1 */
    expect(MFA_OK, &problem, "");
}

static void check_band(int64_t lower, int64_t upper, int64_t canonical_lower, int64_t canonical_upper)
{
    mfa_problem problem = sound(), canonical;
    problem.lower = lower;
    problem.upper = upper;
    assert_int_equal(mfa_problem_check(&problem, &canonical), MFA_OK);
    assert_int_equal(canonical.lower, canonical_lower);
    assert_int_equal(canonical.upper, canonical_upper);
}

static void test_canonical(void **state)
{
    (void)state;
    check_band(MFA_BAND_OPEN_LOWER, MFA_BAND_OPEN_UPPER, -100, 300);
    check_band(-5, 0, -5, 0);
    check_band(INT64_MAX, INT64_MIN, 300, -100);
    check_band(7, 3, 7, 3);
    mfa_problem problem = sound(), canonical;
    problem.dtype = MFA_BF16;
    problem.mask_dtype = MFA_F64;
    assert_int_equal(mfa_problem_check(&problem, &canonical), MFA_OK);
    assert_int_equal(canonical.mask_dtype, MFA_BF16);
    problem.mask = MFA_MASK_ADDITIVE;
    assert_int_equal(mfa_problem_check(&problem, &canonical), MFA_OK);
    assert_int_equal(canonical.mask_dtype, MFA_F64);
    assert_int_equal(canonical.size, sizeof canonical);
    problem.out_type = MFA_OUT_F32;
    assert_int_equal(mfa_problem_check(&problem, &canonical), MFA_OK);
    assert_int_equal(canonical.out_type, MFA_OUT_F32);
    problem.dtype = MFA_F32;
    assert_int_equal(mfa_problem_check(&problem, &canonical), MFA_OK);
    assert_int_equal(canonical.out_type, MFA_OUT_SAME);
    /* An open band is the same from either end, of sequences of their own lengths, too. */
    problem.seqused_k = 1;
    for (problem.bottom_right = 0; problem.bottom_right <= 1; problem.bottom_right++) {
        mfa_problem same;
        assert_int_equal(mfa_problem_check(&problem, problem.bottom_right ? &same : &canonical), MFA_OK);
        if (problem.bottom_right)
            assert_memory_equal(&same, &canonical, sizeof same);
    }
}

static void test_roles(void **state)
{
    (void)state;
    mfa_problem problem = sound();
    int forward = 0, backward = 0, with_mask = 0;
    for (int i = 0; i < MFA_OPERAND_COUNT; i++) {
        problem.pass = MFA_FORWARD;
        forward += mfa_operand_role(&mfa_operands[i], &problem) != 0;
        problem.pass = MFA_BACKWARD;
        backward += mfa_operand_role(&mfa_operands[i], &problem) != 0;
        problem.mask = MFA_MASK_ADDITIVE;
        with_mask += mfa_operand_role(&mfa_operands[i], &problem) != 0;
        problem.mask = MFA_MASK_NONE;
    }
    assert_int_equal(forward, 5);   /* q k v o lse */
    assert_int_equal(backward, 10); /* and d_o dlse dq dk dv */
    assert_int_equal(with_mask, 12);
    problem.alibi = 1;
    assert_int_equal(mfa_operand_role(&mfa_operands[MFA_OPERAND_slopes], &problem), MFA_ROLE_READ | MFA_ROLE_REQUIRED);
}

/* Lines that parsing and printing leave unchanged. */
static const char *const lines[] = {
    "forward f32 b1 h1 q1 kv1 d1",
    "forward f16 b2 h8/2 q512 kv512 d64 causal",
    "forward f16 b2 h8/2 q512 kv512 d64 causal softcap30 mask_bool",
    "backward bf16 b1 h4 q17 kv1031 d96v64 lower-255 upper0 scale0.3",
    "backward f64 b0 h0 q0 kv0 d512v1 upper-3 mask_f32",
    "forward f32 b1 h0/4 q1 kv1 d8 lower5 upper-5 scale-inf mask_f16",
    "forward f32 b1 h1 q1 kv1 d8 lower-9223372036854775807 upper9223372036854775806 mask_bf16",
    "forward f32 b9223372036854775807 h1 q1 kv1 d8 scale-0.1 softcap1e-300 mask_f64",
    "forward f32 b1 h1 q1 kv1 d8 scale0.30000000000000004",
    "forward f32 b1 h1 q1 kv1 d8 scale0",
    "forward f32 b1 h1 q1 kv1 d8 scale-0 metal",
    "forward f32 b1 h4/2 q300 kv500 d8 block_map_q128 block_map_kv64",
    "backward bf16 b1 h1 q17 kv1 d8 causal block_map_q16 block_map_kv48 scale2 mask_bool metal",
    "forward f32 b1 h1 q1 kv1 d8 block_map_q-3 block_map_kv17",
    "backward bf16 b1 h1 q1 kv1 d8 causal softcap30 dropout0.1 mask_bool alibi sinks metal",
    "backward f32 b3 h4 q7 kv9 d32 causal total_q15 total_kv17 varlen_q varlen_kv seqused_k leftpad_k bottom_right",
    "forward f16 b3 h4 q1 kv90 d32 kv_batch100 page_size16 seqused_k",
    "backward bf16 b3 h4 q7 kv9 d32 causal varlen_q bottom_right out_f32 metal",
    "forward f64 b3 h4 q1 kv90 d32 kv_batch5 cache_batch_idx metal",
    "forward f32 b1 h1 q1 kv1 d8 total_q1 total_kv7 kv_batch2 page_size9223372036854775807",
};

static void test_lines(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        mfa_problem problem, again;
        char text[512];
        assert_int_equal(mfa_problem_parse(lines[i], &problem), MFA_OK);
        assert_int_equal(mfa_problem_print(&problem, text, sizeof text), MFA_OK);
        assert_string_equal(text, lines[i]);
        assert_int_equal(mfa_problem_parse(text, &again), MFA_OK);
        assert_memory_equal(&problem, &again, sizeof problem);

        const size_t length = strlen(lines[i]);
        memset(text, 'x', sizeof text);
        assert_int_equal(mfa_problem_print(&problem, text, length), MFA_INVALID);
        assert_int_equal(text[0], 'x');
        assert_int_equal(mfa_problem_print(&problem, text, length + 1), MFA_OK);
        assert_string_equal(text, lines[i]);
        assert_int_equal(text[length + 1], 'x');
    }
}

/* Numbers at the limits of their range, and any bits. */
static double draw_number(struct generator *r)
{
    static const double numbers[] = {0, -0.0, 1, -1, 0.1, 30, 1e-30, 1e300, -5e-324, INFINITY, -INFINITY, NAN};
    const int64_t count = sizeof numbers / sizeof *numbers, n = random_between(r, 0, 2 * count);
    const uint64_t bits = generator_next(r);
    double number;
    memcpy(&number, &bits, sizeof number);
    return n < count ? numbers[n] : number;
}

static int64_t draw_size(struct generator *r)
{
    static const int64_t sizes[] = {0, 0, 1, 2, 17, 64, INT64_MAX, -1, INT64_MIN};
    const int64_t n = random_between(r, 0, 99); /* few are negative, or most problems would be invalid */
    return n < 9 ? sizes[n] : random_between(r, 0, 1000);
}

static int64_t draw_bound(struct generator *r)
{
    static const int64_t bounds[] = {MFA_BAND_OPEN_LOWER, MFA_BAND_OPEN_UPPER, 0, INT64_MIN + 1, INT64_MAX - 1};
    const int64_t n = random_between(r, 0, 9);
    return n < 5 ? bounds[n] : random_between(r, -100, 100);
}

static mfa_problem draw_problem(struct generator *r)
{
    mfa_problem p;
    mfa_problem_make(&p, draw_size(r), draw_size(r), draw_size(r), draw_size(r), draw_size(r), draw_size(r),
                     draw_size(r));
    p.pass = (int32_t)random_between(r, MFA_FORWARD, MFA_BACKWARD);
    p.device = (int32_t)random_between(r, MFA_DEVICE_CPU, MFA_DEVICE_METAL);
    p.dtype = (int32_t)random_between(r, MFA_F32, MFA_F64);
    p.mask = (int32_t)random_between(r, MFA_MASK_NONE, MFA_MASK_ADDITIVE);
    p.mask_dtype = (int32_t)random_between(r, MFA_F32, p.mask == MFA_MASK_ADDITIVE ? MFA_F64 : 9);
    p.out_type = (int32_t)random_between(r, MFA_OUT_SAME, MFA_OUT_F32);
    p.alibi = (int32_t)random_between(r, 0, 1), p.sinks = (int32_t)random_between(r, 0, 1);
    p.lower = draw_bound(r);
    p.upper = draw_bound(r);
    if (random_between(r, 0, 1))
        p.scale = draw_number(r);
    if (random_between(r, 0, 1))
        p.softcap = draw_number(r);
    if (random_between(r, 0, 1))
        p.dropout = draw_number(r);
    if (random_between(r, 0, 1)) {
        p.block_map_q = draw_bound(r), p.block_map_kv = draw_bound(r);
        mfa_problem_make_dense(&p);
    }
    if (random_between(r, 0, 1)) {
        p.varlen_q = (int32_t)random_between(r, 0, 1), p.varlen_kv = !random_between(r, 0, 2);
        p.seqused_k = (int32_t)random_between(r, 0, 1), p.leftpad_k = (int32_t)random_between(r, 0, 1);
        p.bottom_right = (int32_t)random_between(r, 0, 1), p.cache_batch_idx = !random_between(r, 0, 3);
        p.total_q = p.varlen_q ? draw_size(r) : 0, p.total_kv = p.varlen_kv ? draw_size(r) : 0;
        p.kv_batch = random_between(r, 0, 1) ? draw_size(r) : 0,
        p.page_size = random_between(r, 0, 1) ? draw_size(r) : 0;
        mfa_problem_make_dense(&p);
    }
    return p;
}

/* Any problem is printed as what parses to it, or refused with a sentence: what means nothing in it (the dtype of a
 * mask that is not there, the sign of a softcap or dropout of 0) has one form. */
static void test_any_problem(void **state)
{
    (void)state;
    struct generator r;
    int printed = 0;
    enum { PROBLEMS = 20000 };
    generator_seed(&r, 1, "lines");
    for (int n = 0; n < PROBLEMS; n++) {
        mfa_problem problem = draw_problem(&r), again;
        const mfa_problem *p = &problem;
        char text[512] = "before";
        const int sound = p->batch >= 0 && p->q_heads >= 0 && p->kv_heads >= 0 && p->q_len >= 0 && p->kv_len >= 0 &&
                          p->head_dim >= 0 && p->value_dim >= 0 && p->total_q >= 0 && p->total_kv >= 0 &&
                          p->kv_batch >= 0 && p->page_size >= 0 && !isnan(p->scale) && !isnan(p->softcap) &&
                          !isnan(p->dropout);
        const mfa_status status = mfa_problem_print(&problem, text, sizeof text);
        assert_int_equal(status, sound ? MFA_OK : MFA_INVALID);
        if (!sound) {
            assert_string_equal(text, "before");
            assert_non_null(strstr(mfa_last_error(), " is "));
            continue;
        }
        printed++;
        if (problem.mask != MFA_MASK_ADDITIVE)
            problem.mask_dtype = MFA_F32;
        if (problem.softcap == 0)
            problem.softcap = 0;
        if (problem.dropout == 0)
            problem.dropout = 0;
        if (mfa_problem_parse(text, &again) != MFA_OK || memcmp(&problem, &again, sizeof problem) != 0)
            print_error("%s: %s\n", text, mfa_last_error());
        assert_int_equal(mfa_problem_parse(text, &again), MFA_OK);
        assert_memory_equal(&problem, &again, sizeof problem);
    }
    assert_in_range(printed, PROBLEMS / 2, PROBLEMS - PROBLEMS / 20);
}

static void test_print_refuses(void **state)
{
    (void)state;
    char text[512];
    mfa_problem problem = sound();
    problem.kv_len = -3;
    assert_int_equal(mfa_problem_print(&problem, text, sizeof text), MFA_INVALID);
    assert_string_equal(mfa_last_error(), "kv_len is -3; it must be 0 or more");
    problem = sound();
    problem.scale = (double)NAN;
    assert_int_equal(mfa_problem_print(&problem, text, sizeof text), MFA_INVALID);
    assert_string_equal(mfa_last_error(), "scale is NaN; a line of text has numbers only");
    problem.scale = 1;
    problem.softcap = -(double)NAN;
    assert_int_equal(mfa_problem_print(&problem, text, sizeof text), MFA_INVALID);
    assert_string_equal(mfa_last_error(), "softcap is NaN; a line of text has numbers only");
    problem.softcap = 0;
    problem.dtype = 9;
    assert_int_equal(mfa_problem_print(&problem, text, sizeof text), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "dtype is 9"));
}

static void test_parsed_values(void **state)
{
    (void)state;
    mfa_problem problem;
    assert_int_equal(
        mfa_problem_parse("  backward\tbf16 b2 h6/3 q5 kv7 d16v8 mask_f16 softcap2.5 causal lower-3\n", &problem),
        MFA_OK);
    mfa_problem expected;
    mfa_problem_make(&expected, 2, 6, 3, 5, 7, 16, 8);
    expected.pass = MFA_BACKWARD;
    expected.dtype = MFA_BF16;
    expected.mask = MFA_MASK_ADDITIVE;
    expected.mask_dtype = MFA_F16;
    expected.softcap = 2.5;
    expected.upper = 0;
    expected.lower = -3;
    assert_memory_equal(&problem, &expected, sizeof problem);
    assert_int_equal(problem.k_layout.batch, 3 * 7 * 16);
    assert_int_equal(problem.o_layout.head, 5 * 8);
    assert_int_equal(problem.lse_layout.row, 1);
    assert_true(problem.scale == 0.25);
}

static void test_parse_errors(void **state)
{
    (void)state;
    static const struct {
        const char *line, *words;
    } cases[] = {
        {"", "ends early; expected forward or backward"},
        {"sideways f32 b1 h1 q1 kv1 d8", "\"sideways\" in the problem; expected forward or backward"},
        {"forward f8 b1 h1 q1 kv1 d8", "\"f8\" in the problem; expected f32, f16, bf16 or f64"},
        {"forward f32", "ends early; expected b<batch>"},
        {"forward f32 b h1 q1 kv1 d8", "\"b\" in the problem; expected b<batch>"},
        {"forward f32 b-1 h1 q1 kv1 d8", "\"b-1\""},
        {"forward f32 b1x h1 q1 kv1 d8", "\"b1x\""},
        {"forward f32 b99999999999999999999 h1 q1 kv1 d8", "\"b99999999999999999999\""},
        {"forward f32 b1 h8/ q1 kv1 d8", "\"h8/\" in the problem; expected h<q_heads> or h<q_heads>/<kv_heads>"},
        {"forward f32 b1 h8 kv1 q1 d8", "\"kv1\" in the problem; expected q<q_len>"},
        {"forward f32 b1 h8 q1 kv1", "ends early; expected d<head_dim>"},
        {"forward f32 b1 h8 q1 kv1 d8v", "\"d8v\""},
        {"forward f32 b1 h8 q1 kv1 d8 casual", "\"casual\" in the problem; expected causal, lower<int>"},
        {"forward f32 b1 h8 q1 kv1 d8 upper", "\"upper\""},
        {"forward f32 b1 h8 q1 kv1 d8 upper1.5", "\"upper1.5\""},
        {"forward f32 b1 h8 q1 kv1 d8 scale0,5", "\"scale0,5\""},
        {"forward f32 b1 h8 q1 kv1 d8 mask_f8", "\"mask_f8\""},
        {"forward f32 b1 h8 q1 kv1 d8 scalenan", "\"scalenan\" in the problem; expected causal, lower<int>"},
        {"forward f32 b1 h8 q1 kv1 d8 softcap-nan", "\"softcap-nan\""},
        {"forward f32 b1 h8 q1 kv1 d8 metal metal", "\"metal\" in the problem; this option was given before"},
        {"forward f32 b1 h8 q1 kv1 d8 causal upper3", "\"upper3\" in the problem; this option was given before"},
        {"forward f32 b1 h8 q1 kv1 d8 mask_bool mask_f32", "\"mask_f32\" in the problem; this option was given before"},
        {"forward f32 b1 h8 q1 kv1 d8 "
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
         "is not a word"},
        {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\xc3\xa9", "aaa...\" is not a word"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        mfa_problem problem, before;
        memset(&problem, 0x5a, sizeof problem);
        before = problem;
        assert_int_equal(mfa_problem_parse(cases[i].line, &problem), MFA_INVALID);
        if (!strstr(mfa_last_error(), cases[i].words))
            print_error("expected \"%s\", got \"%s\"\n", cases[i].words, mfa_last_error());
        assert_non_null(strstr(mfa_last_error(), cases[i].words));
        assert_memory_equal(&problem, &before, sizeof before);
    }
}

/* Of a program compiled with an older header nothing is written beyond its struct, and nothing is lost in silence. */
static void test_older_structs(void **state)
{
    enum { OLDER = offsetof(mfa_problem, dropout) };
    _Alignas(8) unsigned char memory[sizeof(mfa_problem) + 64];
    mfa_problem *problem = (mfa_problem *)(void *)memory, whole;
    (void)state;
    memset(memory, 0xa5, sizeof memory);
    mfa_problem_init_sized(problem, OLDER, 1, 2, 2, 3, 4, 5, 6);
    mfa_problem_init(&whole, 1, 2, 2, 3, 4, 5, 6);
    whole.size = OLDER;
    assert_memory_equal(problem, &whole, OLDER);
    assert_int_equal(mfa_problem_parse_sized("backward f16 b1 h1 q8 kv8 d8 causal sinks", problem, OLDER), MFA_OK);
    assert_int_equal(problem->size, OLDER);
    assert_int_equal(problem->sinks, 1);
    assert_int_equal(mfa_problem_parse_sized("backward f16 b1 h1 q8 kv8 d8 dropout0.1", problem, OLDER), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "has options that an mfa_problem of 608 bytes, the caller's, lacks"));
    assert_int_equal(problem->sinks, 1);
    assert_int_equal(mfa_problem_parse_sized("backward f16 b1 h1 q8 kv8 d8 out_f32", problem, OLDER), MFA_INVALID);
    assert_int_equal(mfa_problem_parse_sized("forward f16 b1 h1 q8 kv8 d8", problem, 8), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "size of mfa_problem is 8"));
    for (size_t n = OLDER; n < sizeof memory; n++)
        assert_int_equal(memory[n], 0xa5);
    mfa_problem_init_sized(problem, sizeof memory, 1, 2, 2, 3, 4, 5, 6); /* of a newer header: it is refused later */
    assert_int_equal(problem->size, sizeof memory);
    for (size_t n = sizeof whole; n < sizeof memory; n++)
        assert_int_equal(memory[n], 0);
}

static void test_foreign_locale(void **state)
{
    (void)state;
    static const char *const names[] = {"de_DE.UTF-8", "fr_FR.UTF-8", "de_DE", "fr_FR"};
    const char *set = NULL;
    for (int i = 0; i < 4 && !set; i++)
        set = setlocale(LC_ALL, names[i]);
    print_message("           locale %s\n", set ? set : "with a decimal comma: none here, not run");
    test_lines(state);
    setlocale(LC_ALL, "C");
}

static void test_keys(void **state)
{
    (void)state;
    char text[MFA_KEY_TEXT];
    struct mfa_key key = {MFA_FORWARD, MFA_VARIANT_TILED, MFA_F16, 128, 128, 32,
                          64,          MFA_FEATURE_BAND,  MFA_F16, 0,   0,   "apple9"};
    mfa_key_print(&key, text);
    assert_string_equal(text, "forward_f16_d128_q32_k64_band_apple9");
    key = (struct mfa_key){MFA_BACKWARD, MFA_VARIANT_TILED, MFA_F32, 96, 64, 48, 192, 0, MFA_F32, 0, 0, "avx512"};
    mfa_key_print(&key, text);
    assert_string_equal(text, "backward_f32_d96v64_q48_k192_avx512");
    key.features = MFA_FEATURE_MASK_BOOL | MFA_FEATURE_SOFTCAP;
    mfa_key_print(&key, text);
    assert_string_equal(text, "backward_f32_d96v64_q48_k192_mask_bool_softcap_avx512");
    key.variant = MFA_VARIANT_DECODE, key.block_q = 8;
    mfa_key_print(&key, text);
    assert_string_equal(text, "decode_backward_f32_d96v64_q8_k192_mask_bool_softcap_avx512");
    key.pass = MFA_FORWARD, key.k_type = MFA_KV_INT8, key.v_type = MFA_KV_NF4;
    mfa_key_print(&key, text);
    assert_string_equal(text, "decode_f32_d96v64_q8_k192_mask_bool_softcap_k_int8_v_nf4_avx512");
    key.variant = MFA_VARIANT_INT8, key.block_q = 48, key.v_type = MFA_KV_INT8, key.features = 0;
    mfa_key_print(&key, text);
    assert_string_equal(text, "forward_int8_f32_d96v64_q48_k192_k_int8_v_int8_avx512");
    key = (struct mfa_key){MFA_BACKWARD, MFA_VARIANT_DECODE, MFA_BF16,    INT32_MIN,
                           INT32_MAX,    INT32_MIN,          INT32_MIN,   2047,
                           MFA_BF16,     MFA_KV_E4M3,        MFA_KV_E5M2, "sixteen_letters"};
    key.machine[15] = '!'; /* no end: still only sixteen are read */
    mfa_key_print(&key, text);
    assert_non_null(strstr(text, "_band_mask_bool_mask_bf16_softcap_alibi_sinks_dropout_block_map_varlen_paged_out_f32_"
                                 "k_e4m3_v_e5m2_sixteen_letters!"));
}

/* The first word of a plan's key says which kernel runs. */
static void test_kernel_words(void **state)
{
    static const char *const expected[][2] = {
        {"decode", "forward f32 b1 h2 q1 kv200 d64"},    {"decode_backward", "backward f32 b1 h2 q1 kv200 d64"},
        {"forward", "forward f32 b1 h2 q100 kv200 d64"}, {"backward", "backward f32 b1 h2 q100 kv200 d64"},
        {"forward", "forward f32 b1 h2 q0 kv200 d64"},   {"forward", "forward f32 b1 h400/4 q1 kv200 d64"},
    };
    (void)state;
    mfa_context *context;
    assert_int_equal(mfa_context_create(NULL, &context), MFA_OK);
    for (size_t n = 0; n < sizeof expected / sizeof *expected; n++) {
        mfa_problem problem;
        mfa_plan *plan;
        char text[256];
        assert_int_equal(mfa_problem_parse(expected[n][1], &problem), MFA_OK);
        assert_int_equal(mfa_plan_create(context, &problem, &plan), MFA_OK);
        assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
        mfa_plan_destroy(plan);
        assert_non_null(strstr(text, "_f32_"));
        *strstr(text, "_f32_") = 0;
        assert_string_equal(text + strlen("cpu "), expected[n][0]);
    }
    mfa_context_destroy(context);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_members),       cmocka_unit_test(test_empty),
        cmocka_unit_test(test_overflow),      cmocka_unit_test(test_layouts_of_the_pass),
        cmocka_unit_test(test_canonical),     cmocka_unit_test(test_roles),
        cmocka_unit_test(test_lines),         cmocka_unit_test(test_any_problem),
        cmocka_unit_test(test_print_refuses), cmocka_unit_test(test_parsed_values),
        cmocka_unit_test(test_parse_errors),  cmocka_unit_test(test_foreign_locale),
        cmocka_unit_test(test_older_structs), cmocka_unit_test(test_keys),
        cmocka_unit_test(test_kernel_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
