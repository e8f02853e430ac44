/* mfa_kv_quantize: codes are those whose numbers are nearest, scales those of the largest number; what it refuses; and
 * what attention makes of the largest scales. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "mfa.h"
#include "reference/attention.h"
#include "reference/element.h"
#include "support/context.h"
#include "support/generator.h"
#include "support/report.h"

enum { COLUMNS = 128 };

static const char *const names[] = {"same", "int8", "e4m3", "e5m2", "int4", "nf4"};

/* The code of column c of a row. */
static uint8_t code_at(int32_t type, const uint8_t *codes, int c)
{
    if (type != MFA_KV_INT4 && type != MFA_KV_NF4)
        return codes[c];
    const uint8_t both = codes[c / 32 * 16 + c % 16];
    return c % 32 < 16 ? both & 15 : both >> 4;
}

static int code_count(int32_t type)
{
    return type == MFA_KV_INT4 || type == MFA_KV_NF4 ? 16 : 256;
}

/* Of int8, -128 is not used. */
static int is_used(int32_t type, uint8_t code)
{
    return isfinite(reference_code(type, code)) && !(type == MFA_KV_INT8 && code == 0x80);
}

/* No code is nearer to x than the one it got; the unit in which x was divided by the scale may round it. */
static void assert_nearest(int32_t type, double x, float scale, uint8_t got)
{
    const double off = fabs(reference_code(type, got) * (double)scale - x);
    for (int code = 0; code < code_count(type); code++)
        if (is_used(type, (uint8_t)code)) {
            const double other = fabs(reference_code(type, (uint8_t)code) * (double)scale - x);
            if (off > other * (1 + 1e-5) + fabs(x) * 1e-6)
                fail_msg("%s: %g has code %d, off by %g; code %d is off by %g", names[type], x, got, off, code, other);
        }
}

/* A normal distribution, with a column of much larger numbers as models have them. */
static void fill(struct generator *r, float *numbers, int64_t count)
{
    for (int64_t n = 0; n < count; n++)
        numbers[n] = (float)generator_normal(r) * (n % COLUMNS == 17 ? 30 : 1);
}

static void test_nearest(void **state)
{
    static const int64_t groups[] = {0, 32, 64, 96};
    float numbers[8 * COLUMNS];
    struct generator r;
    (void)state;
    generator_seed(&r, 1, "numbers");
    for (int32_t type = MFA_KV_INT8; type <= MFA_KV_NF4; type++)
        for (size_t g = 0; g < sizeof groups / sizeof *groups; g++) {
            uint8_t codes[8][COLUMNS];
            float scales[8][4];
            double error = 0, size = 0;
            const int64_t group = groups[g] ? groups[g] : COLUMNS;
            fill(&r, numbers, 8 * COLUMNS);
            memset(numbers + 3 * COLUMNS, 0, COLUMNS * sizeof *numbers);
            assert_int_equal(
                mfa_kv_quantize(type, MFA_F32, 8, COLUMNS, groups[g], numbers, COLUMNS, codes, COLUMNS, scales[0], 4),
                MFA_OK);
            for (int row = 0; row < 8; row++)
                for (int c = 0; c < COLUMNS; c++) {
                    const double x = (double)numbers[row * COLUMNS + c];
                    const float scale = scales[row][c / group];
                    const uint8_t code = code_at(type, codes[row], c);
                    if (row == 3)
                        assert_true(scale == 0);
                    else
                        assert_nearest(type, x, scale, code);
                    const double off = reference_code(type, code) * (double)scale - x;
                    error += off * off, size += x * x;
                }
            print_message("%-4s, %3d columns a scale: root mean square error %.4f of that of the numbers\n",
                          names[type], (int)group, sqrt(error / size));
        }
}

/* Each number that a code stands for gets that code back; of a row that has the largest, with a scale of 1. */
static void test_each_code(void **state)
{
    (void)state;
    for (int32_t type = MFA_KV_INT8; type <= MFA_KV_NF4; type++) {
        const float largest = type == MFA_KV_INT8   ? 127
                              : type == MFA_KV_E4M3 ? 448
                              : type == MFA_KV_E5M2 ? 57344
                              : type == MFA_KV_INT4 ? -8
                                                    : 1;
        int checked = 0;
        for (int code = 0; code < code_count(type); code++) {
            float numbers[32] = {largest, (float)reference_code(type, (uint8_t)code)}, scale;
            uint8_t codes[32];
            if (!is_used(type, (uint8_t)code))
                continue;
            assert_int_equal(mfa_kv_quantize(type, MFA_F32, 1, 32, 0, numbers, 32, codes, 32, &scale, 1), MFA_OK);
            assert_true(scale == 1);
            assert_true(reference_code(type, code_at(type, codes, 1)) == (double)numbers[1]);
            checked++;
        }
        print_message("%s: %d codes\n", names[type], checked);
    }
}

