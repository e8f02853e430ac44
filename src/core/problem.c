/* A problem is checked here, once, with a sentence for each thing that can be wrong with it. No code that runs later
 * checks a size, a stride or an enum again. */
#include "core/problem.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/sized.h"
#include "core/dropout.h"
#include "core/operand.h"

#define FIRST_SIZE (offsetof(mfa_problem, dbias_layout) + sizeof(mfa_layout)) /* in version 0.1 */
/* So that MFA_DIM_MAX doubles for each row fit in an int64_t, with a few rows of each head padded to a tile of 128. */
#define ROWS_MAX (INT64_C(1) << 43)

const char *mfa_pass_name(int32_t pass)
{
    static const char *const names[] = {[MFA_FORWARD] = "forward", [MFA_BACKWARD] = "backward"};
    return pass >= 0 && pass <= MFA_BACKWARD ? names[pass] : NULL;
}

const char *mfa_dtype_name(int32_t dtype)
{
    static const char *const names[] = {[MFA_F32] = "f32", [MFA_F16] = "f16", [MFA_BF16] = "bf16", [MFA_F64] = "f64"};
    return dtype >= 0 && dtype <= MFA_F64 ? names[dtype] : NULL;
}

const char *mfa_kv_type_name(int32_t type)
{
    static const char *const names[] = {[MFA_KV_SAME] = "same", [MFA_KV_INT8] = "int8", [MFA_KV_E4M3] = "e4m3",
                                        [MFA_KV_E5M2] = "e5m2", [MFA_KV_INT4] = "int4", [MFA_KV_NF4] = "nf4"};
    return type >= 0 && type <= MFA_KV_NF4 ? names[type] : NULL;
}

int64_t mfa_kv_type_columns(int32_t type, int64_t columns)
{
    return type == MFA_KV_INT4 || type == MFA_KV_NF4 ? columns / 2 : columns;
}

size_t mfa_dtype_size(int32_t dtype)
{
    switch (dtype) {
    case MFA_F64: return 8;
    case MFA_F32: return 4;
    default: return 2;
    }
}

int mfa_problem_is_varlen(const mfa_problem *p)
{
    return p->varlen_q || p->varlen_kv || p->seqused_k || p->leftpad_k || p->cache_batch_idx || p->page_size > 0;
}

int64_t mfa_problem_kv_entries(const mfa_problem *p)
{
    return p->varlen_kv ? 1 : p->cache_batch_idx || p->page_size > 0 ? p->kv_batch : p->batch;
}

int64_t mfa_problem_kv_rows(const mfa_problem *p)
{
    return p->varlen_kv ? p->total_kv : p->page_size > 0 ? p->page_size : p->kv_len;
}

double mfa_problem_scale(int64_t head_dim)
{
    return 1 / sqrt((double)head_dim);
}

/* Strides that do not fit in an int64_t wrap; the sizes they come from are refused by the check. */
static mfa_layout dense(const int64_t shape[4])
{
    const uint64_t head = (uint64_t)shape[2] * (uint64_t)shape[3];
    const uint64_t batch = head * (uint64_t)shape[1];
    return (mfa_layout){(int64_t)batch, (int64_t)head, shape[3], 1};
}

void mfa_problem_make_dense(mfa_problem *problem)
{
    for (int n = 0; n < MFA_OPERAND_COUNT; n++) {
        int64_t shape[4];
        mfa_operand_shape(&mfa_operands[n], problem, shape);
        *(mfa_layout *)((char *)problem + mfa_operands[n].layout) = dense(shape);
    }
    if (problem->block_map_q == 0)
        problem->block_map_layout = (mfa_layout){0, 0, 0, 0}; /* its sizes are not known */
    if (problem->page_size == 0)
        problem->block_table_layout = (mfa_layout){0, 0, 0, 0};
}

void mfa_problem_make(mfa_problem *problem, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t q_len,
                      int64_t kv_len, int64_t head_dim, int64_t value_dim)
{
    *problem = (mfa_problem){
        .size = sizeof *problem,
        .pass = MFA_FORWARD,
        .device = MFA_DEVICE_CPU,
        .dtype = MFA_F32,
        .mask = MFA_MASK_NONE,
        .mask_dtype = MFA_F32,
        .batch = batch,
        .q_heads = q_heads,
        .kv_heads = kv_heads,
        .q_len = q_len,
        .kv_len = kv_len,
        .head_dim = head_dim,
        .value_dim = value_dim,
        .lower = MFA_BAND_OPEN_LOWER,
        .upper = MFA_BAND_OPEN_UPPER,
        .scale = mfa_problem_scale(head_dim),
    };
    mfa_problem_make_dense(problem);
}

