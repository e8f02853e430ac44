/* The layout, operand, dtype and extents of each tensor of a problem, and its elements as doubles. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reference/attention.h"
#include "reference/element.h"

const mfa_layout *reference_layout(const mfa_problem *problem, enum reference_tensor tensor)
{
    const mfa_layout *layouts[REFERENCE_TENSORS] = {[REFERENCE_Q] = &problem->q_layout,
                                                    [REFERENCE_K] = &problem->k_layout,
                                                    [REFERENCE_V] = &problem->v_layout,
                                                    [REFERENCE_MASK] = &problem->mask_layout,
                                                    [REFERENCE_SLOPES] = &problem->slopes_layout,
                                                    [REFERENCE_SINKS] = &problem->sinks_layout,
                                                    [REFERENCE_DSINKS] = &problem->dsinks_layout,
                                                    [REFERENCE_SEED] = &problem->seed_layout,
                                                    [REFERENCE_dO] = &problem->d_o_layout,
                                                    [REFERENCE_dL] = &problem->dlse_layout,
                                                    [REFERENCE_O] = &problem->o_layout,
                                                    [REFERENCE_L] = &problem->lse_layout,
                                                    [REFERENCE_O_LOW] = &problem->o_layout,
                                                    [REFERENCE_dQ] = &problem->dq_layout,
                                                    [REFERENCE_dK] = &problem->dk_layout,
                                                    [REFERENCE_dV] = &problem->dv_layout,
                                                    [REFERENCE_DBIAS] = &problem->dbias_layout,
                                                    [REFERENCE_BLOCK_MAP] = &problem->block_map_layout,
                                                    [REFERENCE_CU_SEQLENS_Q] = &problem->cu_seqlens_q_layout,
                                                    [REFERENCE_CU_SEQLENS_K] = &problem->cu_seqlens_k_layout,
                                                    [REFERENCE_SEQUSED_K] = &problem->seqused_k_layout,
                                                    [REFERENCE_LEFTPAD_K] = &problem->leftpad_k_layout,
                                                    [REFERENCE_CACHE_BATCH_IDX] = &problem->cache_batch_idx_layout,
                                                    [REFERENCE_BLOCK_TABLE] = &problem->block_table_layout,
                                                    [REFERENCE_K_SCALE] = &problem->k_scale_layout,
                                                    [REFERENCE_V_SCALE] = &problem->v_scale_layout};
    return layouts[tensor];
}

const mfa_buffer *reference_buffer(const mfa_buffers *buffers, enum reference_tensor tensor)
{
    const mfa_buffer *operands[REFERENCE_TENSORS] = {[REFERENCE_Q] = &buffers->q,
                                                     [REFERENCE_K] = &buffers->k,
                                                     [REFERENCE_V] = &buffers->v,
                                                     [REFERENCE_MASK] = &buffers->mask,
                                                     [REFERENCE_SLOPES] = &buffers->slopes,
                                                     [REFERENCE_SINKS] = &buffers->sinks,
                                                     [REFERENCE_DSINKS] = &buffers->dsinks,
                                                     [REFERENCE_SEED] = &buffers->seed,
                                                     [REFERENCE_dO] = &buffers->d_o,
                                                     [REFERENCE_dL] = &buffers->dlse,
                                                     [REFERENCE_O] = &buffers->o,
                                                     [REFERENCE_L] = &buffers->lse,
                                                     [REFERENCE_dQ] = &buffers->dq,
                                                     [REFERENCE_dK] = &buffers->dk,
                                                     [REFERENCE_dV] = &buffers->dv,
                                                     [REFERENCE_DBIAS] = &buffers->dbias,
                                                     [REFERENCE_O_LOW] = &buffers->o_low,
                                                     [REFERENCE_BLOCK_MAP] = &buffers->block_map,
                                                     [REFERENCE_CU_SEQLENS_Q] = &buffers->cu_seqlens_q,
                                                     [REFERENCE_CU_SEQLENS_K] = &buffers->cu_seqlens_k,
                                                     [REFERENCE_SEQUSED_K] = &buffers->seqused_k,
                                                     [REFERENCE_LEFTPAD_K] = &buffers->leftpad_k,
                                                     [REFERENCE_CACHE_BATCH_IDX] = &buffers->cache_batch_idx,
                                                     [REFERENCE_BLOCK_TABLE] = &buffers->block_table,
                                                     [REFERENCE_K_SCALE] = &buffers->k_scale,
                                                     [REFERENCE_V_SCALE] = &buffers->v_scale};
    return operands[tensor];
}

int32_t reference_dtype(const mfa_problem *problem, enum reference_tensor tensor)
{
    switch (tensor) {
    case REFERENCE_MASK: return problem->mask == MFA_MASK_BOOL ? ELEMENT_BOOL : problem->mask_dtype;
    case REFERENCE_BLOCK_MAP: return ELEMENT_BOOL;
    case REFERENCE_DBIAS: return problem->mask_dtype;
    case REFERENCE_K: return problem->k_type ? ELEMENT_CODE : problem->dtype;
    case REFERENCE_V: return problem->v_type ? ELEMENT_CODE : problem->dtype;
    case REFERENCE_K_SCALE:
    case REFERENCE_V_SCALE:
    case REFERENCE_SLOPES:
    case REFERENCE_SINKS:
    case REFERENCE_DSINKS: return MFA_F32;
    case REFERENCE_SEED: return ELEMENT_U64;
    case REFERENCE_CU_SEQLENS_Q:
    case REFERENCE_CU_SEQLENS_K:
    case REFERENCE_SEQUSED_K:
    case REFERENCE_LEFTPAD_K:
    case REFERENCE_CACHE_BATCH_IDX:
    case REFERENCE_BLOCK_TABLE: return ELEMENT_I32;
    case REFERENCE_O:
    case REFERENCE_dQ:
    case REFERENCE_dK:
    case REFERENCE_dV: return problem->out_type == MFA_OUT_F32 ? MFA_F32 : problem->dtype;
    case REFERENCE_L:
    case REFERENCE_dL: return problem->dtype == MFA_F64 ? MFA_F64 : MFA_F32;
    default: return problem->dtype;
    }
}

/* Blocks of `size` among n rows; none without a size. */
static int64_t blocks(int64_t n, int64_t size)
{
    return size > 0 ? n / size + (n % size > 0) : 0;
}

