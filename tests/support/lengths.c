#include "support/lengths.h"

#include <math.h>
#include <stdlib.h>

static int64_t draw(struct generator *generator, int64_t most)
{
    return (int64_t)(generator_next(generator) % (uint64_t)(most + 1));
}

/* Sequences without rows, as long as can be and of any length; now and then rows before the first, few or many. */
static void draw_cu_seqlens(struct generator *generator, int64_t batch, int64_t total, int64_t longest, double *values)
{
    const int64_t few = total < 5 ? total : 5, start = draw(generator, 7);
    int64_t at = start > 1 ? 0 : draw(generator, start ? few : total);
    values[0] = (double)at;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t rest = total - at, most = rest < longest ? rest : longest, kind = draw(generator, 5);
        at += kind == 0 ? 0 : kind <= 2 ? most : draw(generator, most);
        values[b + 1] = (double)at;
    }
}

/* Keys that a batch entry has, and those of them that count, before the padding is taken off. */
static int64_t available(const struct inputs *inputs, int64_t b)
{
    const double *cu_seqlens = inputs->values[REFERENCE_CU_SEQLENS_K];
    return cu_seqlens ? (int64_t)(cu_seqlens[b + 1] - cu_seqlens[b]) : inputs->problem.kv_len;
}

static int64_t used(const struct inputs *inputs, int64_t b)
{
    const double *seqused = inputs->values[REFERENCE_SEQUSED_K];
    return seqused ? (int64_t)seqused[b] : available(inputs, b);
}

static void draw_block_table(struct generator *generator, const struct inputs *inputs, double *values)
{
    const mfa_problem *p = &inputs->problem;
    const int64_t columns = (p->kv_len + p->page_size - 1) / p->page_size;
    const double *padding = inputs->values[REFERENCE_LEFTPAD_K];
    for (int64_t b = 0; b < p->batch; b++) {
        const int64_t first = padding ? (int64_t)padding[b] : 0, end = used(inputs, b);
        for (int64_t n = 0; n < columns; n++) {
            const int needed = n * p->page_size < end && (n + 1) * p->page_size > first && first < end;
            const int64_t wrong = draw(generator, 1) ? -1 - draw(generator, 100) : p->kv_batch + draw(generator, 100);
            values[b * columns + n] = (double)(needed ? draw(generator, p->kv_batch - 1) : wrong);
        }
    }
}

void lengths_fill(struct inputs *inputs, enum reference_tensor tensor, struct generator *generator)
{
    const mfa_problem *p = &inputs->problem;
    double *values = inputs->values[tensor];
    if (tensor == REFERENCE_CU_SEQLENS_Q)
        draw_cu_seqlens(generator, p->batch, p->total_q, p->q_len, values);
    if (tensor == REFERENCE_CU_SEQLENS_K)
        draw_cu_seqlens(generator, p->batch, p->total_kv, p->kv_len, values);
    if (tensor == REFERENCE_BLOCK_TABLE)
        draw_block_table(generator, inputs, values);
    for (int64_t b = 0; b < p->batch; b++) {
        if (tensor == REFERENCE_SEQUSED_K)
            values[b] = (double)(draw(generator, 2) ? draw(generator, available(inputs, b)) : available(inputs, b));
        if (tensor == REFERENCE_LEFTPAD_K)
            values[b] = (double)(draw(generator, 2) ? 0 : draw(generator, used(inputs, b)));
        if (tensor == REFERENCE_CACHE_BATCH_IDX)
            values[b] = (double)draw(generator, p->kv_batch - 1);
    }
}

/* The tensors of integers as they lie in memory. */
static int32_t *open_integers(const struct inputs *inputs, enum reference_tensor tensor, mfa_buffers *buffers)
{
    const int64_t count = reference_count(&inputs->problem, tensor);
    int32_t *integers = malloc((size_t)(count + 1) * sizeof *integers);
    for (int64_t n = 0; n < count && integers && inputs->values[tensor]; n++)
        integers[n] = (int32_t)inputs->values[tensor][n];
    *(mfa_buffer *)reference_buffer(buffers, tensor) = (mfa_buffer){integers, 0};
    return integers;
}

/* NaN in the rows of a tensor that are not among those marked; rows are counted through all entries and heads. */
static void poison(struct inputs *inputs, enum reference_tensor tensor, const double *marked)
{
    double *values = inputs->values[tensor];
    int64_t shape[4];
    reference_shape(&inputs->problem, tensor, shape);
    for (int64_t row = 0; values && row < shape[0] * shape[1] * shape[2]; row++)
        for (int64_t c = 0; c < shape[3] && marked[row] == 0; c++)
            values[row * shape[3] + c] = NAN;
}

void lengths_poison(struct inputs *inputs)
{
    const mfa_problem *p = &inputs->problem;
    const int64_t q_rows = reference_count(p, REFERENCE_L);
    mfa_buffers buffers = {.size = sizeof buffers};
    int32_t *integers[REFERENCE_TENSORS] = {NULL};
    int64_t shape[4];
    reference_shape(p, REFERENCE_K, shape);
    double *of_queries = reference_allocate(q_rows), *of_keys = reference_allocate(shape[0] * shape[1] * shape[2]);
    const struct reference_view view = {of_keys, shape[1] * shape[2], shape[2], 1, 0};
    for (int tensor = REFERENCE_CU_SEQLENS_Q; tensor <= REFERENCE_BLOCK_TABLE; tensor++)
        integers[tensor] = open_integers(inputs, tensor, &buffers);
    for (int64_t b = 0; b < p->batch; b++) {
        const struct reference_sequence seq = reference_sequence(p, &buffers, b);
        for (int64_t h = 0; h < p->q_heads; h++)
            for (int64_t i = 0; i < seq.q_len; i++)
                of_queries[reference_query_index(p, &seq, h, i)] = 1;
        for (int64_t h = 0; h < p->kv_heads && !inputs->variant.kv_broadcast; h++)
            for (int64_t j = 0; j < seq.kv_len; j++)
                *(double *)reference_key(&seq, view, h, j) = 1;
    }
    poison(inputs, REFERENCE_Q, of_queries);
    poison(inputs, REFERENCE_dO, of_queries);
    if (!inputs->variant.kv_broadcast) {
        poison(inputs, p->k_type ? REFERENCE_K_SCALE : REFERENCE_K, of_keys);
        poison(inputs, p->v_type ? REFERENCE_V_SCALE : REFERENCE_V, of_keys);
    }
    for (int tensor = REFERENCE_CU_SEQLENS_Q; tensor <= REFERENCE_BLOCK_TABLE; tensor++)
        free(integers[tensor]);
    free(of_queries);
    free(of_keys);
}
