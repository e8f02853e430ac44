/* A problem under test: inputs from a seed, the reference's results for them, and the tolerance of results. */
#ifndef SUPPORT_TEST_CASE_H
#define SUPPORT_TEST_CASE_H

#include <stdint.h>

#include "reference/tolerance.h"
#include "support/cases.h"
#include "support/operands.h"

struct test_case { /* one variant of one case */
    const char *text;
    int passes;
    struct inputs inputs;
    struct reference truth, truth_of_int8;
    struct tolerance tolerance, of_rounded_P, of_int8;
    int rounds_P;        /* the kernel does, so of_rounded_P counts: see tolerance.h */
    int multiplies_int8; /* likewise, of problems with MFA_FAST_INT8: of_int8, truth_of_int8 */
    double worst;        /* error as a share of the tolerance */
};

/* Keeps a pointer to the text of the case, which stays the caller's. */
void test_case_open(struct test_case *test_case, const struct one_case *one, struct variant variant, uint64_t seed);
void test_case_close(struct test_case *test_case);

/* One line: the text, the variant, and the formatted words. It is valid until the next call. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
const char *
test_case_describe(const struct test_case *test_case, const char *format, ...);

double test_case_tolerance(const struct test_case *test_case, enum reference_tensor tensor);

/* The mean square of a tensor's errors. */
double test_case_mean_square(const struct test_case *test_case, enum reference_tensor tensor,
                             struct reference *results);

/* Whether all results that are not NULL lie within the tolerance; or equal `expected` bit for bit. Differences are
 * reported, with `what`. */
int test_case_is_right(struct test_case *test_case, const char *what, struct reference *results);
int test_case_is_same(const struct test_case *test_case, const char *what, struct reference *results,
                      struct reference *expected);

#endif