/* Elements of a row of K or V: of 4 bits, two in one. */
static int64_t columns(int32_t type, int64_t dim)
{
    return type == MFA_KV_INT4 || type == MFA_KV_NF4 ? dim / 2 : dim;
}

/* Extents of a tensor that no layout has changed. Loops call this, so only those of this tensor are computed. */
static void full_shape(const mfa_problem *p, enum reference_tensor tensor, int64_t shape[4])
{
    const int64_t q_batch = p->varlen_q ? 1 : p->batch, q_rows = p->varlen_q ? p->total_q : p->q_len;
    const int64_t kv_batch = p->varlen_kv ? 1 : p->cache_batch_idx || p->page_size ? p->kv_batch : p->batch;
    const int64_t kv_rows = p->varlen_kv ? p->total_kv : p->page_size ? p->page_size : p->kv_len;
#define SHAPE(entries, heads, rows, columns)                                   \
    shape[0] = entries, shape[1] = heads, shape[2] = rows, shape[3] = columns; \
    return
    switch (tensor) {
    case REFERENCE_Q:
    case REFERENCE_dQ: SHAPE(q_batch, p->q_heads, q_rows, p->head_dim);
    case REFERENCE_O:
    case REFERENCE_O_LOW:
    case REFERENCE_dO: SHAPE(q_batch, p->q_heads, q_rows, p->value_dim);
    case REFERENCE_L:
    case REFERENCE_dL: SHAPE(q_batch, p->q_heads, q_rows, 1);
    case REFERENCE_K: SHAPE(kv_batch, p->kv_heads, kv_rows, columns(p->k_type, p->head_dim));
    case REFERENCE_V: SHAPE(kv_batch, p->kv_heads, kv_rows, columns(p->v_type, p->value_dim));
    case REFERENCE_dK: SHAPE(kv_batch, p->kv_heads, kv_rows, p->head_dim);
    case REFERENCE_dV: SHAPE(kv_batch, p->kv_heads, kv_rows, p->value_dim);
    case REFERENCE_K_SCALE: SHAPE(kv_batch, p->kv_heads, kv_rows, p->k_group ? blocks(p->head_dim, p->k_group) : 1);
    case REFERENCE_V_SCALE: SHAPE(kv_batch, p->kv_heads, kv_rows, p->v_group ? blocks(p->value_dim, p->v_group) : 1);
    case REFERENCE_MASK:
    case REFERENCE_DBIAS: SHAPE(p->batch, p->q_heads, p->q_len, p->kv_len);
    case REFERENCE_SLOPES:
    case REFERENCE_SINKS:
    case REFERENCE_DSINKS: SHAPE(p->batch, p->q_heads, 1, 1);
    case REFERENCE_BLOCK_MAP:
        SHAPE(p->batch, p->q_heads, blocks(p->q_len, p->block_map_q), blocks(p->kv_len, p->block_map_kv));
    case REFERENCE_CU_SEQLENS_Q:
    case REFERENCE_CU_SEQLENS_K: SHAPE(p->batch + 1, 1, 1, 1);
    case REFERENCE_BLOCK_TABLE: SHAPE(p->batch, 1, 1, blocks(p->kv_len, p->page_size));
    case REFERENCE_SEED:
    case REFERENCE_SEQUSED_K:
    case REFERENCE_LEFTPAD_K:
    case REFERENCE_CACHE_BATCH_IDX: SHAPE(p->batch, 1, 1, 1);
    case REFERENCE_TENSORS: SHAPE(0, 0, 0, 0);
    }
#undef SHAPE
}

