#include "metal/basics.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "metal/gpu.h"
#include "metal/run.h"
#include "metal/source.h"
#include "reference/element.h"
#include "support/report.h"

static const int families[] = {7, 9};

/* Mirrors every matrix of the kernels, as a device of another layout would. */
static char *swap_lanes(enum mfa_metal_kernel kernel, char *text)
{
    static const char right[] = "lane / 16 * 4", wrong[] = "3 - lane / 8 ";
    char *at = strstr(text, right);
    (void)kernel;
    if (at)
        memcpy(at, wrong, sizeof wrong - 1);
    else
        report_fail("fragment.h says no longer \"%s\", which this test changes", right);
    return text;
}

void basics_check_layout(void)
{
    for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
        if (metal_run_layout_test(families[f]))
            report_pass();
        else
            report_fail("layout_test does not find the device's matrices as fragment.h says");
    }
    metal_rewrite = swap_lanes;
    if (!metal_run_layout_test(7))
        report_pass();
    else
        report_fail("layout_test does not notice another layout");
    metal_rewrite = NULL;
}

#define LOW_HALVES 6
#define FLOATS (65536 * LOW_HALVES)

/* Every upper half of a float, with lower halves about the points where rounding changes. */
static float *all_floats(void)
{
    static const uint32_t low[LOW_HALVES] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    uint32_t *bits = malloc(FLOATS * sizeof *bits);
    for (uint32_t n = 0; bits && n < FLOATS; n++)
        bits[n] = n / LOW_HALVES << 16 | low[n % LOW_HALVES];
    return (float *)(void *)bits;
}

static void check_rounding(int32_t dtype, int family, float *floats, uint16_t *operands, uint16_t *masks)
{
    static const char kernel[] = "\nkernel void narrow_test(device const float *x [[buffer(1)]],\n"
                                 "    device storage *operand [[buffer(2)]], device mask_storage *mask [[buffer(3)]],\n"
                                 "    uint i [[thread_position_in_grid]])\n"
                                 "{\n    operand[i] = narrow(x[i]);\n    mask[i] = mask_narrow(x[i]);\n}\n";
    const size_t bytes = FLOATS * sizeof *operands;
    struct mfa_key key = {.dtype = dtype, .head_dim = 8, .value_dim = 8, .mask_dtype = dtype};
    struct gpu_launch launch = {.name = "narrow_test", .function = "narrow_test", .groups = FLOATS / 32, .threads = 32};
    char *text;
    key.features = MFA_FEATURE_MASK_ADDITIVE;
    snprintf(key.machine, sizeof key.machine, "apple%d", family);
    if (mfa_metal_source_write(&key, MFA_METAL_LAYOUT_TEST, NULL, &text) != MFA_OK)
        return;
    const size_t length = strlen(text);
    char *whole = malloc(length + sizeof kernel);
    memcpy(whole, text, length);
    memcpy(whole + length, kernel, sizeof kernel);
    launch.text = whole;
    launch.buffers[1] = (struct gpu_buffer){.base = floats, .length = FLOATS * sizeof *floats};
    launch.buffers[2] = (struct gpu_buffer){.base = operands, .length = bytes, .written = 1, .unwritten = 1};
    launch.buffers[3] = (struct gpu_buffer){.base = masks, .length = bytes, .written = 1, .unwritten = 1};
    gpu_begin(launch.buffers, MFA_METAL_BUFFERS);
    const char *why = gpu_run(&launch);
    gpu_end(launch.buffers, MFA_METAL_BUFFERS);
    size_t wrong = 0;
    for (size_t n = 0; n < FLOATS && !why; n++) {
        uint16_t right;
        element_store(dtype, &right, 0, (double)floats[n]);
        const int nan = floats[n] != floats[n]; /* any NaN is as good as another */
        const double got = element_load(dtype, operands, (int64_t)n);
        if (nan ? got == got : operands[n] != right || masks[n] != right)
            wrong++;
    }
    if (why || wrong)
        report_fail("apple%d narrows %zu of %d floats wrongly to %s %s", family, wrong, FLOATS, element_name(dtype),
                    why ? why : "");
    else
        report_pass();
    free(whole);
    free(text);
}

