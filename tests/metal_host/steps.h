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

/* Runs a problem that would take the GPU long, with kernels that are idle. */
mfa_status steps_run_long(mfa_context *context, void *stream);

/* Asserts that its commands together are the whole of it, each beginning where the one before it ended. */
void steps_check_long(const struct metalsim_counts *counts);

/* Prints all counts that are not 0. */
void steps_print_counts(const char *what, const struct metalsim_counts *counts);

#endif