void reference_shape(const mfa_problem *problem, enum reference_tensor tensor, int64_t shape[4])
{
    full_shape(problem, tensor, shape);
    const mfa_layout *layout = reference_layout(problem, tensor);
    const int64_t strides[4] = {layout->batch, layout->head, layout->row, layout->column};
    for (int dimension = 0; dimension < 4; dimension++)
        if (strides[dimension] == 0 && shape[dimension] > 1)
            shape[dimension] = 1;
}

int64_t reference_count(const mfa_problem *problem, enum reference_tensor tensor)
{
    int64_t shape[4];
    reference_shape(problem, tensor, shape);
    return shape[0] * shape[1] * shape[2] * shape[3];
}

double *reference_allocate(int64_t count)
{
    double *doubles = calloc(count ? (size_t)count : 1, sizeof *doubles);
    if (!doubles) {
        fprintf(stderr, "no memory for %lld doubles\n", (long long)count);
        exit(2);
    }
    return doubles;
}

struct reference_view reference_view(const mfa_problem *problem, enum reference_tensor tensor, double *values)
{
    int64_t n[4];
    reference_shape(problem, tensor, n);
    struct reference_view view = {values, n[0] > 1 ? n[1] * n[2] * n[3] : 0, n[1] > 1 ? n[2] * n[3] : 0,
                                  n[2] > 1 ? n[3] : 0, n[3] > 1 ? 1 : 0};
    return view;
}

/* A tensor as it lies, dense. */
static struct reference_view load(const mfa_problem *problem, enum reference_tensor tensor, const mfa_buffers *buffers)
{
    int64_t n[4], at = 0;
    reference_shape(problem, tensor, n);
    double *dense = reference_allocate(reference_count(problem, tensor));
    const mfa_layout *s = reference_layout(problem, tensor);
    const mfa_buffer *buffer = reference_buffer(buffers, tensor);
    const char *elements = (const char *)buffer->base + buffer->offset;
    int32_t dtype = reference_dtype(problem, tensor);
    for (int64_t b = 0; b < n[0]; b++)
        for (int64_t h = 0; h < n[1]; h++)
            for (int64_t r = 0; r < n[2]; r++, at += n[3])
                element_load_row(dtype, elements, b * s->batch + h * s->head + r * s->row, s->column, n[3], dense + at);
    return reference_view(problem, tensor, dense);
}