void basics_check_rounding(void)
{
    float *floats = all_floats();
    uint16_t *narrowed = malloc(2 * FLOATS * sizeof *narrowed);
    for (size_t f = 0; f < sizeof families / sizeof *families; f++) {
        check_rounding(MFA_F16, families[f], floats, narrowed, narrowed + FLOATS);
        check_rounding(MFA_BF16, families[f], floats, narrowed, narrowed + FLOATS);
    }
    free(floats);
    free(narrowed);
}

void basics_check_lowest_mask(void)
{
    enum { QUERIES = 40, KEYS = 70, COLUMNS = 16, ROW = 3 };
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference forward = {0}, backward = {0};
    struct metal_trace trace;
    const struct metal_target target = {.family = 7};
    mfa_problem_init(&problem, 1, 1, 1, QUERIES, KEYS, COLUMNS, COLUMNS);
    problem.mask = MFA_MASK_ADDITIVE;
    inputs_open(&inputs, &problem, (struct variant){0}, 1, "lowest");
    for (int j = 0; j < KEYS; j++)
        inputs.values[REFERENCE_MASK][ROW * KEYS + j] = (double)-FLT_MAX;
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    int good = metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &forward);
    for (int c = 0; c < COLUMNS && good; c++) {
        double mean = 0;
        for (int j = 0; j < KEYS; j++)
            mean += inputs.values[REFERENCE_V][j * COLUMNS + c] / KEYS;
        good = fabs(forward.O[ROW * COLUMNS + c] - mean) < 1e-6;
    }
    operands_turn(&operands, DENSE, &forward);
    good = good && isfinite(forward.L[ROW]) && metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &backward);
    for (int n = 0; n < KEYS * COLUMNS && good; n++)
        good = isfinite(backward.dK[n]) && isfinite(backward.dV[n]) &&
               (n >= QUERIES * COLUMNS || isfinite(backward.dQ[n]));
    if (good)
        report_pass();
    else
        report_fail("a row whose mask is the lowest finite number is not the mean of V, or has no gradients");
    reference_close(&forward);
    reference_close(&backward);
    operands_close(&operands);
    inputs_close(&inputs);
}

/* Of queries that see no key L is the sink, to an ulp, and dsink the sum of dL. */
static void check_large_sink(double sink)
{
    enum { QUERIES = 40, KEYS = 70, COLUMNS = 16 };
    const double sum = QUERIES * (QUERIES + 1) / 2.0;
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference forward = {0}, backward = {0};
    struct metal_trace trace;
    const struct metal_target target = {.family = 7};
    mfa_problem_init(&problem, 1, 1, 1, QUERIES, KEYS, COLUMNS, COLUMNS);
    problem.sinks = 1, problem.upper = -QUERIES;
    inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, 1, "large sinks");
    inputs.values[REFERENCE_SINKS][0] = sink;
    for (int i = 0; i < QUERIES; i++)
        inputs.values[REFERENCE_dL][i] = i + 1;
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    int good = metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &forward);
    for (int i = 0; i < QUERIES; i++) {
        good = good && fabs(forward.L[i] - sink) <= fabs(sink) * 0x1p-23;
        forward.L[i] = sink;
    }
    operands_turn(&operands, DENSE, &forward);
    good = good && metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &backward);
    if (good && fabs(backward.dsinks[0] - sum) < 1e-3)
        report_pass();
    else
        report_fail("a sink of %g whose gradient is %g has the gradient %g", sink, sum, backward.dsinks[0]);
    reference_close(&forward);
    reference_close(&backward);
    operands_close(&operands);
    inputs_close(&inputs);
}

void basics_check_large_sinks(void)
{
    static const float sinks[] = {1e4f, -3e5f, 1e30f, -1e30f, -6e37f, 1e38f};
    for (size_t n = 0; n < sizeof sinks / sizeof *sinks; n++)
        check_large_sink((double)sinks[n]);
}

