/* Kernels skip the tiles of keys that the band, the mask or the block map excludes for every query, forward and
 * backward, and each block that the map hides, exactly. The
 * rows of such keys in K and V lie on pages that must not be read, or, in another run, hold NaN. Results must be
 * the same bit for bit as with ordinary rows. Since kernels skip whole blocks, only keys with no visible key near
 * them count. Each run has a child process, so that a fault fails its test alone. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "reference/element.h"
#include "support/compare.h"
#include "support/operands.h"
#include "support/report.h"

enum { SEED = 1 };
enum rows { ORDINARY, FORBIDDEN, NANS };

/* The mask excludes the second and third quarter of the keys for all queries. */
static void mask_quarters(struct inputs *inputs)
{
    int64_t shape[4];
    double *mask = inputs->values[REFERENCE_MASK];
    reference_shape(&inputs->problem, REFERENCE_MASK, shape);
    for (int64_t at = 0; mask && at < reference_count(&inputs->problem, REFERENCE_MASK); at++) {
        int64_t j = at % shape[3];
        int excluded = j >= shape[3] / 4 && j < shape[3] * 3 / 4;
        mask[at] = inputs->problem.mask == MFA_MASK_BOOL ? !excluded : excluded ? -INFINITY : 0;
    }
}

/* The map, too, hides the second and third quarter of its columns. */
static void map_quarters(struct inputs *inputs)
{
    int64_t shape[4];
    double *map = inputs->values[REFERENCE_BLOCK_MAP];
    reference_shape(&inputs->problem, REFERENCE_BLOCK_MAP, shape);
    for (int64_t at = 0; map && at < reference_count(&inputs->problem, REFERENCE_BLOCK_MAP); at++)
        if (at % shape[3] >= shape[3] / 4 && at % shape[3] < shape[3] * 3 / 4)
            map[at] = 0;
}

/* Whether the map shows key j to query i of some head. */
static int is_mapped(const struct inputs *inputs, int64_t i, int64_t j)
{
    const mfa_problem *p = &inputs->problem;
    if (!p->block_map_q)
        return 1;
    const struct reference_view map = reference_view(p, REFERENCE_BLOCK_MAP, inputs->values[REFERENCE_BLOCK_MAP]);
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t h = 0; h < p->q_heads; h++)
            if (reference_is_mapped(p, &map, b, h, i, j))
                return 1;
    return 0;
}

/* How far from a visible key keys may be read, in the problems below: to the end of its block. Where bf16 is multiplied
 * by AMX, blocks have 512 keys (src/cpu/tiles.c). */
static int64_t near_of(const mfa_problem *p)
{
    return p->dtype == MFA_BF16 ? 512 : 256;
}

/* Sets `skipped` to 1 for each key that is further than `near` from all visible ones; returns their number. */
static int64_t find_skipped(const struct inputs *inputs, int64_t near, char *skipped)
{
    const mfa_problem *p = &inputs->problem;
    const double *mask = inputs->values[REFERENCE_MASK];
    const mfa_buffers none = {.size = sizeof none};
    const struct reference_sequence seq = reference_sequence(p, &none, 0);
    int64_t count = 0;
    memset(skipped, 1, (size_t)p->kv_len);
    for (int64_t i = 0; i < p->q_len; i++) {
        int64_t first, end;
        reference_band(&seq, i, &first, &end);
        for (int64_t j = first; j < end; j++)
            if ((!mask || mask[j] != (p->mask == MFA_MASK_BOOL ? 0 : -INFINITY)) && is_mapped(inputs, i, j))
                for (int64_t at = j > near ? j - near : 0; at < p->kv_len && at <= j + near; at++)
                    skipped[at] = 0;
    }
    for (int64_t j = 0; j < p->kv_len; j++)
        count += skipped[j];
    return count;
}

static size_t forbid(struct tensor *tensor, const char *skipped)
{
    size_t row = (size_t)tensor->shape[3] * element_size(tensor->dtype), pages = 0;
    for (int64_t head = 0; head < tensor->shape[0] * tensor->shape[1]; head++)
        for (int64_t first = 0, end; first < tensor->shape[2]; first = end) {
            for (end = first + 1; end < tensor->shape[2] && skipped[end] == skipped[first];)
                end++;
            size_t before = (size_t)(head * tensor->shape[2]);
            if (skipped[first])
                pages += guarded_forbid(&tensor->memory, (before + (size_t)first) * row, (before + (size_t)end) * row);
        }
    return pages;
}

