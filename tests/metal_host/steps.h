/* Shared by the tests of the host: each has a folder, and ends with no findings and no live objects. */
#ifndef TESTS_METAL_HOST_STEPS_H
#define TESTS_METAL_HOST_STEPS_H

#include "metal_host/host.h"

extern char steps_folder[64]; /* for the kernels of this test */

/* Set-up and teardown of a test. */
int steps_begin(void **state);
int steps_end(void **state);
#define TEST(name) cmocka_unit_test_setup_teardown(name, steps_begin, steps_end)

/* Opens a context with that folder; and one that has run a problem. */
mfa_context *steps_open(void);
mfa_context *steps_open_warm(const char *text);

/* Runs a problem, and asserts that the results are right. */
void steps_run(mfa_context *context, const char *text, const struct host_options *options);

/* Prints all counts that are not 0. */
void steps_print_counts(const char *what, const struct metalsim_counts *counts);

#endif
