/* A problem under test: inputs from a seed, what the reference makes of them, and how far from it a result may be. */
#ifndef KIT_SUBJECT_H
#define KIT_SUBJECT_H

#include <stdint.h>

#include "kit/cases.h"
#include "kit/operands.h"
#include "reference/tolerance.h"

struct subject { /* one variant of one case */
    const char *text;
    int passes;
    struct inputs inputs;
    struct reference truth;
    struct tolerance tolerance;
    int rounds_P; /* the kernel does: see tolerance.h */
    double worst; /* error as a share of the tolerance */
};

/* The case stays the caller's, and its text is pointed to. */
void subject_open(struct subject *subject, const struct one_case *one, struct variant variant, uint64_t seed);
void subject_close(struct subject *subject);

/* The text, what the variant adds to it, and how it is run; kept until the next. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
const char *
subject_describe(const struct subject *subject, const char *format, ...);

double subject_tolerance(const struct subject *subject, enum reference_tensor tensor);

/* Whether those of the results that there are lie within the tolerance; or are the same as `expected` bit for bit.
 * What is not is reported, with `what`. */
int subject_is_right(struct subject *subject, const char *what, struct reference *results);
int subject_is_same(const struct subject *subject, const char *what, struct reference *results,
                    struct reference *expected);

#endif
