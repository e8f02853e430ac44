/* One context for the tests of a cmocka program: a set-up opens it, with the default options, and a teardown closes
 * it. */
#ifndef SUPPORT_CONTEXT_H
#define SUPPORT_CONTEXT_H

#include "mfa.h"

extern mfa_context *test_context;

/* A set-up and a teardown of a test or a group of tests; not 0: it failed. */
int test_context_open(void **state);
int test_context_close(void **state);

#endif
