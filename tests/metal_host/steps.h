/* What the tests of the host have in common: a folder for each, and nothing found or alive at its end. */
#ifndef TESTS_METAL_HOST_STEPS_H
#define TESTS_METAL_HOST_STEPS_H

#include "metal_host/host.h"

extern char steps_folder[64]; /* for the kernels of this test */

/* Set-up and teardown of a test. */
int steps_begin(void **state);
int steps_end(void **state);
#define TEST(name) cmocka_unit_test_setup_teardown(name, steps_begin, steps_end)

/* A context with that folder; one that has run a problem. */
mfa_context *steps_open(void);
mfa_context *steps_open_warm(const char *text);

/* A run that must be right. */
void steps_run(mfa_context *context, const char *text, const struct host_options *options);

/* Prints all counts that are not 0. */
void steps_print_counts(const char *what, const struct metalsim_counts *counts);

#endif
