/* Planning and running. Everything that can be refused has been refused when launch is called. */
#include "core/plan.h"

#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "base/sized.h"
#include "core/operand.h"
#include "core/problem.h"

#define FIRST_SIZE (offsetof(mfa_buffers, workspace_size) + sizeof(uint64_t)) /* in version 0.1 */
#define WORKSPACE_ALIGNMENT 64

/* Returns 0 if the bytes are more than a size_t can say. */
static int count_workspace(const struct mfa_choice *choice, size_t *bytes)
{
    uint64_t all;
    if (__builtin_mul_overflow((uint64_t)choice->threads, choice->per_thread, &all) ||
        __builtin_add_overflow(all, choice->shared, &all) || all > SIZE_MAX)
        return 0;
    *bytes = (size_t)all;
    return 1;
}

mfa_status mfa_plan_prepare(mfa_context *context, const mfa_problem *problem, struct mfa_plan *plan)
{
    mfa_status status = mfa_problem_check(problem, &plan->problem);
    if (status != MFA_OK)
        return status;
    status = mfa_context_choose(context, &plan->problem, &plan->opened);
    if (status != MFA_OK)
        return status;
    plan->context = context;
    plan->opened->backend->choose(plan->opened->state, &plan->problem, &plan->choice);
    if (!count_workspace(&plan->choice, &plan->workspace))
        return mfa_fail(MFA_OUT_OF_MEMORY, "this problem's workspace is larger than any memory");
    return mfa_context_kernel(context, plan->opened, &plan->choice.key, &plan->kernel);
}

/* Where the first element lies: on the CPU in memory, elsewhere in the device's buffer. */
static uintptr_t address(const struct mfa_plan *plan, const mfa_buffer *buffer)
{
    const uintptr_t base = plan->problem.device == MFA_DEVICE_CPU ? (uintptr_t)buffer->base : 0;
    return base + (uintptr_t)buffer->offset;
}

static mfa_status check_buffer(const struct mfa_plan *plan, const struct mfa_operand *operand, const mfa_buffer *buffer)
{
    const int role = mfa_operand_role(operand, &plan->problem);
    if (!buffer->base) {
        if (!(role & MFA_ROLE_REQUIRED))
            return MFA_OK;
        int64_t shape[4];
        mfa_operand_shape(operand, &plan->problem, shape);
        if (!shape[0] || !shape[1] || !shape[2] || !shape[3])
            return MFA_OK;
        return mfa_fail(MFA_INVALID, "%s is NULL; the %s pass needs it", operand->name,
                        mfa_pass_name(plan->problem.pass));
    }
    if (!role) {
        static const char *const masks[] = {"no mask", "a bool mask", "an additive mask"};
        return mfa_fail(MFA_INVALID, "%s is given; a %s problem with %s has none, and it must be NULL", operand->name,
                        mfa_pass_name(plan->problem.pass), masks[plan->problem.mask]);
    }
    const size_t element = mfa_operand_element(operand, &plan->problem);
    if (address(plan, buffer) % element != 0)
        return mfa_fail(MFA_INVALID, "%s begins at %p + %llu; it must be aligned to its elements of %zu bytes",
                        operand->name, buffer->base, (unsigned long long)buffer->offset, element);
    return MFA_OK;
}

static mfa_status check_buffers(const struct mfa_plan *plan, const mfa_buffers *buffers)
{
    for (int i = 0; i < MFA_OPERAND_COUNT; i++) {
        const struct mfa_operand *operand = &mfa_operands[i];
        const mfa_buffer *buffer = (const mfa_buffer *)((const char *)buffers + operand->buffer);
        const mfa_status status = check_buffer(plan, operand, buffer);
        if (status != MFA_OK)
            return status;
    }
    if (buffers->workspace.base && address(plan, &buffers->workspace) % WORKSPACE_ALIGNMENT != 0)
        return mfa_fail(MFA_INVALID, "workspace begins at %p + %llu; it must be aligned to %d bytes",
                        buffers->workspace.base, (unsigned long long)buffers->workspace.offset, WORKSPACE_ALIGNMENT);
    if (buffers->workspace.base && buffers->workspace_size < plan->workspace)
        return mfa_fail(MFA_INVALID, "workspace_size is %llu; this problem needs %zu bytes",
                        (unsigned long long)buffers->workspace_size, plan->workspace);
    return MFA_OK;
}

mfa_status mfa_plan_execute(const struct mfa_plan *plan, const mfa_buffers *given, void *stream)
{
    mfa_buffers buffers;
    mfa_status status = mfa_sized_copy("mfa_buffers", given, FIRST_SIZE, &buffers, sizeof buffers);
    if (status == MFA_OK)
        status = check_buffers(plan, &buffers);
    if (status != MFA_OK)
        return status;
    void *workspace = NULL, *borrowed = NULL;
    if (buffers.workspace.base) {
        workspace = (char *)buffers.workspace.base + buffers.workspace.offset;
    } else if (plan->workspace > 0) {
        workspace = borrowed = mfa_context_borrow(plan->context, plan->workspace);
        if (!borrowed)
            return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes", plan->workspace);
    }
    status = plan->opened->backend->launch(plan->opened->state, plan->kernel, &plan->problem, &plan->choice, &buffers,
                                           workspace, stream);
    if (borrowed)
        mfa_context_return(plan->context, borrowed);
    return status;
}

mfa_status mfa_plan_print(const struct mfa_plan *plan, char *text, size_t capacity)
{
    char key[MFA_KEY_TEXT], line[MFA_KEY_TEXT + 128];
    mfa_key_print(&plan->choice.key, key);
    const int length = snprintf(line, sizeof line, "%s %s threads %d workspace %zu", plan->opened->backend->name, key,
                                plan->choice.threads, plan->workspace);
    if ((size_t)length >= capacity)
        return mfa_fail(MFA_INVALID, "capacity is %zu; this plan's line needs %d", capacity, length + 1);
    snprintf(text, capacity, "%s", line);
    return MFA_OK;
}