static void put_nans(struct inputs *inputs, enum reference_tensor tensor, const char *skipped)
{
    int64_t shape[4], count = reference_count(&inputs->problem, tensor);
    reference_shape(&inputs->problem, tensor, shape);
    for (int64_t at = 0; at < count; at++)
        if (skipped[at / shape[3] % shape[2]])
            inputs->values[tensor][at] = NAN;
}

/* Forward and backward; 0 if a call failed. NANS are put into the inputs. */
static int run(mfa_context *context, const char *text, struct inputs *inputs, enum rows rows, struct reference *results)
{
    const mfa_problem *problem = &inputs->problem;
    struct operands operands;
    char *skipped = malloc((size_t)problem->kv_len);
    static char testing[256];
    guarded_testing(text);
    const int64_t near = rows == NANS && problem->block_map_q ? 0 : near_of(problem);
    int64_t count = find_skipped(inputs, near, skipped);
    if (rows == NANS) {
        put_nans(inputs, REFERENCE_K, skipped);
        put_nans(inputs, REFERENCE_V, skipped);
    }
    operands_open(&operands, inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    if (rows == FORBIDDEN) {
        size_t pages =
            forbid(&operands.tensors[REFERENCE_K], skipped) + forbid(&operands.tensors[REFERENCE_V], skipped);
        printf("%5lld keys skipped, %3zu pages forbidden  %s\n", (long long)count, pages, text);
        fflush(stdout);
        if (!pages) {
            report_fail("%s\n        excludes too few keys to test anything", text);
            return 0;
        }
    }
    memset(results, 0, sizeof *results);
    int good = operands_run(&operands, context, 0) == MFA_OK && !operands_collect(&operands, results);
    operands_turn(&operands, DENSE, results);
    guarded_testing(strcat(strcpy(testing, "backward of "), text));
    good = good && operands_run(&operands, context, 0) == MFA_OK && !operands_collect(&operands, results);
    if (!good)
        report_fail("%s\n        %s", text, mfa_last_error());
    operands_close(&operands);
    free(skipped);
    return good;
}

/* The work of the child; returns its exit status. */
static int compare_rows(const char *text, int broadcast)
{
    mfa_context *context;
    mfa_problem problem;
    struct reference ordinary, results;
    struct inputs inputs;
    guarded_report_faults();
    if (mfa_context_create(NULL, &context) != MFA_OK || mfa_problem_parse(text, &problem) != MFA_OK) {
        report_fail("%s\n        %s", text, mfa_last_error());
        return 1;
    }
    const struct variant variant = {
        .mask_broadcast = broadcast, .dbias_broadcast = broadcast, .map_broadcast = broadcast & ALONG_HEAD, .dlse = 1};
    inputs_open(&inputs, &problem, variant, SEED, text);
    mask_quarters(&inputs);
    map_quarters(&inputs);
    int good = run(context, text, &inputs, ORDINARY, &ordinary);
    for (enum rows rows = FORBIDDEN; rows <= NANS && good; rows++) {
        good = run(context, text, &inputs, rows, &results);
        for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS && good; tensor++) {
            const double *got = *reference_member(&results, tensor), *expected = *reference_member(&ordinary, tensor);
            int64_t shape[4];
            mfa_problem shaped = problem;
            if (broadcast & ALONG_ROW)
                shaped.dbias_layout.row = 0;
            if (broadcast & ALONG_HEAD)
                shaped.dbias_layout.head = 0;
            reference_shape(&shaped, tensor, shape);
            good = !got || compare_same(text, tensor_name(tensor), shape, got, expected);
        }
        reference_close(&results);
    }
    reference_close(&ordinary);
    inputs_close(&inputs);
    mfa_context_destroy(context);
    return !good;
}

