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

/* Chooses and loads. If the device does not have the resources for a kernel, a simpler one is tried. */
static mfa_status load(struct mfa_plan *plan)
{
    const struct mfa_opened *opened = plan->opened;
    mfa_status status = MFA_OK;
    for (int simpler = 0; simpler < 2; simpler++) {
        opened->backend->choose(opened->state, &plan->problem, simpler, &plan->choice);
        if (!count_workspace(&plan->choice, &plan->workspace))
            return mfa_fail(MFA_OUT_OF_MEMORY, "this problem's workspace is larger than any memory");
        status = mfa_context_kernel(plan->context, opened, &plan->choice.key, &plan->kernel);
        if (status != MFA_UNSUPPORTED)
            break;
    }
    return status;
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
    return load(plan);
}

/* Where the first element lies: on the CPU in memory, elsewhere in the device's buffer. */
static uintptr_t address(const struct mfa_plan *plan, const mfa_buffer *buffer)
{
    const uintptr_t base = plan->problem.device == MFA_DEVICE_CPU ? (uintptr_t)buffer->base : 0;
    return base + (uintptr_t)buffer->offset;
}

/* For backends that know the length of a buffer: all elements must lie within it. */
static mfa_status check_extent(const struct mfa_plan *plan, const struct mfa_operand *operand, const mfa_buffer *buffer)
{
    const struct mfa_opened *opened = plan->opened;
    const mfa_layout *layout = (const mfa_layout *)((const char *)&plan->problem + operand->layout);
    const int64_t strides[4] = {layout->batch, layout->head, layout->row, layout->column};
    const uint64_t element = mfa_operand_element(operand, &plan->problem);
    int64_t shape[4];
    uint64_t below = 0, above = 1; /* elements; their bytes fit, as the problem has been checked */
    if (!mfa_operand_extent(operand, &plan->problem, shape))
        return MFA_OK;
    for (int n = 0; n < 4; n++) {
        const int64_t reach = (shape[n] - 1) * strides[n];
        *(reach < 0 ? &below : &above) += reach < 0 ? -(uint64_t)reach : (uint64_t)reach;
    }
    const uint64_t length = opened->backend->buffer_length(opened->state, buffer->base), offset = buffer->offset;
    if (below * element > offset || offset > length || above * element > length - offset)
        return mfa_fail(MFA_INVALID,
                        "%s begins at byte %llu and has elements from %llu bytes before that to %llu after; its buffer "
                        "must hold them, but has %llu bytes",
                        operand->name, (unsigned long long)offset, (unsigned long long)below * element,
                        (unsigned long long)above * element, (unsigned long long)length);
    return MFA_OK;
}

/* Checks the buffer of operand number n. */
static mfa_status check_buffer(const struct mfa_plan *plan, const mfa_buffers *buffers, int n)
{
    const struct mfa_operand *operand = &mfa_operands[n];
    const mfa_buffer *buffer = mfa_operand_buffer(buffers, n);
    const int role = mfa_operand_role(operand, &plan->problem);
    if (!buffer->base) {
        if (!(role & MFA_ROLE_REQUIRED))
            return MFA_OK;
        int64_t shape[4];
        if (!mfa_operand_extent(operand, &plan->problem, shape))
            return MFA_OK;
        return mfa_fail(MFA_INVALID, "%s is NULL; the %s pass needs it", operand->name,
                        mfa_pass_name(plan->problem.pass));
    }
    if (!operand->role[plan->problem.pass])
        return mfa_fail(MFA_INVALID, "%s is given; the %s pass has none, and it must be NULL", operand->name,
                        mfa_pass_name(plan->problem.pass));
    if (!role)
        return mfa_fail(MFA_INVALID, "%s is given; only %s have it, and here it must be NULL", operand->name,
                        operand->where);
    const size_t element = mfa_operand_element(operand, &plan->problem);
    if (address(plan, buffer) % element != 0)
        return mfa_fail(MFA_INVALID, "%s begins at %p + %llu; it must be aligned to its elements of %zu bytes",
                        operand->name, buffer->base, (unsigned long long)buffer->offset, element);
    return plan->opened->backend->buffer_length ? check_extent(plan, operand, buffer) : MFA_OK;
}

static mfa_status check_workspace(const struct mfa_plan *plan, const mfa_buffers *buffers)
{
    const struct mfa_opened *opened = plan->opened;
    const mfa_buffer *workspace = &buffers->workspace;
    if (address(plan, workspace) % WORKSPACE_ALIGNMENT != 0)
        return mfa_fail(MFA_INVALID, "workspace begins at %p + %llu; it must be aligned to %d bytes", workspace->base,
                        (unsigned long long)workspace->offset, WORKSPACE_ALIGNMENT);
    if (buffers->workspace_size < plan->workspace)
        return mfa_fail(MFA_INVALID, "workspace_size is %llu; this problem needs %zu bytes",
                        (unsigned long long)buffers->workspace_size, plan->workspace);
    if (!opened->backend->buffer_length)
        return MFA_OK;
    const uint64_t length = opened->backend->buffer_length(opened->state, workspace->base);
    if (workspace->offset > length || buffers->workspace_size > length - workspace->offset)
        return mfa_fail(MFA_INVALID,
                        "workspace begins at byte %llu and workspace_size is %llu; its buffer must hold "
                        "that, but has %llu bytes",
                        (unsigned long long)workspace->offset, (unsigned long long)buffers->workspace_size,
                        (unsigned long long)length);
    return MFA_OK;
}

static mfa_status check_buffers(const struct mfa_plan *plan, const mfa_buffers *buffers)
{
    for (int i = 0; i < MFA_OPERAND_COUNT; i++) {
        const mfa_status status = check_buffer(plan, buffers, i);
        if (status != MFA_OK)
            return status;
    }
    return buffers->workspace.base ? check_workspace(plan, buffers) : MFA_OK;
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
    const int lends = !plan->opened->backend->keeps_workspace;
    if (lends && buffers.workspace.base) {
        workspace = (char *)buffers.workspace.base + buffers.workspace.offset;
    } else if (lends && plan->workspace > 0) {
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