/* The code of column c in a row of K or V. */
static uint8_t code_of(int32_t type, const double *row, int64_t c)
{
    if (columns(type, 2) == 2)
        return (uint8_t)row[c];
    const uint8_t both = (uint8_t)row[c / 32 * 16 + c % 16];
    return c % 32 < 16 ? both & 15 : both >> 4;
}

/* K or V in codes as numbers. */
static struct reference_view load_codes(const mfa_problem *p, enum reference_tensor tensor, const mfa_buffers *buffers)
{
    const int is_k = tensor == REFERENCE_K;
    const int32_t type = is_k ? p->k_type : p->v_type;
    const int64_t dim = is_k ? p->head_dim : p->value_dim, given = is_k ? p->k_group : p->v_group;
    const enum reference_tensor of_scales = is_k ? REFERENCE_K_SCALE : REFERENCE_V_SCALE;
    const struct reference_view codes = load(p, tensor, buffers);
    struct reference_view scales = {NULL, 0, 0, 0, 0};
    if (reference_buffer(buffers, of_scales)->base)
        scales = load(p, of_scales, buffers);
    int64_t n[4];
    reference_shape(p, tensor, n);
    double *numbers = reference_allocate(n[0] * n[1] * n[2] * dim);
    for (int64_t row = 0; row < n[0] * n[1] * n[2]; row++)
        for (int64_t c = 0; c < dim; c++) {
            const int64_t b = row / n[2] / n[1], h = row / n[2] % n[1], r = row % n[2], g = given ? c / given : 0;
            const double scale =
                scales.values ? scales.values[b * scales.batch + h * scales.head + r * scales.row + g * scales.column]
                              : 1;
            numbers[row * dim + c] = reference_code(type, code_of(type, codes.values + row * n[3], c)) * scale;
        }
    free(codes.values);
    free(scales.values);
    return (struct reference_view){numbers, n[0] > 1 ? n[1] * n[2] * dim : 0, n[1] > 1 ? n[2] * dim : 0,
                                   n[2] > 1 ? dim : 0, dim > 1 ? 1 : 0};
}

struct reference_view reference_load(const mfa_problem *problem, enum reference_tensor tensor,
                                     const mfa_buffers *buffers)
{
    if ((tensor == REFERENCE_K && problem->k_type) || (tensor == REFERENCE_V && problem->v_type))
        return load_codes(problem, tensor, buffers);
    return load(problem, tensor, buffers);
}

int reference_is_mapped(const mfa_problem *problem, const struct reference_view *map, int64_t b, int64_t h, int64_t i,
                        int64_t j)
{
    if (!problem->block_map_q)
        return 1;
    return map->values[b * map->batch + h * map->head + i / problem->block_map_q * map->row +
                       j / problem->block_map_kv * map->column] != 0;
}

/* As its authors state it, for any machine: no code is shared with the library. */
void reference_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4])
{
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
    for (int round = 0; round < 10; round++) {
        const uint64_t first = UINT64_C(0xD2511F53) * c[0], second = UINT64_C(0xCD9E8D57) * c[2];
        const uint32_t next[4] = {(uint32_t)(second >> 32) ^ c[1] ^ k[0], (uint32_t)second,
                                  (uint32_t)(first >> 32) ^ c[3] ^ k[1], (uint32_t)first};
        memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
    }
    memcpy(words, c, sizeof c);
}

void reference_dropout(const mfa_problem *problem, uint64_t seed, int64_t b, int64_t h, int64_t i, int64_t first,
                       int64_t end, double *Z)
{
    const double p = problem->dropout, rounded = floor(p * 65536 + 0.5);
    const double below = p < 1 && rounded > 65535 ? 65535 : rounded;
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t words[4] = {0};
    for (int64_t j = first; j < end; j++) {
        if (p > 0 && (j == first || j % 8 == 0)) {
            const uint32_t counter[4] = {(uint32_t)(j / 8), (uint32_t)i, (uint32_t)h, (uint32_t)b};
            reference_philox(counter, key, words);
        }
        const uint32_t half = j % 2 ? words[j % 8 / 2] >> 16 : words[j % 8 / 2] & 0xffff;
        Z[j] = p == 0 ? 1 : half < below ? 0 : 1 / (1 - p);
    }
}