/* With one key, O is its V: each code of a type, bit by bit what it stands for times its scale. */
static void check_codes(int32_t type, int rows)
{
    enum { BATCH = 16, COLUMNS = 32 };
    static const double scales[] = {1, -3, 0.0123456789, 1e30};
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference forward = {0};
    struct metal_trace trace;
    int wrong = 0;
    mfa_problem_init(&problem, BATCH, 1, 1, rows, 1, COLUMNS, COLUMNS);
    problem.v_type = type, problem.v_group = COLUMNS;
    mfa_problem_make_dense(&problem);
    inputs_open(&inputs, &problem, (struct variant){0}, 1, "codes");
    const int bytes = (int)mfa_kv_type_columns(type, COLUMNS);
    for (int n = 0; n < BATCH * bytes; n++)
        inputs.values[REFERENCE_V][n] = (n * 7 + n / 256) % 256; /* of 4 bits, in either half */
    for (int b = 0; b < BATCH; b++)
        inputs.values[REFERENCE_V_SCALE][b] = (double)(float)scales[b % 4];
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS);
    const int good = metal_run(&operands, (struct metal_target){.family = 7}, 0, &trace) == MFA_OK;
    operands_collect(&operands, &forward);
    for (int n = 0; n < BATCH * rows * COLUMNS && good; n++) {
        const int b = n / COLUMNS / rows, c = n % COLUMNS,
                  byte = (int)inputs.values[REFERENCE_V][b * bytes + c % bytes];
        const double code = reference_code(type, (uint8_t)(c >= bytes ? byte >> 4 : byte));
        const double expected = (double)(float)((float)code * (float)inputs.values[REFERENCE_V_SCALE][b]);
        wrong += !(forward.O[n] == expected || (isnan(forward.O[n]) && isnan(expected)));
    }
    if (good && wrong == 0)
        report_pass();
    else
        report_fail("of codes of type %d, %d are wrong%s", type, wrong, good ? "" : ": nothing ran");
    reference_close(&forward);
    operands_close(&operands);
    inputs_close(&inputs);
}

void basics_check_codes(void)
{
    for (int32_t type = MFA_KV_INT8; type <= MFA_KV_NF4; type++) {
        check_codes(type, 1); /* attention_decode_vector, and then tiles */
        check_codes(type, 4);
    }
}

/* With one key, O is its V; o_low is 0, of infinities too, where the difference would be NaN. */
void basics_check_overflow(void)
{
    enum { ROWS = 9, COLUMNS = 24 };
    for (int32_t dtype = MFA_F16; dtype <= MFA_BF16; dtype++) {
        const double largest = dtype == MFA_F16 ? 65504 : 0x1.fep127;
        const double numbers[] = {INFINITY, -INFINITY, largest, -largest, 1.25, 0};
        mfa_problem problem;
        struct inputs inputs;
        struct operands operands;
        struct reference forward = {0};
        struct metal_trace trace;
        int wrong = 0;
        mfa_problem_init(&problem, 1, 1, 1, ROWS, 1, COLUMNS, COLUMNS);
        problem.dtype = dtype;
        mfa_problem_make_dense(&problem);
        inputs_open(&inputs, &problem, (struct variant){0}, 1, "overflow");
        for (int c = 0; c < COLUMNS; c++)
            inputs.values[REFERENCE_V][c] = numbers[c % 6];
        operands_open(&operands, &inputs, DENSE, OUTPUT(O) | OUTPUT(O_LOW));
        const int good = metal_run(&operands, (struct metal_target){.family = 7}, 0, &trace) == MFA_OK;
        operands_collect(&operands, &forward);
        for (int n = 0; n < ROWS * COLUMNS && good; n++)
            wrong += !(forward.O[n] == numbers[n % COLUMNS % 6] && forward.O_low[n] == 0);
        if (good && wrong == 0)
            report_pass();
        else
            report_fail("of O and o_low where %s overflows, %d are wrong%s", dtype == MFA_F16 ? "f16" : "bf16", wrong,
                        good ? "" : ": nothing ran");
        reference_close(&forward);
        operands_close(&operands);
        inputs_close(&inputs);
    }
}

