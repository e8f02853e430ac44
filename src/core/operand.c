/* The table of operands. */
#include "core/operand.h"

#include "core/problem.h"

/* The problem's dtype; f32 or f64; the mask's; the problem's dtype if that is f16 or bf16, else there is none. */
enum element { DATA, ROW_SUM, MASK, ROUNDED_OFF };

enum { READ = MFA_ROLE_READ, WRITTEN = MFA_ROLE_WRITTEN, SUMMED = MFA_ROLE_SUMMED, REQUIRED = MFA_ROLE_REQUIRED };

#define SIZE(member) offsetof(mfa_problem, member)
#define OPERAND(name) #name, offsetof(mfa_problem, name##_layout), offsetof(mfa_buffers, name)

const struct mfa_operand mfa_operands[MFA_OPERAND_COUNT] = {
    {OPERAND(q), SIZE(q_heads), SIZE(q_len), SIZE(head_dim), DATA, {READ | REQUIRED, READ | REQUIRED}},
    {OPERAND(k), SIZE(kv_heads), SIZE(kv_len), SIZE(head_dim), DATA, {READ | REQUIRED, READ | REQUIRED}},
    {OPERAND(v), SIZE(kv_heads), SIZE(kv_len), SIZE(value_dim), DATA, {READ | REQUIRED, READ | REQUIRED}},
    {OPERAND(mask), SIZE(q_heads), SIZE(q_len), SIZE(kv_len), MASK, {READ | REQUIRED, READ | REQUIRED}},
    {OPERAND(o), SIZE(q_heads), SIZE(q_len), SIZE(value_dim), DATA, {WRITTEN | REQUIRED, READ | REQUIRED}},
    {OPERAND(lse), SIZE(q_heads), SIZE(q_len), 0, ROW_SUM, {WRITTEN, READ | REQUIRED}},
    {OPERAND(d_o), SIZE(q_heads), SIZE(q_len), SIZE(value_dim), DATA, {0, READ | REQUIRED}},
    {OPERAND(dlse), SIZE(q_heads), SIZE(q_len), 0, ROW_SUM, {0, READ}},
    {OPERAND(dq), SIZE(q_heads), SIZE(q_len), SIZE(head_dim), DATA, {0, WRITTEN}},
    {OPERAND(dk), SIZE(kv_heads), SIZE(kv_len), SIZE(head_dim), DATA, {0, WRITTEN}},
    {OPERAND(dv), SIZE(kv_heads), SIZE(kv_len), SIZE(value_dim), DATA, {0, WRITTEN}},
    {OPERAND(dbias), SIZE(q_heads), SIZE(q_len), SIZE(kv_len), MASK, {0, WRITTEN | SUMMED}},
    {"o_low", offsetof(mfa_problem, o_layout), offsetof(mfa_buffers, o_low), SIZE(q_heads), SIZE(q_len),
     SIZE(value_dim), ROUNDED_OFF, {WRITTEN, READ}},
};

int mfa_operand_role(const struct mfa_operand *operand, const mfa_problem *problem)
{
    const int role = operand->role[problem->pass];
    if (operand->element == ROUNDED_OFF)
        return problem->dtype == MFA_F16 || problem->dtype == MFA_BF16 ? role : 0;
    if (operand->element != MASK)
        return role;
    const int in_use = (role & WRITTEN) ? problem->mask == MFA_MASK_ADDITIVE : problem->mask != MFA_MASK_NONE;
    return in_use ? role : 0;
}

void mfa_operand_shape(const struct mfa_operand *operand, const mfa_problem *problem, int64_t shape[4])
{
    const char *base = (const char *)problem;
    shape[0] = problem->batch;
    shape[1] = *(const int64_t *)(base + operand->heads);
    shape[2] = *(const int64_t *)(base + operand->rows);
    shape[3] = operand->columns ? *(const int64_t *)(base + operand->columns) : 1;
}

int mfa_operand_extent(const struct mfa_operand *operand, const mfa_problem *problem, int64_t shape[4])
{
    const mfa_layout *layout = (const mfa_layout *)((const char *)problem + operand->layout);
    const int64_t strides[4] = {layout->batch, layout->head, layout->row, layout->column};
    const int summed = mfa_operand_role(operand, problem) & MFA_ROLE_SUMMED;
    mfa_operand_shape(operand, problem, shape);
    for (int n = 0; n < 4 && summed; n++)
        if (strides[n] == 0)
            shape[n] = 1;
    return shape[0] && shape[1] && shape[2] && shape[3];
}

size_t mfa_operand_element(const struct mfa_operand *operand, const mfa_problem *problem)
{
    switch (operand->element) {
    case ROW_SUM: return problem->dtype == MFA_F64 ? 8 : 4;
    case MASK: return problem->mask == MFA_MASK_BOOL ? 1 : mfa_dtype_size(problem->mask_dtype);
    default: return mfa_dtype_size(problem->dtype);
    }
}

const mfa_buffer *mfa_operand_buffer(const mfa_buffers *buffers, int n)
{
    return (const mfa_buffer *)((const char *)buffers + mfa_operands[n].buffer);
}