static void in_child(const char *text, int broadcast)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(compare_rows(text, broadcast));
    int status = -1;
    assert_true(child > 0 && waitpid(child, &status, 0) == child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* --- Blocks that a map hides from some queries ------------------------------------------------- */

/* Rows of K and V of one column of the map become NaN: what does not see them stays the same bit for bit, though others
 * of its panel, its block of queries or its block of keys do. Forward's results are those of ordinary rows. */
struct column_run {
    mfa_context *context;
    struct inputs inputs;
    struct reference forward, backward;
};

static int run_column(struct column_run *r, const struct reference *given)
{
    struct operands operands;
    operands_open(&operands, &r->inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    int good = operands_run(&operands, r->context, 0) == MFA_OK && !operands_collect(&operands, &r->forward);
    operands_turn(&operands, DENSE, given ? given : &r->forward);
    good = good && operands_run(&operands, r->context, 0) == MFA_OK && !operands_collect(&operands, &r->backward);
    operands_close(&operands);
    return good;
}

static int same_row(const double *a, const double *b, int64_t row, int64_t columns)
{
    return memcmp(a + row * columns, b + row * columns, (size_t)columns * sizeof *a) == 0;
}

/* Compares with the results of ordinary rows; the number of rows that had to be the same, or -1. */
static int64_t compare_column(const char *text, const struct column_run *ordinary, const struct column_run *nans,
                              int64_t column)
{
    const mfa_problem *p = &ordinary->inputs.problem;
    const struct reference_view map =
        reference_view(p, REFERENCE_BLOCK_MAP, ordinary->inputs.values[REFERENCE_BLOCK_MAP]);
    const int64_t first = column * p->block_map_kv;
    int64_t rows = 0;
    for (int64_t at = 0; at < p->batch * p->q_heads * p->q_len; at++) {
        const int64_t i = at % p->q_len, h = at / p->q_len % p->q_heads, b = at / p->q_len / p->q_heads;
        if (reference_is_mapped(p, &map, b, h, i, first))
            continue;
        rows++;
        if (!same_row(ordinary->forward.O, nans->forward.O, at, p->value_dim) ||
            !same_row(ordinary->forward.L, nans->forward.L, at, 1) ||
            !same_row(ordinary->backward.dQ, nans->backward.dQ, at, p->head_dim)) {
            report_fail(
                "%s\n        NaN in column %lld of the map reach query %lld of head %lld, which does not see it", text,
                (long long)column, (long long)i, (long long)h);
            return -1;
        }
    }
    for (int64_t at = 0; at < p->batch * p->kv_heads * p->kv_len; at++) {
        const int64_t j = at % p->kv_len;
        if (j / p->block_map_kv == column)
            continue;
        rows++;
        if (!same_row(ordinary->backward.dK, nans->backward.dK, at, p->head_dim) ||
            !same_row(ordinary->backward.dV, nans->backward.dV, at, p->value_dim)) {
            report_fail("%s\n        NaN in column %lld of the map reach the gradients of key %lld", text,
                        (long long)column, (long long)j);
            return -1;
        }
    }
    return rows;
}

static int compare_columns(const char *text, int broadcast)
{
    struct column_run ordinary = {.context = NULL}, nans = {.context = NULL};
    mfa_problem problem;
    int64_t rows = 0;
    if (mfa_context_create(NULL, &ordinary.context) != MFA_OK || mfa_problem_parse(text, &problem) != MFA_OK) {
        report_fail("%s\n        %s", text, mfa_last_error());
        return 1;
    }
    guarded_testing(text);
    const struct variant variant = {.map_broadcast = broadcast};
    inputs_open(&ordinary.inputs, &problem, variant, SEED, text);
    int good = run_column(&ordinary, NULL);
    const int64_t columns = (problem.kv_len + problem.block_map_kv - 1) / problem.block_map_kv;
    char *hit = calloc((size_t)problem.kv_len, 1);
    for (int64_t column = 0; column < columns && good; column++) {
        nans.context = ordinary.context;
        inputs_open(&nans.inputs, &problem, variant, SEED, text);
        for (int64_t j = 0; j < problem.kv_len; j++)
            hit[j] = j / problem.block_map_kv == column;
        put_nans(&nans.inputs, REFERENCE_K, hit);
        put_nans(&nans.inputs, REFERENCE_V, hit);
        good = run_column(&nans, &ordinary.forward);
        const int64_t same = good ? compare_column(text, &ordinary, &nans, column) : -1;
        good = same >= 0;
        rows += same;
        reference_close(&nans.forward);
        reference_close(&nans.backward);
        inputs_close(&nans.inputs);
    }
    printf("%7lld rows beside NaN  %s\n", (long long)rows, text);
    free(hit);
    reference_close(&ordinary.forward);
    reference_close(&ordinary.backward);
    inputs_close(&ordinary.inputs);
    mfa_context_destroy(ordinary.context);
    return !good;
}

static void test_hidden_blocks(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int broadcast;
    } cases[] = {
        {"forward f32 b1 h2 q300 kv500 d64 block_map_q128 block_map_kv128", 0},
        {"forward f32 b2 h4/2 q150 kv300 d64 block_map_q64 block_map_kv64", ALONG_HEAD},
        {"forward f32 b1 h1 q140 kv420 d40 block_map_q16 block_map_kv16", 0},
        {"forward f32 b1 h2 q170 kv420 d64 causal block_map_q48 block_map_kv80", 0},
        {"forward f16 b1 h2 q300 kv500 d64 block_map_q32 block_map_kv144", 0},
        {"forward f64 b1 h2/1 q200 kv300 d32 lower-90 block_map_q112 block_map_kv16 softcap2", 0},
        {"forward bf16 b1 h2/1 q400 kv1100 d64 block_map_q128 block_map_kv128", 0},
        {"forward bf16 b1 h2 q300 kv700 d64 causal block_map_q64 block_map_kv64", 0},
        {"forward bf16 b1 h1 q200 kv500 d128 block_map_q16 block_map_kv192 sinks", 0},
        {"forward f32 b1 h4/1 q2 kv500 d64 block_map_q16 block_map_kv48", ALONG_HEAD},
        {"forward bf16 b2 h2 q5 kv700 d64 block_map_q64 block_map_kv64", 0},
        {"forward f32 b1 h1 q40 kv3000 d64 block_map_q16 block_map_kv256", 0},
    };
    int failed = 0;
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++)
        failed += compare_columns(cases[n].text, cases[n].broadcast);
    assert_int_equal(failed, 0);
}

