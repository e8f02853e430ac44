/* Runs of the Metal kernels on a problem under test, by the tiles of one target. */
#ifndef TESTS_METAL_SUBJECT_H
#define TESTS_METAL_SUBJECT_H

#include <stdint.h>

#include "kit/subject.h"
#include "metal/run.h"

/* Runs the passes into `results`, to be closed by the caller. NULL, or what went wrong: a failure, a fault, a
 * wrong number of visited blocks, something written beside an output. */
const char *metal_subject_run(const struct subject *subject, struct metal_target target, enum arrangement arrangement,
                              unsigned wanted, int64_t chunk, struct reference *results);

#endif
