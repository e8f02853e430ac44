/* A problem under test: its inputs, what the reference makes of them, and runs of the Metal kernels on it. */
#ifndef TESTS_METAL_SUBJECT_H
#define TESTS_METAL_SUBJECT_H

#include <stdint.h>

#include "kit/operands.h"
#include "metal/run.h"
#include "reference/tolerance.h"

enum { SUBJECT_FORWARD = 1, SUBJECT_BACKWARD = 2 };

struct subject { /* one variant of one problem in one dtype, for one set of tiles */
    const char *text;
    int passes;
    struct metal_target target;
    struct inputs inputs;
    struct reference truth;
    struct tolerance tolerance;
    double worst; /* error as a share of the tolerance */
};

/* Makes inputs, reference and tolerance; text, passes and target are given. */
void subject_open(struct subject *subject, const mfa_problem *problem, struct variant variant, uint64_t seed);
void subject_close(struct subject *subject);

/* The tolerance of one tensor. */
double subject_tolerance(const struct subject *subject, enum reference_tensor tensor);

/* Runs the passes into `results`, to be closed by the caller. NULL, or what went wrong: a refusal, a fault, a tile
 * visited that should not be, something written beside an output. */
const char *subject_run(struct subject *subject, enum arrangement arrangement, unsigned wanted, int64_t chunk,
                        struct reference *results);

#endif
