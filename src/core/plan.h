/* What was decided for one problem, and how it is run. */
#ifndef MFA_CORE_PLAN_H
#define MFA_CORE_PLAN_H

#include "core/backend.h"
#include "core/context.h"
#include "mfa.h"

struct mfa_plan {
    mfa_context *context;
    const struct mfa_opened *opened;
    const void *kernel;
    struct mfa_choice choice;
    size_t workspace;    /* bytes */
    mfa_problem problem; /* canonical */
};

/* Checks the problem, chooses and loads the kernel; allocates nothing once the kernel is loaded. Fails as
 * mfa_plan_create does, with *plan in an unspecified state. */
mfa_status mfa_plan_prepare(mfa_context *context, const mfa_problem *problem, struct mfa_plan *plan);

/* Checks the buffers, finds the workspace and launches. Fails as mfa_plan_run does. */
mfa_status mfa_plan_execute(const struct mfa_plan *plan, const mfa_buffers *buffers, void *stream);

/* The body of mfa_plan_describe. */
mfa_status mfa_plan_print(const struct mfa_plan *plan, char *text, size_t capacity);

#endif
