#include "support/random.h"

#include <string.h>

#include "support/cases.h"

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))
#define MAX_MULTIPLICATIONS 2e7 /* the reference takes some 0.1 s for them */

int64_t random_between(struct generator *generator, int64_t low, int64_t high)
{
    return low + (int64_t)(generator_next(generator) % (uint64_t)(high - low + 1));
}

int64_t random_length(struct generator *generator, int64_t max)
{
    const int64_t kinds[] = {random_between(generator, 0, 3), random_between(generator, 1, 20),
                             random_between(generator, 20, 70), random_between(generator, 1, max)};
    return kinds[random_between(generator, 0, COUNT(kinds) - 1)];
}

void random_band(struct generator *generator, mfa_problem *problem)
{
    const int64_t q_len = problem->q_len, kv_len = problem->kv_len;
    if (random_between(generator, 0, 1))
        problem->lower = random_between(generator, -q_len, kv_len / 2 + 1);
    if (random_between(generator, 0, 3))
        problem->upper = random_between(generator, -q_len / 2, kv_len);
    if (!random_between(generator, 0, 7))
        problem->upper = problem->lower = random_between(generator, -q_len / 2, kv_len / 2);
}

/* Those that mfa_problem_init leaves to the caller. Inputs are dense; 1 stands for what is no broadcast. */
static void random_layouts(mfa_problem *p)
{
    const int64_t rows = p->block_map_q ? (p->q_len + p->block_map_q - 1) / p->block_map_q : 0;
    const int64_t columns = p->block_map_kv ? (p->kv_len + p->block_map_kv - 1) / p->block_map_kv : 0;
    const int64_t pages = p->page_size ? (p->kv_len + p->page_size - 1) / p->page_size : 0;
    p->block_map_layout = (mfa_layout){p->q_heads * rows * columns, rows * columns, columns, rows * columns > 0};
    p->block_table_layout = (mfa_layout){pages, 0, 0, pages > 0};
    p->k_scale_layout = p->v_scale_layout = (mfa_layout){1, 1, 1, 1};
}

/* A type for rows of so many columns. */
static int32_t random_type(struct generator *r, int64_t columns)
{
    const int32_t type = (int32_t)random_between(r, MFA_KV_SAME, MFA_KV_NF4);
    return type >= MFA_KV_INT4 && columns % 32 ? MFA_KV_INT8 : type;
}

static int64_t random_group(struct generator *r, int32_t type)
{
    static const int64_t groups[] = {0, 0, 32, 32, 64, 96, 5, 16};
    return type ? groups[random_between(r, 0, type < MFA_KV_INT4 ? 7 : 5)] : 0;
}

void random_types(struct generator *r, mfa_problem *p)
{
    p->k_type = random_type(r, p->head_dim);
    p->v_type = random_type(r, p->value_dim);
}

void random_groups(struct generator *r, mfa_problem *p)
{
    p->k_group = random_group(r, p->k_type);
    p->v_group = random_group(r, p->v_type);
}

void random_block_map(struct generator *generator, mfa_problem *problem)
{
    static const int64_t sizes[] = {16, 32, 48, 64, 64, 80, 128, 128, 208, 256};
    problem->block_map_q = sizes[random_between(generator, 0, COUNT(sizes) - 1)];
    problem->block_map_kv = sizes[random_between(generator, 0, COUNT(sizes) - 1)];
    random_layouts(problem);
}

void random_varlen(struct generator *r, mfa_problem *p)
{
    const int kind = (int)random_between(r, 0, 5); /* of K and V: three times dense, packed, by index, in pages */
    p->varlen_q = (int32_t)random_between(r, 0, 1);
    p->seqused_k = (int32_t)random_between(r, 0, 1);
    p->leftpad_k = !random_between(r, 0, 2);
    p->bottom_right = (int32_t)random_between(r, 0, 1);
    p->batch = random_between(r, 1, 5);
    if (p->varlen_q)
        p->total_q = random_between(r, 0, p->batch * p->q_len);
    if (kind == 3) {
        p->varlen_kv = 1;
        p->total_kv = random_between(r, 0, p->batch * p->kv_len);
    } else if (kind == 4) {
        p->cache_batch_idx = 1;
        p->kv_batch = random_between(r, 1, 6);
    } else if (kind == 5) {
        static const int64_t sizes[] = {1, 2, 7, 16, 16, 32, 64, 100, 256};
        p->page_size = sizes[random_between(r, 0, COUNT(sizes) - 1)];
        p->kv_batch = random_between(r, 1, 2 + p->batch * p->kv_len / p->page_size);
    }
}

