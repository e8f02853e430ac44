/* Solves a test case with the reference, and compares results with that. */
#include "support/test_case.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reference/element.h"
#include "support/compare.h"
#include "support/report.h"

void test_case_open(struct test_case *s, const struct one_case *one, struct variant variant, uint64_t seed)
{
    struct operands operands;
    memset(s, 0, sizeof *s);
    s->text = one->text;
    s->passes = one->passes;
    inputs_open(&s->inputs, &one->problem, variant, seed, s->text);
    const mfa_problem *p = &s->inputs.problem;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        int backward = tensor >= REFERENCE_dQ, none = tensor == REFERENCE_DBIAS && p->mask != MFA_MASK_ADDITIVE;
        if (!none && (!backward || (s->passes & CASE_BACKWARD)))
            *reference_member(&s->truth, tensor) = reference_allocate(reference_count(p, tensor));
    }
    operands_open(&operands, &s->inputs, DENSE, 0); /* for the inputs alone */
    reference_attention(&operands.problem, &operands.buffers, &s->truth);
    reference_tolerance(&operands.problem, &operands.buffers, &s->truth, &s->tolerance);
    s->of_rounded_P = s->tolerance;
    if (p->dtype == MFA_BF16 && p->out_type == MFA_OUT_F32)
        reference_tolerance_of_rounded_P(&operands.problem, &operands.buffers, &s->truth, &s->of_rounded_P);
    if (p->fast) {
        double P_off;
        s->truth_of_int8.O = reference_allocate(reference_count(p, REFERENCE_O));
        s->truth_of_int8.L = reference_allocate(reference_count(p, REFERENCE_L));
        s->truth_of_int8.O_low = reference_allocate(reference_count(p, REFERENCE_O));
        reference_attention_int8(&operands.problem, &operands.buffers, &s->truth_of_int8, &P_off);
        s->of_int8 = s->tolerance;
        s->of_int8.O += P_off, s->of_int8.O_low += P_off;
    }
    operands_close(&operands);
    for (int64_t n = 0; n < reference_count(p, REFERENCE_O); n++)
        s->truth.O_low[n] = s->truth.O[n] - element_round(p->dtype, s->truth.O[n]);
}

/* What the kernel's results are to be. */
static const struct reference *truth_of(const struct test_case *s)
{
    return s->multiplies_int8 ? &s->truth_of_int8 : &s->truth;
}

void test_case_close(struct test_case *s)
{
    reference_close(&s->truth);
    reference_close(&s->truth_of_int8);
    inputs_close(&s->inputs);
}

const char *test_case_describe(const struct test_case *s, const char *format, ...)
{
    static char what[CASE_TEXT + 256];
    const struct variant *variant = &s->inputs.variant;
    const struct {
        const char *name;
        int along;
    } broadcasts[] = {{"mask", variant->mask_broadcast},
                      {"dbias", variant->dbias_broadcast},
                      {"K V", variant->kv_broadcast},
                      {"map", variant->map_broadcast}};
    int length = snprintf(what, sizeof what, "%s |", s->text);
    for (size_t n = 0; n < sizeof broadcasts / sizeof *broadcasts; n++)
        if (broadcasts[n].along)
            length += snprintf(
                what + length, sizeof what - (size_t)length, " %s broadcast along%s%s%s%s,", broadcasts[n].name,
                broadcasts[n].along & ALONG_BATCH ? " batch" : "", broadcasts[n].along & ALONG_HEAD ? " head" : "",
                broadcasts[n].along & ALONG_ROW ? " row" : "", broadcasts[n].along & ALONG_COLUMN ? " column" : "");
    length += snprintf(what + length, sizeof what - (size_t)length, "%s ", variant->dlse ? " dL given," : "");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what + length, sizeof what - (size_t)length, format, arguments);
    va_end(arguments);
    return what;
}

double test_case_tolerance(const struct test_case *s, enum reference_tensor tensor)
{
    const struct tolerance *t = s->multiplies_int8 ? &s->of_int8 : s->rounds_P ? &s->of_rounded_P : &s->tolerance;
    const double tolerances[REFERENCE_TENSORS] = {[REFERENCE_O] = s->rounds_P ? t->O_of_rounded_P : t->O,
                                                  [REFERENCE_L] = t->L,
                                                  [REFERENCE_dQ] = t->dQ,
                                                  [REFERENCE_dK] = t->dK,
                                                  [REFERENCE_dV] = t->dV,
                                                  [REFERENCE_DBIAS] = t->dbias,
                                                  [REFERENCE_DSINKS] = t->dsinks,
                                                  [REFERENCE_O_LOW] = s->rounds_P ? t->O_low_of_rounded_P : t->O_low};
    return tolerances[tensor];
}

double test_case_mean_square(const struct test_case *s, enum reference_tensor tensor, struct reference *results)
{
    struct reference truth = *truth_of(s);
    const double *got = *reference_member(results, tensor), *right = *reference_member(&truth, tensor);
    const int64_t count = reference_count(&s->inputs.problem, tensor);
    double sum = 0;
    for (int64_t at = 0; at < count; at++)
        sum += (got[at] - right[at]) * (got[at] - right[at]);
    return sum / (double)count;
}

/* Whether o + o_low is O to more digits than o has. */
static int compare_low(struct test_case *s, const char *what, const int64_t shape[4], const struct reference *results)
{
    const int64_t count = reference_count(&s->inputs.problem, REFERENCE_O);
    double *sums = reference_allocate(count);
    for (int64_t n = 0; n < count; n++)
        sums[n] = results->O[n] + results->O_low[n];
    int good = compare_close(what, "o + o_low", shape, sums, truth_of(s)->O, test_case_tolerance(s, REFERENCE_O_LOW),
                             &s->worst);
    free(sums);
    return good;
}

/* Within the tolerance of `test_case`; bit for bit if that is NULL. */
static int compare(const mfa_problem *problem, struct test_case *test_case, const char *what, struct reference *results,
                   struct reference *expected)
{
    int good = 1;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(results, tensor), *right = *reference_member(expected, tensor);
        const char *name = tensor_name(tensor);
        int64_t shape[4];
        reference_shape(problem, tensor, shape);
        if (!got || !right)
            continue;
        if (test_case && tensor == REFERENCE_O_LOW)
            good = compare_low(test_case, what, shape, results) && good;
        else if (test_case)
            good = compare_close(what, name, shape, got, right, test_case_tolerance(test_case, tensor),
                                 &test_case->worst) &&
                   good;
        else
            good = compare_same(what, name, shape, got, right) && good;
    }
    return good;
}

/* FNV-1a over the values of all results that there are. */
static uint64_t hash_of(const mfa_problem *problem, struct reference *results)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(results, tensor);
        for (int64_t n = 0, count = got ? reference_count(problem, tensor) : 0; n < count; n++) {
            uint64_t word;
            memcpy(&word, &got[n], sizeof word);
            hash = (hash ^ word) * 0x100000001b3;
        }
    }
    return hash;
}

int test_case_is_right(struct test_case *s, const char *what, struct reference *results)
{
    if (report_wants_bits())
        report_bits(what, hash_of(&s->inputs.problem, results));
    struct reference truth = *truth_of(s);
    return compare(&s->inputs.problem, s, what, results, &truth);
}

int test_case_is_same(const struct test_case *s, const char *what, struct reference *results,
                      struct reference *expected)
{
    return compare(&s->inputs.problem, NULL, what, results, expected);
}
