/* The layout, operand, dtype and extents of each tensor of a problem, and its elements as doubles. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "reference/attention.h"
#include "reference/element.h"

const mfa_layout *reference_layout(const mfa_problem *problem, enum reference_tensor tensor)
{
    const mfa_layout *layouts[REFERENCE_TENSORS] = {
        [REFERENCE_Q] = &problem->q_layout,           [REFERENCE_K] = &problem->k_layout,
        [REFERENCE_V] = &problem->v_layout,           [REFERENCE_MASK] = &problem->mask_layout,
        [REFERENCE_SLOPES] = &problem->slopes_layout, [REFERENCE_SINKS] = &problem->sinks_layout,
        [REFERENCE_DSINKS] = &problem->dsinks_layout, [REFERENCE_SEED] = &problem->seed_layout,
        [REFERENCE_dO] = &problem->d_o_layout,        [REFERENCE_dL] = &problem->dlse_layout,
        [REFERENCE_O] = &problem->o_layout,           [REFERENCE_L] = &problem->lse_layout,
        [REFERENCE_O_LOW] = &problem->o_layout,       [REFERENCE_dQ] = &problem->dq_layout,
        [REFERENCE_dK] = &problem->dk_layout,         [REFERENCE_dV] = &problem->dv_layout,
        [REFERENCE_DBIAS] = &problem->dbias_layout,   [REFERENCE_BLOCK_MAP] = &problem->block_map_layout};
    return layouts[tensor];
}

const mfa_buffer *reference_buffer(const mfa_buffers *buffers, enum reference_tensor tensor)
{
    const mfa_buffer *operands[REFERENCE_TENSORS] = {
        [REFERENCE_Q] = &buffers->q,           [REFERENCE_K] = &buffers->k,
        [REFERENCE_V] = &buffers->v,           [REFERENCE_MASK] = &buffers->mask,
        [REFERENCE_SLOPES] = &buffers->slopes, [REFERENCE_SINKS] = &buffers->sinks,
        [REFERENCE_DSINKS] = &buffers->dsinks, [REFERENCE_SEED] = &buffers->seed,
        [REFERENCE_dO] = &buffers->d_o,        [REFERENCE_dL] = &buffers->dlse,
        [REFERENCE_O] = &buffers->o,           [REFERENCE_L] = &buffers->lse,
        [REFERENCE_dQ] = &buffers->dq,         [REFERENCE_dK] = &buffers->dk,
        [REFERENCE_dV] = &buffers->dv,         [REFERENCE_DBIAS] = &buffers->dbias,
        [REFERENCE_O_LOW] = &buffers->o_low,   [REFERENCE_BLOCK_MAP] = &buffers->block_map};
    return operands[tensor];
}

int32_t reference_dtype(const mfa_problem *problem, enum reference_tensor tensor)
{
    switch (tensor) {
    case REFERENCE_MASK: return problem->mask == MFA_MASK_BOOL ? ELEMENT_BOOL : problem->mask_dtype;
    case REFERENCE_BLOCK_MAP: return ELEMENT_BOOL;
    case REFERENCE_DBIAS: return problem->mask_dtype;
    case REFERENCE_SLOPES:
    case REFERENCE_SINKS:
    case REFERENCE_DSINKS: return MFA_F32;
    case REFERENCE_SEED: return ELEMENT_U64;
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

void reference_shape(const mfa_problem *problem, enum reference_tensor tensor, int64_t shape[4])
{
    const mfa_problem *p = problem;
    int of_keys = tensor == REFERENCE_K || tensor == REFERENCE_V || tensor == REFERENCE_dK || tensor == REFERENCE_dV;
    shape[0] = p->batch;
    shape[1] = tensor == REFERENCE_SEED ? 1 : of_keys ? p->kv_heads : p->q_heads;
    int has_rows = tensor != REFERENCE_SLOPES && tensor != REFERENCE_SINKS && tensor != REFERENCE_DSINKS &&
                   tensor != REFERENCE_SEED;
    shape[2] = !has_rows ? 1 : of_keys ? p->kv_len : p->q_len;
    if (tensor == REFERENCE_BLOCK_MAP)
        shape[2] = blocks(p->q_len, p->block_map_q);
    switch (tensor) {
    case REFERENCE_Q:
    case REFERENCE_K:
    case REFERENCE_dQ:
    case REFERENCE_dK: shape[3] = p->head_dim; break;
    case REFERENCE_MASK:
    case REFERENCE_DBIAS: shape[3] = p->kv_len; break;
    case REFERENCE_BLOCK_MAP: shape[3] = blocks(p->kv_len, p->block_map_kv); break;
    case REFERENCE_L:
    case REFERENCE_dL:
    case REFERENCE_SLOPES:
    case REFERENCE_SINKS:
    case REFERENCE_DSINKS:
    case REFERENCE_SEED: shape[3] = 1; break;
    default: shape[3] = p->value_dim; break;
    }
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

struct reference_view reference_load(const mfa_problem *problem, enum reference_tensor tensor,
                                     const mfa_buffers *buffers)
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

void reference_gather(struct reference_view view, int64_t b, int64_t h, int64_t rows, int64_t columns, double *out)
{
    const double *from = view.values + b * view.batch + h * view.head;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            out[r * columns + c] = from[r * view.row + c * view.column];
}

void reference_gather_transposed(struct reference_view view, int64_t b, int64_t h, int64_t rows, int64_t columns,
                                 double *out)
{
    const double *from = view.values + b * view.batch + h * view.head;
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++)
            out[c * rows + r] = from[r * view.row + c * view.column];
}

int reference_is_mapped(const mfa_problem *problem, const struct reference_view *map, int64_t b, int64_t h, int64_t i,
                        int64_t j)
{
    if (!problem->block_map_q)
        return 1;
    return map->values[b * map->batch + h * map->head + i / problem->block_map_q * map->row +
                       j / problem->block_map_kv * map->column] != 0;
}

double reference_alibi(const mfa_problem *problem, double slope, int64_t i, int64_t j)
{
    return -slope * fabs((double)(i + problem->kv_len - problem->q_len - j));
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

void reference_band(const mfa_problem *problem, int64_t i, int64_t *first, int64_t *end)
{
    /* lower and upper may be any int64_t: they are clamped to the keys first, so that no sum overflows. */
    int64_t kv = problem->kv_len, lower = problem->lower, upper = problem->upper;
    *first = lower <= -i ? 0 : lower >= kv - i ? kv : i + lower;
    *end = upper < -i ? 0 : upper >= kv - 1 - i ? kv : i + upper + 1;
    if (*end < *first)
        *end = *first;
}