static mfa_status check_enums(const mfa_problem *problem)
{
    if (!mfa_pass_name(problem->pass))
        return mfa_fail(MFA_INVALID, "pass is %d; it must be 0 (forward) or 1 (backward)", problem->pass);
#define WORD(word, member, value, values)                   \
    if (problem->member != 0 && problem->member != (value)) \
        return mfa_fail(MFA_INVALID, #member " is %d; it must be " values, problem->member);
#define RESERVED(member)      \
    if (problem->member != 0) \
        return mfa_fail(MFA_INVALID, #member " is %d; it must be 0", problem->member);
#define TYPE(prefix, member)                                                                                      \
    if (!mfa_kv_type_name(problem->member))                                                                       \
        return mfa_fail(MFA_INVALID,                                                                              \
                        #member " is %d; it must be 0 (as q), 1 (int8), 2 (e4m3), 3 (e5m2), 4 (int4) or 5 (nf4)", \
                        problem->member);
#include "core/options.inc"
    if (!mfa_dtype_name(problem->dtype))
        return mfa_fail(MFA_INVALID, "dtype is %d; it must be 0 (f32), 1 (f16), 2 (bf16) or 3 (f64)", problem->dtype);
    if (problem->mask < 0 || problem->mask > MFA_MASK_ADDITIVE)
        return mfa_fail(MFA_INVALID, "mask is %d; it must be 0 (none), 1 (bool) or 2 (additive)", problem->mask);
    if (problem->mask == MFA_MASK_ADDITIVE && !mfa_dtype_name(problem->mask_dtype))
        return mfa_fail(MFA_INVALID, "mask_dtype is %d; it must be 0 (f32), 1 (f16), 2 (bf16) or 3 (f64)",
                        problem->mask_dtype);
    return MFA_OK;
}

mfa_status mfa_problem_copy(const mfa_problem *given, mfa_problem *copy)
{
    const mfa_status status = mfa_sized_copy("mfa_problem", given, FIRST_SIZE, copy, sizeof *copy);
    return status == MFA_OK ? check_enums(copy) : status;
}

/* Whether batch * heads * rows, with 1 in place of 0, is at most ROWS_MAX. */
static int rows_fit(int64_t batch, int64_t heads, int64_t rows)
{
    int64_t product = batch ? batch : 1;
    return !__builtin_mul_overflow(product, heads ? heads : 1, &product) &&
           !__builtin_mul_overflow(product, rows ? rows : 1, &product) && product <= ROWS_MAX;
}

mfa_status mfa_problem_check_signs(const mfa_problem *problem)
{
    static const struct {
        const char *name;
        size_t offset;
    } sizes[] = {
        {"batch", offsetof(mfa_problem, batch)},         {"q_heads", offsetof(mfa_problem, q_heads)},
        {"kv_heads", offsetof(mfa_problem, kv_heads)},   {"q_len", offsetof(mfa_problem, q_len)},
        {"kv_len", offsetof(mfa_problem, kv_len)},       {"head_dim", offsetof(mfa_problem, head_dim)},
        {"value_dim", offsetof(mfa_problem, value_dim)}, {"total_q", offsetof(mfa_problem, total_q)},
        {"total_kv", offsetof(mfa_problem, total_kv)},   {"kv_batch", offsetof(mfa_problem, kv_batch)},
        {"page_size", offsetof(mfa_problem, page_size)},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const int64_t size = *(const int64_t *)((const char *)problem + sizes[i].offset);
        if (size < 0)
            return mfa_fail(MFA_INVALID, "%s is %lld; it must be 0 or more", sizes[i].name, (long long)size);
    }
    return MFA_OK;
}

static mfa_status check_sizes(const mfa_problem *problem)
{
    const mfa_status status = mfa_problem_check_signs(problem);
    if (status != MFA_OK)
        return status;
    const int64_t kv_heads = problem->kv_heads;
    if (kv_heads == 0 ? problem->q_heads != 0 : problem->q_heads % kv_heads != 0)
        return mfa_fail(MFA_INVALID, "q_heads is %lld and kv_heads is %lld; q_heads must be a multiple of kv_heads",
                        (long long)problem->q_heads, (long long)kv_heads);
    if (!rows_fit(problem->batch, problem->q_heads, problem->q_len))
        return mfa_fail(MFA_INVALID, "batch is %lld, q_heads %lld and q_len %lld; their product must be at most 2^43",
                        (long long)problem->batch, (long long)problem->q_heads, (long long)problem->q_len);
    if (!rows_fit(problem->batch, kv_heads, problem->kv_len))
        return mfa_fail(MFA_INVALID, "batch is %lld, kv_heads %lld and kv_len %lld; their product must be at most 2^43",
                        (long long)problem->batch, (long long)kv_heads, (long long)problem->kv_len);
    if (!rows_fit(1, problem->q_heads, problem->total_q) || !rows_fit(1, kv_heads, problem->total_kv))
        return mfa_fail(MFA_INVALID,
                        "q_heads is %lld and total_q %lld, kv_heads %lld and total_kv %lld; the products must be at "
                        "most 2^43",
                        (long long)problem->q_heads, (long long)problem->total_q, (long long)kv_heads,
                        (long long)problem->total_kv);
    if (problem->kv_batch > ROWS_MAX || problem->page_size > ROWS_MAX)
        return mfa_fail(MFA_INVALID, "kv_batch is %lld and page_size %lld; they must be at most 2^43",
                        (long long)problem->kv_batch, (long long)problem->page_size);
    return MFA_OK;
}

/* A size without what it belongs to, and combinations that no tensor has. */
static mfa_status check_varlen(const mfa_problem *p)
{
    const long long pages = p->page_size, kv_batch = p->kv_batch;
    if (p->total_q && !p->varlen_q)
        return mfa_fail(MFA_INVALID, "total_q is %lld and varlen_q 0; only packed queries have a total_q",
                        (long long)p->total_q);
    if (p->total_kv && !p->varlen_kv)
        return mfa_fail(MFA_INVALID, "total_kv is %lld and varlen_kv 0; only packed keys have a total_kv",
                        (long long)p->total_kv);
    if (p->varlen_kv && (pages || p->cache_batch_idx))
        return mfa_fail(MFA_INVALID,
                        "varlen_kv is 1, page_size %lld and cache_batch_idx %d; packed keys have neither pages nor an "
                        "index: of those, seqused_k gives the lengths",
                        pages, p->cache_batch_idx);
    if (pages && p->cache_batch_idx)
        return mfa_fail(MFA_INVALID,
                        "page_size is %lld and cache_batch_idx 1; the rows of block_table say where an entry's pages "
                        "are, so cache_batch_idx must be 0",
                        pages);
    if (kv_batch && !pages && !p->cache_batch_idx)
        return mfa_fail(MFA_INVALID, "kv_batch is %lld; without page_size and cache_batch_idx it must be 0", kv_batch);
    if ((pages || p->cache_batch_idx) && p->pass == MFA_BACKWARD)
        return mfa_fail(MFA_UNSUPPORTED,
                        "page_size is %lld and cache_batch_idx %d in the backward pass; kernels exist for 0 and 0: "
                        "entries may share keys",
                        pages, p->cache_batch_idx);
    if (p->batch == 0 && (p->total_q || (p->total_kv && p->pass == MFA_BACKWARD)))
        return mfa_fail(MFA_INVALID, "batch is 0, total_q %lld and total_kv %lld; rows must belong to a batch entry",
                        (long long)p->total_q, (long long)p->total_kv);
    int64_t shape[4];
    if (pages && mfa_operand_extent(&mfa_operands[MFA_OPERAND_block_table], p, shape) && shape[3] > 1 &&
        p->block_table_layout.column == 0)
        return mfa_fail(MFA_INVALID,
                        "block_table_layout.column is 0 for %lld pages; it must not be: mfa_problem_init gives a block "
                        "table no layout",
                        (long long)shape[3]);
    return MFA_OK;
}

/* Of k or v, `name`, with so many columns, `dim`. */
static mfa_status check_kv_type(const mfa_problem *p, const char *name, int32_t type, int64_t group, const char *dim,
                                int64_t columns, const mfa_layout *scale)
{
    const int packs = mfa_kv_type_columns(type, 64) != 64;
    if (group && !type)
        return mfa_fail(MFA_INVALID, "%s_group is %lld and %s_type 0; only codes have scales", name, (long long)group,
                        name);
    if (group < 0 || (packs && group % 32 != 0))
        return mfa_fail(MFA_INVALID, "%s_group is %lld; it must be 0 (one scale for a row) or %s", name,
                        (long long)group, packs ? "a multiple of 32" : "positive");
    if (packs && columns % 32 != 0)
        return mfa_fail(MFA_UNSUPPORTED, "%s_type is %s and %s %lld; of 4 bits kernels exist for multiples of 32", name,
                        mfa_kv_type_name(type), dim, (long long)columns);
    if (type && group > 0 && group < columns && mfa_problem_kv_rows(p) > 1 && scale->row == scale->column &&
        scale->row != 0)
        return mfa_fail(MFA_INVALID,
                        "%s_scale_layout.row and .column are both %lld for %s_group %lld of %lld columns; they must "
                        "differ: mfa_problem_init gives scales the layout of whole rows",
                        name, (long long)scale->row, name, (long long)group, (long long)columns);
    if (type && p->pass == MFA_BACKWARD)
        return mfa_fail(MFA_UNSUPPORTED,
                        "%s_type is %s in the backward pass; kernels exist for 0: codes have no gradient", name,
                        mfa_kv_type_name(type));
    return MFA_OK;
}

static mfa_status check_block_map(const mfa_problem *p)
{
    const long long q = p->block_map_q, kv = p->block_map_kv;
    if (q < 0 || q % 16 != 0)
        return mfa_fail(MFA_INVALID, "block_map_q is %lld; it must be a multiple of 16, or 0 (no block map)", q);
    if (kv < 0 || kv % 16 != 0)
        return mfa_fail(MFA_INVALID, "block_map_kv is %lld; it must be a multiple of 16, or 0 (no block map)", kv);
    if (!q != !kv)
        return mfa_fail(MFA_INVALID,
                        "block_map_q is %lld and block_map_kv is %lld; both must be 0 (no block map), or neither", q,
                        kv);
    int64_t shape[4];
    const int any = mfa_operand_extent(&mfa_operands[MFA_OPERAND_block_map], p, shape);
    if (any && p->block_map_layout.row == 0 && p->block_map_layout.column == 0 && (shape[2] > 1 || shape[3] > 1))
        return mfa_fail(MFA_INVALID,
                        "block_map_layout.row and .column are 0 for %lld x %lld blocks; one of them must not be: "
                        "mfa_problem_init gives a block map no layout",
                        (long long)shape[2], (long long)shape[3]);
    return MFA_OK;
}

static mfa_status check_numbers(const mfa_problem *problem)
{
    const double size = fabs(problem->scale);
    if (isnan(problem->scale))
        return mfa_fail(MFA_INVALID, "scale is nan; it must be finite"); /* printf might print its sign */
    if (isinf(problem->scale))
        return mfa_fail(MFA_INVALID, "scale is %g; it must be finite", problem->scale);
    if (size != 0 && !(size >= 1e-60 && size <= 1e60))
        return mfa_fail(MFA_UNSUPPORTED, "scale is %g; kernels exist for 0 and, of either sign, 1e-60 to 1e60",
                        problem->scale);
    if (!(problem->softcap >= 0) || isinf(problem->softcap))
        return mfa_fail(MFA_INVALID, "softcap is %g; it must be 0 (none) or positive and finite", problem->softcap);
    if (problem->softcap > 0 && !(problem->softcap >= 1e-30 && problem->softcap <= 1e30))
        return mfa_fail(MFA_UNSUPPORTED, "softcap is %g; kernels exist for 0 (none) and 1e-30 to 1e30",
                        problem->softcap);
    if (!(problem->dropout >= 0 && problem->dropout <= 1))
        return mfa_fail(MFA_INVALID, "dropout is %g; it must be 0 to 1", problem->dropout);
    return MFA_OK;
}

static mfa_status check_out_type(const mfa_problem *problem)
{
    if (problem->out_type == MFA_OUT_F32 && problem->dtype == MFA_F64)
        return mfa_fail(MFA_INVALID, "out_type is 1 (f32) and dtype 3 (f64); of f64 it must be 0 (as q)");
    return MFA_OK;
}

/* Of k or v: whether its rows are int8 with one scale each. */
static int has_int8_rows(int32_t type, int64_t group, int64_t columns)
{
    return type == MFA_KV_INT8 && (group == 0 || group >= columns);
}

static mfa_status check_fast(const mfa_problem *p)
{
    if (p->fast && p->pass == MFA_BACKWARD)
        return mfa_fail(MFA_UNSUPPORTED, "fast is 1 (products of int8) in the backward pass; kernels exist for 0");
    if (p->fast &&
        (!has_int8_rows(p->k_type, p->k_group, p->head_dim) || !has_int8_rows(p->v_type, p->v_group, p->value_dim)))
        return mfa_fail(MFA_INVALID,
                        "fast is 1 (products of int8), k_type %s with k_group %lld of %lld columns, v_type %s with "
                        "v_group %lld of %lld; both must be int8 with one scale for each row (a group of 0, or of all "
                        "columns)",
                        mfa_kv_type_name(p->k_type), (long long)p->k_group, (long long)p->head_dim,
                        mfa_kv_type_name(p->v_type), (long long)p->v_group, (long long)p->value_dim);
    return MFA_OK;
}

/* The counters of dropout have 32 bits for each of these. */
static mfa_status check_dropout(const mfa_problem *p)
{
    const int64_t most = INT64_C(1) << 32;
    if (p->dropout > 0 && (p->batch > most || p->q_heads > most || p->q_len > most || p->kv_len / 8 > most))
        return mfa_fail(
            MFA_UNSUPPORTED,
            "dropout is %g, batch %lld, q_heads %lld, q_len %lld and kv_len %lld; with dropout kernels exist "
            "for up to 2^32, and 2^35 keys",
            p->dropout, (long long)p->batch, (long long)p->q_heads, (long long)p->q_len, (long long)p->kv_len);
    return MFA_OK;
}

/* The bytes between the first element and the farthest one below it, above it, and between those two. */
static int extent_fits(const int64_t shape[4], const int64_t stride[4], size_t element)
{
    int64_t below = 0, above = 0, bytes;
    for (int i = 0; i < 4; i++) {
        int64_t reach;
        if (__builtin_mul_overflow(stride[i], shape[i] - 1, &reach))
            return 0;
        int64_t *side = reach < 0 ? &below : &above;
        if (__builtin_add_overflow(*side, reach, side))
            return 0;
    }
    return !__builtin_sub_overflow(above, below, &bytes) && !__builtin_add_overflow(bytes, 1, &bytes) &&
           !__builtin_mul_overflow(bytes, (int64_t)element, &bytes);
}

static mfa_status check_layout(const struct mfa_operand *operand, int role, const mfa_problem *problem)
{
    static const char *const dimensions[] = {"batch", "head", "row", "column"};
    const mfa_layout *layout = (const mfa_layout *)((const char *)problem + operand->layout);
    const int64_t stride[4] = {layout->batch, layout->head, layout->row, operand->columns ? layout->column : 0};
    int64_t shape[4];
    if (!mfa_operand_extent(operand, problem, shape))
        return MFA_OK; /* there are no elements, so no stride is used */
    if (!extent_fits(shape, stride, mfa_operand_element(operand, problem)))
        return mfa_fail(MFA_INVALID,
                        "%s_layout is %lld, %lld, %lld, %lld for sizes %lld, %lld, %lld, %lld; "
                        "the bytes from the first element to the last must be below 2^63",
                        operand->name, (long long)stride[0], (long long)stride[1], (long long)stride[2],
                        (long long)stride[3], (long long)shape[0], (long long)shape[1], (long long)shape[2],
                        (long long)shape[3]);
    if (!(role & MFA_ROLE_WRITTEN))
        return MFA_OK;
    for (int i = 0; i < 4; i++)
        if (stride[i] == 0 && shape[i] > 1)
            return mfa_fail(MFA_INVALID, "%s_layout.%s is 0 over %lld elements; an output must not overlap itself",
                            operand->name, dimensions[i], (long long)shape[i]);
    return MFA_OK;
}

static mfa_status check_dim(const char *name, int64_t dim)
{
    if (dim >= 1 && dim <= MFA_DIM_MAX)
        return MFA_OK;
    return mfa_fail(MFA_UNSUPPORTED, "%s is %lld; kernels exist for 1 to %d", name, (long long)dim, MFA_DIM_MAX);
}

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* A block of a map that has more than `rows` rows is one of as many as they are, in whole units of 16. */
static int64_t clamp_block(int64_t block, int64_t rows)
{
    return clamp(block, 0, rows > 0 ? (rows + 15) / 16 * 16 : 16);
}

/* The band within what can matter; counted from the first query and key, where all entries agree on that. */
static void clamp_band(mfa_problem *p)
{
    const int64_t most = p->bottom_right ? p->q_len + p->kv_len : 0;
    p->lower = clamp(p->lower, -p->q_len - most, p->kv_len + most);
    p->upper = clamp(p->upper, -p->q_len - most, p->kv_len + most);
    if (p->bottom_right && mfa_problem_is_varlen(p)) {
        p->bottom_right = p->lower > 1 - p->q_len - p->kv_len || p->upper < p->q_len + p->kv_len - 1;
    } else if (p->bottom_right) {
        p->lower += p->kv_len - p->q_len;
        p->upper += p->kv_len - p->q_len;
        p->bottom_right = 0;
    }
    if (!p->bottom_right) {
        p->lower = clamp(p->lower, -p->q_len, p->kv_len);
        p->upper = clamp(p->upper, -p->q_len, p->kv_len);
    }
}

mfa_status mfa_problem_check(const mfa_problem *given, mfa_problem *canonical)
{
    mfa_problem problem;
    mfa_status status = mfa_problem_copy(given, &problem);
    if (status == MFA_OK)
        status = check_sizes(&problem);
    if (status == MFA_OK)
        status = check_numbers(&problem);
    if (status == MFA_OK)
        status = check_out_type(&problem);
    if (status == MFA_OK)
        status = check_dropout(&problem);
    if (status == MFA_OK)
        status = check_block_map(&problem);
    if (status == MFA_OK)
        status = check_varlen(&problem);
    if (status == MFA_OK)
        status = check_kv_type(&problem, "k", problem.k_type, problem.k_group, "head_dim", problem.head_dim,
                               &problem.k_scale_layout);
    if (status == MFA_OK)
        status = check_kv_type(&problem, "v", problem.v_type, problem.v_group, "value_dim", problem.value_dim,
                               &problem.v_scale_layout);
    if (status == MFA_OK)
        status = check_fast(&problem);
    if (status != MFA_OK)
        return status;

    if (problem.mask != MFA_MASK_ADDITIVE)
        problem.mask_dtype = problem.dtype;
    if (problem.dtype == MFA_F32)
        problem.out_type = MFA_OUT_SAME;
    clamp_band(&problem);
    problem.block_map_q = clamp_block(problem.block_map_q, problem.q_len);
    problem.block_map_kv = clamp_block(problem.block_map_kv, problem.kv_len);

    for (int i = 0; i < MFA_OPERAND_COUNT && status == MFA_OK; i++) {
        const int role = mfa_operand_role(&mfa_operands[i], &problem);
        if (role)
            status = check_layout(&mfa_operands[i], role, &problem);
    }
    if (status == MFA_OK)
        status = check_dim("head_dim", problem.head_dim);
    if (status == MFA_OK)
        status = check_dim("value_dim", problem.value_dim);
    if (status == MFA_OK)
        *canonical = problem;
    return status;
}

static struct mfa_strides strides(const mfa_layout *layout)
{
    return (struct mfa_strides){layout->batch, layout->head, layout->row, layout->column};
}

struct mfa_args mfa_problem_args(const mfa_problem *p)
{
    return (struct mfa_args){
        .batch = p->batch,
        .q_heads = p->q_heads,
        .kv_heads = p->kv_heads,
        .q_heads_per_kv = p->kv_heads ? p->q_heads / p->kv_heads : 1,
        .q_len = p->q_len,
        .kv_len = p->kv_len,
        .head_dim = p->head_dim,
        .value_dim = p->value_dim,
        .lower = p->lower,
        .upper = p->upper,
        .drop_below = mfa_dropout_below(p->dropout),
        .block_map_q = p->block_map_q,
        .block_map_kv = p->block_map_kv,
        .varlen_q = p->varlen_q,
        .varlen_kv = p->varlen_kv,
        .has_seqused_k = p->seqused_k,
        .has_leftpad_k = p->leftpad_k,
        .has_cache_batch_idx = p->cache_batch_idx,
        .bottom_right = p->bottom_right,
        .total_q = p->total_q,
        .total_kv = p->total_kv,
        .kv_batch = p->kv_batch,
        .page_size = p->page_size,
        .k_group = p->k_group,
        .v_group = p->v_group,
#define INPUT(name, ...) .name = strides(&p->name##_layout),
#define RESULT(name, ...) .name = strides(&p->name##_layout),
#include "core/operands.inc"
        .scale = (float)p->scale,
        .softcap = (float)p->softcap,
        .keep_scale = (float)(1 / mfa_dropout_kept(p->dropout)),
    };
}