static void test_block_map(void **state)
{
    (void)state;
    in_child("forward f32 b1 h2 q100 kv2048 d64 block_map_q64 block_map_kv64", 0);
    in_child("forward f32 b2 h4/2 q300 kv2048 d64 block_map_q128 block_map_kv128", ALONG_HEAD);
    in_child("forward f16 b1 h2 q100 kv2048 d64 block_map_q16 block_map_kv48 mask_bool", 0);
    in_child("forward bf16 b1 h1 q300 kv3000 d64 causal block_map_q128 block_map_kv64", 0);
    in_child("forward f32 b1 h2 q100 kv2048 d64 block_map_q64 block_map_kv64 mask_f32", 0);
    in_child("forward f32 b1 h4/1 q1 kv4096 d64 block_map_q16 block_map_kv128", 0);
    in_child("forward bf16 b1 h4/2 q3 kv4096 d64 block_map_q64 block_map_kv64", ALONG_HEAD);
}

static void test_band(void **state)
{
    (void)state;
    in_child("forward f32 b1 h1 q64 kv2048 d64 causal", 0);
    in_child("forward bf16 b1 h2 q64 kv2048 d64 causal", 0);
    in_child("forward f64 b2 h2 q40 kv1024 d32 causal", 0);
    in_child("forward f16 b1 h4/2 q200 kv3000 d64 lower1000 upper1100", 0);
    in_child("forward f32 b1 h1 q100 kv2048 d64 lower1884 upper1948", 0);
    in_child("forward f32 b1 h1 q1500 kv900 d64 lower-1499 upper-1000", 0);
    in_child("forward f32 b1 h1 q64 kv1024 d64 upper-64", 0);
}

static void test_decode_window(void **state)
{
    (void)state;
    in_child("forward f32 b1 h4/1 q1 kv4096 d64 lower3900 upper4095", 0);
    in_child("forward bf16 b2 h8/2 q3 kv4096 d64 lower3900 upper4093", 0);
}

static void test_bool_mask(void **state)
{
    (void)state;
    in_child("forward f32 b1 h2 q100 kv2048 d64 mask_bool", 0);
    in_child("forward f32 b1 h2 q100 kv2048 d64 mask_bool", ALONG_HEAD | ALONG_ROW);
    in_child("forward f16 b1 h4/2 q1 kv4096 d64 mask_bool", ALONG_HEAD);
    in_child("forward bf16 b1 h1 q300 kv3000 d64 causal mask_bool", 0);
}

static void test_additive_mask(void **state)
{
    (void)state;
    in_child("forward f32 b1 h2 q100 kv2048 d64 mask_f32", 0);
    in_child("forward f32 b1 h2 q100 kv2048 d64 mask_f32", ALONG_HEAD | ALONG_ROW);
    in_child("forward bf16 b1 h4/2 q1 kv4096 d64 mask_f16", 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_band),      cmocka_unit_test(test_decode_window),
        cmocka_unit_test(test_bool_mask), cmocka_unit_test(test_additive_mask),
        cmocka_unit_test(test_block_map), cmocka_unit_test(test_hidden_blocks),
    };
    report_begin("test_masked_skip", SEED);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
