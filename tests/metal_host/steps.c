#include "metal_host/steps.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

char steps_folder[64];

int steps_begin(void **state)
{
    (void)state;
    host_reset();
    snprintf(steps_folder, sizeof steps_folder, "%s", host_folder());
    return 0;
}

int steps_end(void **state)
{
    (void)state;
    host_remove(steps_folder);
    const int clean = host_is_clean(1);
    host_reset();
    return !clean;
}

mfa_context *steps_open(void)
{
    mfa_context *context = host_open(steps_folder);
    assert_non_null(context);
    return context;
}

mfa_context *steps_open_warm(const char *text)
{
    mfa_context *context = steps_open();
    steps_run(context, text, &(struct host_options){0});
    return context;
}

void steps_run(mfa_context *context, const char *text, const struct host_options *options)
{
    struct test_case s;
    assert_true(host_test_case_open(&s, text, 0, 1));
    assert_true(host_check(context, &s, options));
    test_case_close(&s);
}

void steps_print_counts(const char *what, const struct metalsim_counts *counts)
{
    print_message("%s:", what);
#define COUNT(name)   \
    if (counts->name) \
        print_message(" %s %llu", #name, (unsigned long long)counts->name);
#include "runtime/counts.inc"
#undef COUNT
    print_message("\n");
}
