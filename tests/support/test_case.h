/* A problem under test: inputs from a seed, what the reference makes of them, and how far from it a result may be. */
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
    struct reference truth;
    struct tolerance tolerance;
    int rounds_P; /* the kernel does: see tolerance.h */
    double worst; /* error as a share of the tolerance */
};

/* The case stays the caller's, and its text is pointed to. */
void test_case_open(struct test_case *test_case, const struct one_case *one, struct variant variant, uint64_t seed);
void test_case_close(struct test_case *test_case);

/* The text, what the variant adds to it, and how it is run; kept until the next. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
const char *
test_case_describe(const struct test_case *test_case, const char *format, ...);

double test_case_tolerance(const struct test_case *test_case, enum reference_tensor tensor);

/* Whether those of the results that there are lie within the tolerance; or are the same as `expected` bit for bit.
 * What is not is reported, with `what`. */
int test_case_is_right(struct test_case *test_case, const char *what, struct reference *results);
int test_case_is_same(const struct test_case *test_case, const char *what, struct reference *results,
                      struct reference *expected);

#endif