enum { DROPOUT_LENGTH = 256, DROPOUT_COLUMNS = 16 };

/* Sums of powers of two show whose terms they have: column c of a row of V, or dO, is 2^n in row 16 c + n, else 0, and
 * every P is the same. */
static void set_powers(double *values)
{
    for (int row = 0; row < DROPOUT_LENGTH; row++)
        for (int c = 0; c < DROPOUT_COLUMNS; c++)
            values[row * DROPOUT_COLUMNS + c] = row / 16 == c ? ldexp(1, row % 16) : 0;
}

/* How many of the terms of sums, in O or dV, are others than the mask keeps. `step`: of the mask from one sum to the
 * next, 1 or DROPOUT_LENGTH, and so from one term to the next the other one. */
static int count_wrong_terms(const double *sums, const uint8_t *kept, int step)
{
    int wrong = 0;
    for (int row = 0; row < DROPOUT_LENGTH; row++)
        for (int term = 0; term < DROPOUT_LENGTH; term++) {
            const double sum = sums[row * DROPOUT_COLUMNS + term / 16] * DROPOUT_LENGTH / 2;
            const int has = sum >= 0 && sum < 65536 && (long)nearbyint(sum) >> term % 16 & 1;
            wrong += has != kept[row * step + term * (step == 1 ? DROPOUT_LENGTH : 1)];
        }
    return wrong;
}

/* Masks of 65536 random numbers differ if the bound does by 1. */
static int masks_differ(const mfa_problem *problem, uint64_t seed, double dropout, const uint8_t *kept)
{
    static uint8_t other[DROPOUT_LENGTH * DROPOUT_LENGTH];
    mfa_problem p = *problem;
    p.dropout = dropout;
    return mfa_problem_dropout_mask(&p, &seed, other) == MFA_OK && memcmp(other, kept, sizeof other) != 0;
}

void basics_check_dropout(void)
{
    static uint8_t kept[DROPOUT_LENGTH * DROPOUT_LENGTH];
    const struct metal_target target = {.family = 7};
    const double dropout = 0.5;
    uint64_t seed = UINT64_C(0x0001234567890abc);
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference forward = {0}, backward = {0};
    struct metal_trace trace;
    mfa_problem_init(&problem, 1, 1, 1, DROPOUT_LENGTH, DROPOUT_LENGTH, DROPOUT_COLUMNS, DROPOUT_COLUMNS);
    problem.dropout = dropout;
    do
        seed++;
    while (mfa_problem_dropout_mask(&problem, &seed, kept) == MFA_OK &&
           !(masks_differ(&problem, seed, dropout - 0x1p-16, kept) &&
             masks_differ(&problem, seed, dropout + 0x1p-16, kept)));
    inputs_open(&inputs, &problem, (struct variant){0}, 1, "dropout");
    memset(inputs.values[REFERENCE_Q], 0, sizeof(double) * DROPOUT_LENGTH * DROPOUT_COLUMNS);
    set_powers(inputs.values[REFERENCE_V]);
    set_powers(inputs.values[REFERENCE_dO]);
    inputs.values[REFERENCE_SEED][0] = (double)seed;
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    int good = metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &forward);
    const int forward_wrong = good ? count_wrong_terms(forward.O, kept, DROPOUT_LENGTH) : -1;
    operands_turn(&operands, DENSE, &forward);
    good = good && metal_run(&operands, target, 0, &trace) == MFA_OK;
    operands_collect(&operands, &backward);
    const int backward_wrong = good ? count_wrong_terms(backward.dV, kept, 1) : -1;
    if (forward_wrong == 0 && backward_wrong == 0)
        report_pass();
    else
        report_fail("of 65536 elements of the mask of dropout, %d are wrong in O and %d in dV", forward_wrong,
                    backward_wrong);
    reference_close(&forward);
    reference_close(&backward);
    operands_close(&operands);
    inputs_close(&inputs);
}
