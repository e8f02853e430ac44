#include "support/context.h"

#include <stddef.h>
#include <stdio.h>

mfa_context *test_context;

int test_context_open(void **state)
{
    (void)state;
    const mfa_status status = mfa_context_create(NULL, &test_context);
    if (status != MFA_OK)
        fprintf(stderr, "%s: %s\n", mfa_status_name(status), mfa_last_error());
    return status != MFA_OK;
}

int test_context_close(void **state)
{
    (void)state;
    mfa_context_destroy(test_context);
    test_context = NULL;
    return 0;
}