static void test_dtypes(void **state)
{
    float numbers[COLUMNS];
    double element[COLUMNS];
    uint8_t codes[COLUMNS], same[COLUMNS];
    float scale, scale_of_same;
    struct generator r;
    (void)state;
    generator_seed(&r, 2, "dtypes");
    for (int32_t dtype = MFA_F32; dtype <= MFA_F64; dtype++) {
        fill(&r, numbers, COLUMNS);
        for (int n = 0; n < COLUMNS; n++) {
            numbers[n] = (float)element_round(dtype == MFA_F64 ? MFA_F32 : dtype, (double)numbers[n]);
            element_store(dtype, element, n, (double)numbers[n]);
        }
        assert_int_equal(mfa_kv_quantize(MFA_KV_INT8, MFA_F32, 1, COLUMNS, 0, numbers, 0, codes, 0, &scale, 0), MFA_OK);
        assert_int_equal(mfa_kv_quantize(MFA_KV_INT8, dtype, 1, COLUMNS, 0, element, 0, same, 0, &scale_of_same, 0),
                         MFA_OK);
        assert_memory_equal(codes, same, sizeof codes);
        assert_true(scale == scale_of_same);
    }
}

/* O of one key is V: a code times its scale, also where the scale is large and the code small. */
static void test_large_scales(void **state)
{
    (void)state;
    for (int32_t type = MFA_KV_INT8; type <= MFA_KV_NF4; type++)
        for (int code = 0; code < code_count(type); code++)
            for (int q_len = 1; q_len <= 65; q_len += 64) {
                const double number = reference_code(type, (uint8_t)code);
                if (!is_used(type, (uint8_t)code) || number == 0)
                    continue;
                static float q[65 * 32], k[32], o[65 * 32];
                uint8_t v[32];
                const float scale = FLT_MAX / (float)(2 * fmax(1, fabs(number)));
                mfa_problem p;
                mfa_problem_init(&p, 1, 1, 1, q_len, 1, 32, 32);
                p.v_type = type;
                memset(v, code_count(type) == 16 ? code * 17 : code, sizeof v);
                const mfa_buffers buffers = {.size = sizeof buffers,
                                             .q = {q, 0},
                                             .k = {k, 0},
                                             .v = {v, 0},
                                             .o = {o, 0},
                                             .v_scale = {(void *)&scale, 0}};
                assert_int_equal(mfa_attention(test_context, &p, &buffers, NULL), MFA_OK);
                for (int n = 0; n < q_len * 32; n++)
                    if (fabs((double)o[n] - number * (double)scale) > fabs(number * (double)scale) * 1e-6)
                        fail_msg("%s: code %d times %g is %g in O", names[type], code, (double)scale, (double)o[n]);
            }
}

static void test_refused(void **state)
{
    float numbers[64] = {0}, scales[4] = {9};
    uint8_t codes[64] = {7};
    const struct {
        int32_t type, dtype;
        int64_t rows, columns, group;
        const char *words;
    } cases[] = {
        {0, 0, 1, 32, 0, "type is 0; it must be 1 (int8)"},
        {6, 0, 1, 32, 0, "type is 6; it must be 1 (int8)"},
        {1, 4, 1, 32, 0, "dtype is 4; it must be 0 (f32)"},
        {1, 0, -1, 32, 0, "rows is -1, columns 32 and group 0"},
        {4, 0, 1, 40, 0, "columns is 40 and group 0; of int4 they must be multiples of 32"},
        {5, 0, 1, 64, 16, "columns is 64 and group 16; of nf4 they must be multiples of 32"},
        {1, 0, 1, 32, 0, "number 5 of row 0 is not finite"},
    };
    (void)state;
    numbers[5] = NAN;
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        assert_int_equal(mfa_kv_quantize(cases[n].type, cases[n].dtype, cases[n].rows, cases[n].columns, cases[n].group,
                                         numbers, 32, codes, 32, scales, 1),
                         MFA_INVALID);
        print_message("%s\n", mfa_last_error());
        assert_non_null(strstr(mfa_last_error(), cases[n].words));
        assert_true(codes[0] == 7 && scales[0] == 9);
    }
    assert_int_equal(mfa_kv_quantize(1, 0, 0, 32, 0, numbers, 32, codes, 32, scales, 1), MFA_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nearest),      cmocka_unit_test(test_each_code), cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_large_scales), cmocka_unit_test(test_refused),
    };
    report_begin("test_quantize", 1);
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
