/* Runs the Metal kernels on a problem under test, with the tiles of one target. */
#ifndef TESTS_METAL_TEST_CASE_H
#define TESTS_METAL_TEST_CASE_H

#include <stdint.h>

#include "metal/run.h"
#include "support/test_case.h"

/* Runs the passes into `results`, to be closed by the caller. NULL, or a message: a failure, a fault, a wrong
 * number of visited blocks, a write beside an output. */
const char *metal_test_case_run(const struct test_case *test_case, struct metal_target target,
                                enum arrangement arrangement, unsigned wanted, int64_t chunk,
                                struct reference *results);

#endif
