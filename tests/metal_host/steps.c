#include "metal_host/steps.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "metal/kernels/contract.h"

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

enum { QUERIES = 5000, KEYS = 300000, DIM = 64 }; /* of the long run */

mfa_status steps_run_long(mfa_context *context, void *stream)
{
    static char none[64];
    mfa_problem problem;
    mfa_buffers buffers = {.size = sizeof buffers};
    mfa_problem_init(&problem, 1, 1, 1, QUERIES, KEYS, DIM, DIM);
    problem.device = MFA_DEVICE_METAL, problem.dtype = MFA_F16;
    const size_t row = DIM * 2; /* nothing is read or written */
    buffers.q.base = metalsim_runtime_buffer(none, QUERIES * row, 0);
    buffers.k.base = metalsim_runtime_buffer(none, KEYS * row, 0);
    buffers.v.base = metalsim_runtime_buffer(none, KEYS * row, 0);
    buffers.o.base = metalsim_runtime_buffer(none, QUERIES * row, 0);
    const mfa_status status = mfa_attention(context, &problem, &buffers, stream);
    void *const held[] = {buffers.q.base, buffers.k.base, buffers.v.base, buffers.o.base};
    for (int n = 0; n < 4; n++)
        metalsim_runtime_release(held[n]);
    return status;
}

void steps_check_long(const struct metalsim_counts *counts)
{
    uint64_t groups = 0, block = 1;
    for (size_t n = counts->dispatches; n-- > 0;) {
        const struct metalsim_recorded *d = metalsim_runtime_dispatch(n);
        struct mfa_metal_call call;
        if (strcmp(d->function, "attention_forward"))
            continue;
        memcpy(&call, d->buffers[MFA_METAL_BUFFER_CALL].bytes, sizeof call);
        assert_int_equal(call.first_group, groups);
        groups += d->threadgroups[0], block = (uint64_t)call.block_q;
    }
    assert_true(groups > 0);
    /* each block of queries, as often as the keys are split */
    assert_int_equal(groups % ((QUERIES + block - 1) / block), 0);
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
