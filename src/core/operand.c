/* The table of operands. */
#include "core/operand.h"

#include "core/problem.h"

enum { READ = MFA_ROLE_READ, WRITTEN = MFA_ROLE_WRITTEN, SUMMED = MFA_ROLE_SUMMED, REQUIRED = MFA_ROLE_REQUIRED };

/* Offsets in mfa_problem of the members that operands.inc names, or of one that decides on a size that is computed. */
enum size {
    ONE = 0,
    batch = offsetof(mfa_problem, batch),
    batch_and_1 = offsetof(mfa_problem, cu_seqlens_q_layout),
    q_batch = offsetof(mfa_problem, varlen_q),     /* of q */
    q_rows = offsetof(mfa_problem, total_q),       /* of a batch entry of q */
    kv_entries = offsetof(mfa_problem, varlen_kv), /* the same of k */
    kv_rows = offsetof(mfa_problem, total_kv),
    pages = offsetof(mfa_problem, page_size), /* of a batch entry */
    k_columns = offsetof(mfa_problem, k_type),
    v_columns = offsetof(mfa_problem, v_type),
    k_groups = offsetof(mfa_problem, k_group), /* of columns that share a scale */
    v_groups = offsetof(mfa_problem, v_group),
    q_blocks = offsetof(mfa_problem, block_map_q),
    kv_blocks = offsetof(mfa_problem, block_map_kv),
    q_heads = offsetof(mfa_problem, q_heads),
    kv_heads = offsetof(mfa_problem, kv_heads),
    q_len = offsetof(mfa_problem, q_len),
    kv_len = offsetof(mfa_problem, kv_len),
    head_dim = offsetof(mfa_problem, head_dim),
    value_dim = offsetof(mfa_problem, value_dim)
};

#define RESULT_LIKE(name, of, entries, heads, rows, columns, element, forward, backward, exists, where) \
    {#name,                                                                                             \
     offsetof(mfa_problem, of##_layout),                                                                \
     offsetof(mfa_buffers, name),                                                                       \
     entries,                                                                                           \
     heads,                                                                                             \
     rows,                                                                                              \
     columns,                                                                                           \
     where,                                                                                             \
     MFA_ELEMENT_##element,                                                                             \
     {forward, backward}},
#define RESULT(name, ...) RESULT_LIKE(name, name, __VA_ARGS__)
#define INPUT(name, ...) RESULT_LIKE(name, name, __VA_ARGS__)

const struct mfa_operand mfa_operands[MFA_OPERAND_COUNT] = {
#include "core/operands.inc"
};

/* Whether the problem has operand number n. */
static int exists(int n, const mfa_problem *p)
{
    switch ((enum mfa_operand_number)n) {
#define RESULT_LIKE(name, of, entries, heads, rows, columns, element, forward, backward, exists, where) \
    case MFA_OPERAND_##name: return exists;
#define RESULT(name, ...) RESULT_LIKE(name, name, __VA_ARGS__)
#define INPUT(name, ...) RESULT_LIKE(name, name, __VA_ARGS__)
#include "core/operands.inc"
    case MFA_OPERAND_COUNT: break;
    }
    return 0;
}

int mfa_operand_role(const struct mfa_operand *operand, const mfa_problem *problem)
{
    const int role = operand->role[problem->pass];
    return role && exists((int)(operand - mfa_operands), problem) ? role : 0;
}

/* Blocks of `size` among n rows; none without a size. */
static int64_t count_blocks(int64_t n, int64_t size)
{
    return size > 0 ? n / size + (n % size != 0) : 0;
}

/* The number that one of enum size stands for. */
static int64_t size_of(const mfa_problem *problem, size_t size)
{
    switch (size) {
    case ONE: return 1;
    case q_blocks: return count_blocks(problem->q_len, problem->block_map_q);
    case kv_blocks: return count_blocks(problem->kv_len, problem->block_map_kv);
    case batch_and_1: return (int64_t)((uint64_t)problem->batch + 1);
    case q_batch: return problem->varlen_q ? 1 : problem->batch;
    case q_rows: return problem->varlen_q ? problem->total_q : problem->q_len;
    case kv_entries: return mfa_problem_kv_entries(problem);
    case kv_rows: return mfa_problem_kv_rows(problem);
    case k_columns: return mfa_kv_type_columns(problem->k_type, problem->head_dim);
    case v_columns: return mfa_kv_type_columns(problem->v_type, problem->value_dim);
    case k_groups: return problem->k_group > 0 ? count_blocks(problem->head_dim, problem->k_group) : 1;
    case v_groups: return problem->v_group > 0 ? count_blocks(problem->value_dim, problem->v_group) : 1;
    case pages: return count_blocks(problem->kv_len, problem->page_size);
    default: return *(const int64_t *)((const char *)problem + size);
    }
}

void mfa_operand_shape(const struct mfa_operand *operand, const mfa_problem *problem, int64_t shape[4])
{
    shape[0] = size_of(problem, operand->entries);
    shape[1] = size_of(problem, operand->heads);
    shape[2] = size_of(problem, operand->rows);
    shape[3] = size_of(problem, operand->columns);
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

int32_t mfa_operand_out_dtype(const mfa_problem *problem)
{
    return problem->out_type == MFA_OUT_F32 ? MFA_F32 : problem->dtype;
}

size_t mfa_operand_element(const struct mfa_operand *operand, const mfa_problem *problem)
{
    switch (operand->element) {
    case MFA_ELEMENT_OUT: return mfa_dtype_size(mfa_operand_out_dtype(problem));
    case MFA_ELEMENT_ROW_SUM: return problem->dtype == MFA_F64 ? 8 : 4;
    case MFA_ELEMENT_MASK: return problem->mask == MFA_MASK_BOOL ? 1 : mfa_dtype_size(problem->mask_dtype);
    case MFA_ELEMENT_FLOAT: return 4;
    case MFA_ELEMENT_K_CODE: return problem->k_type ? 1 : mfa_dtype_size(problem->dtype);
    case MFA_ELEMENT_V_CODE: return problem->v_type ? 1 : mfa_dtype_size(problem->dtype);
    case MFA_ELEMENT_INTEGER64: return 8;
    case MFA_ELEMENT_INTEGER32: return 4;
    case MFA_ELEMENT_BYTE: return 1;
    default: return mfa_dtype_size(problem->dtype);
    }
}

const mfa_buffer *mfa_operand_buffer(const mfa_buffers *buffers, int n)
{
    return (const mfa_buffer *)((const char *)buffers + mfa_operands[n].buffer);
}