void random_memory(struct generator *generator, const mfa_problem *problem, struct variant *variant,
                   enum arrangement *arrangement)
{
    memset(variant, 0, sizeof *variant);
    variant->dlse = (int)random_between(generator, 0, 1);
    if (problem->mask != MFA_MASK_NONE) {
        variant->mask_broadcast = (int)random_between(generator, 0, 15);
        variant->dbias_broadcast =
            random_between(generator, 0, 1) ? variant->mask_broadcast : (int)random_between(generator, 0, 15);
    }
    variant->kv_broadcast = random_between(generator, 0, 3) ? 0 : (int)random_between(generator, 1, 3);
    *arrangement = (enum arrangement)random_between(generator, 0, ARRANGEMENTS - 1);
}

/* Sizes; one problem in four is a decode step. */
static void draw_sizes(struct generator *r, mfa_problem *p)
{
    static const int64_t columns[] = {1, 2, 8, 16, 24, 32, 40, 64, 64, 80, 96, 111, 128, 136, 192, 256, 320, 512};
    static const int64_t groups[] = {1, 1, 2, 3, 4, 7};
    const int64_t head_dim =
        random_between(r, 0, 3) ? columns[random_between(r, 0, COUNT(columns) - 1)] : random_between(r, 1, 130);
    const int64_t value_dim = random_between(r, 0, 2) ? head_dim : columns[random_between(r, 0, COUNT(columns) - 1)];
    const int64_t kv_heads = random_between(r, 1, 3), group = groups[random_between(r, 0, COUNT(groups) - 1)];
    int64_t q_len = random_length(r, 300), kv_len = random_length(r, 900);
    if (!random_between(r, 0, 3))
        q_len = random_between(r, 1, 8), kv_len = random_between(r, 1, 3000);
    mfa_problem_init(p, random_between(r, 1, 2), kv_heads * group, kv_heads, q_len, kv_len, head_dim, value_dim);
    while (case_multiplications(p) > MAX_MULTIPLICATIONS) {
        int64_t *longer = q_len > kv_len ? &q_len : &kv_len;
        *longer /= 2;
        mfa_problem_init(p, p->batch, p->q_heads, p->kv_heads, q_len, kv_len, head_dim, value_dim);
    }
}

void random_problem_draw(struct random_problem *drawn, uint64_t seed, int n)
{
    static const int32_t dtypes[] = {MFA_F32, MFA_F16, MFA_BF16, MFA_F64};
    static const double scales[] = {0.05, 0.7, -0.3, 2, 4}, caps[] = {2, 20}, rates[] = {0.1, 0.5, 0.9, 1};
    mfa_problem *p = &drawn->problem;
    struct generator r;
    generator_seed(&r, seed + (uint64_t)n, "problem");
    draw_sizes(&r, p);
    p->dtype = dtypes[random_between(&r, 0, 3)];
    p->mask = (int32_t)random_between(&r, MFA_MASK_NONE, MFA_MASK_ADDITIVE);
    p->mask_dtype = dtypes[random_between(&r, 0, 3)];
    if (!random_between(&r, 0, 3))
        p->softcap = caps[random_between(&r, 0, COUNT(caps) - 1)];
    if (!random_between(&r, 0, 2))
        p->scale = scales[random_between(&r, 0, COUNT(scales) - 1)];
    if (random_between(&r, 0, 1))
        random_band(&r, p);
    random_memory(&r, p, &drawn->variant, &drawn->arrangement);
    p->alibi = !random_between(&r, 0, 4);
    p->sinks = !random_between(&r, 0, 4);
    if (!random_between(&r, 0, 3))
        p->dropout = rates[random_between(&r, 0, COUNT(rates) - 1)];
    if (!random_between(&r, 0, 2))
        random_block_map(&r, p);
    if (!random_between(&r, 0, 2))
        random_varlen(&r, p);
    if (!random_between(&r, 0, 3)) {
        random_types(&r, p);
        random_groups(&r, p);
    }
    if (p->block_map_q || p->page_size || p->k_type || p->v_type)
        random_layouts(p);
    drawn->variant.map_broadcast = (int)random_between(&r, 0, 11);
    drawn->variant.heads_broadcast = (int)random_between(&r, 0, 3);
    p->out_type = p->dtype != MFA_F64 && !random_between(&r, 0, 2) ? MFA_OUT_F32 : MFA_OUT_SAME;
    if (!random_between(&r, 0, 5)) {
        p->k_type = p->v_type = MFA_KV_INT8;
        p->k_group = p->v_group = 0;
        p->fast = MFA_FAST_INT8;
        random_layouts(p);
    }
}
