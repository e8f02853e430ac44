/* The bodies of the public functions: arguments that must not be NULL are checked here, everything else by core.
 * mfa_last_error and mfa_status_name are in base/error.c. */
#include "mfa.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/sync.h"
#include "core/dropout.h"
#include "core/plan.h"
#include "core/precompile.h"
#include "core/problem.h"

#define TEXT(number) #number
#define VERSION(major, minor, patch) TEXT(major) "." TEXT(minor) "." TEXT(patch)

/* Returns from the calling function if the argument is NULL. */
#define NEED(argument)                                                            \
    do {                                                                          \
        if (!(argument))                                                          \
            return mfa_fail(MFA_INVALID, #argument " is NULL; it must be given"); \
    } while (0)

/* A thread that is cancelled within a call ends after it: otherwise it would leave locks held, and other threads
 * running on its memory. */
static mfa_status end_call(int cancellation, mfa_status status)
{
    mfa_cancellation_restore(cancellation);
    return status;
}

const char *mfa_version(void)
{
    return VERSION(MFA_VERSION_MAJOR, MFA_VERSION_MINOR, MFA_VERSION_PATCH);
}

const char *mfa_isa_name(int32_t n)
{
    return mfa_context_isa_name(mfa_backends, n);
}

mfa_status mfa_isa_supported(const char *isa)
{
    NEED(isa);
    return mfa_context_isa_supported(mfa_backends, isa);
}

mfa_status mfa_context_create(const mfa_context_options *options, mfa_context **context)
{
    NEED(context);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_context_open(mfa_backends, options, context));
}

void mfa_context_destroy(mfa_context *context)
{
    const int cancellation = mfa_cancellation_hold();
    if (context)
        mfa_context_close(context);
    mfa_cancellation_restore(cancellation);
}

mfa_status mfa_context_set_threads(mfa_context *context, int32_t threads)
{
    NEED(context);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_context_limit(context, threads));
}

void mfa_problem_init_sized(mfa_problem *problem, size_t size, int64_t batch, int64_t q_heads, int64_t kv_heads,
                            int64_t q_len, int64_t kv_len, int64_t head_dim, int64_t value_dim)
{
    if (!problem)
        return;
    mfa_problem made;
    mfa_problem_make(&made, batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim);
    made.size = size;
    memset(problem, 0, size);
    memcpy(problem, &made, size < sizeof made ? size : sizeof made);
}

mfa_status mfa_problem_print(const mfa_problem *problem, char *text, size_t capacity)
{
    NEED(problem);
    NEED(text);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_problem_write(problem, text, capacity));
}

mfa_status mfa_problem_parse_sized(const char *text, mfa_problem *problem, size_t size)
{
    NEED(text);
    NEED(problem);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_problem_read(text, problem, size));
}

mfa_status mfa_problem_supported(mfa_context *context, const mfa_problem *problem)
{
    NEED(context);
    NEED(problem);
    mfa_problem canonical;
    const struct mfa_opened *opened;
    const int cancellation = mfa_cancellation_hold();
    mfa_status status = mfa_problem_check(problem, &canonical);
    if (status == MFA_OK)
        status = mfa_context_choose(context, &canonical, &opened);
    return end_call(cancellation, status);
}

mfa_status mfa_plan_create(mfa_context *context, const mfa_problem *problem, mfa_plan **plan)
{
    NEED(context);
    NEED(problem);
    NEED(plan);
    mfa_plan *made = malloc(sizeof *made);
    if (!made)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a plan");
    const int cancellation = mfa_cancellation_hold();
    const mfa_status status = mfa_plan_prepare(context, problem, made);
    if (status == MFA_OK)
        *plan = made;
    else
        free(made);
    return end_call(cancellation, status);
}

mfa_status mfa_problem_dropout_mask(const mfa_problem *problem, const uint64_t *seed, uint8_t *kept)
{
    NEED(problem);
    NEED(seed);
    NEED(kept);
    return mfa_dropout_write_mask(problem, seed, kept);
}

mfa_status mfa_kv_quantize(int32_t type, int32_t dtype, int64_t rows, int64_t columns, int64_t group,
                           const void *numbers, int64_t numbers_row, void *codes, int64_t codes_row, float *scales,
                           int64_t scales_row)
{
    NEED(numbers);
    NEED(codes);
    NEED(scales);
    return mfa_kv_quantize_rows(type, dtype, rows, columns, group, numbers, numbers_row, codes, codes_row, scales,
                                scales_row);
}

void mfa_plan_destroy(mfa_plan *plan)
{
    free(plan);
}

size_t mfa_plan_workspace(const mfa_plan *plan)
{
    return plan ? plan->workspace : 0;
}

mfa_status mfa_plan_describe(const mfa_plan *plan, char *text, size_t capacity)
{
    NEED(plan);
    NEED(text);
    return mfa_plan_print(plan, text, capacity);
}

mfa_status mfa_plan_run(const mfa_plan *plan, const mfa_buffers *buffers, void *stream)
{
    NEED(plan);
    NEED(buffers);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_plan_execute(plan, buffers, stream));
}

mfa_status mfa_attention(mfa_context *context, const mfa_problem *problem, const mfa_buffers *buffers, void *stream)
{
    NEED(context);
    NEED(problem);
    NEED(buffers);
    mfa_plan plan;
    const int cancellation = mfa_cancellation_hold();
    mfa_status status = mfa_plan_prepare(context, problem, &plan);
    if (status == MFA_OK)
        status = mfa_plan_execute(&plan, buffers, stream);
    return end_call(cancellation, status);
}

mfa_status mfa_precompile(mfa_context *context, const mfa_problem *problem, const char *folder, mfa_compiler compiler,
                          void *argument)
{
    NEED(context);
    NEED(problem);
    const int cancellation = mfa_cancellation_hold();
    return end_call(cancellation, mfa_precompile_problem(context, problem, folder, compiler, argument));
}
