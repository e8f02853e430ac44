/* Batch entries: their lengths, where their rows lie, and what depends on both. */
#include <math.h>

#include "reference/attention.h"

static int64_t integer(const mfa_buffer *buffer, const mfa_layout *layout, int64_t n)
{
    return ((const int32_t *)(const void *)((const char *)buffer->base + buffer->offset))[n * layout->batch];
}

struct reference_sequence reference_sequence(const mfa_problem *problem, const mfa_buffers *buffers, int64_t b)
{
    const mfa_problem *p = problem;
    struct reference_sequence seq = {.batch = b,
                                     .q_len = p->q_len,
                                     .kv_len = p->kv_len,
                                     .lower = p->lower,
                                     .upper = p->upper,
                                     .q_batch = b,
                                     .kv_batch = b};
    if (p->varlen_q) {
        seq.q_batch = 0;
        seq.q_row = integer(&buffers->cu_seqlens_q, &p->cu_seqlens_q_layout, b);
        seq.q_len = integer(&buffers->cu_seqlens_q, &p->cu_seqlens_q_layout, b + 1) - seq.q_row;
    }
    if (p->varlen_kv) {
        seq.kv_batch = 0;
        seq.kv_row = integer(&buffers->cu_seqlens_k, &p->cu_seqlens_k_layout, b);
        seq.kv_len = integer(&buffers->cu_seqlens_k, &p->cu_seqlens_k_layout, b + 1) - seq.kv_row;
    }
    if (p->seqused_k)
        seq.kv_len = integer(&buffers->seqused_k, &p->seqused_k_layout, b);
    if (p->leftpad_k) {
        const int64_t padding = integer(&buffers->leftpad_k, &p->leftpad_k_layout, b);
        seq.kv_row += padding, seq.kv_len -= padding;
    }
    if (p->cache_batch_idx)
        seq.kv_batch = integer(&buffers->cache_batch_idx, &p->cache_batch_idx_layout, b);
    if (p->page_size) {
        const mfa_buffer *table = &buffers->block_table;
        seq.table = (const int32_t *)(const void *)((const char *)table->base + table->offset);
        seq.table += b * p->block_table_layout.batch;
        seq.table_stride = p->block_table_layout.column, seq.page_size = p->page_size;
    }
    if (p->bottom_right && p->lower != MFA_BAND_OPEN_LOWER)
        seq.lower += seq.kv_len - seq.q_len;
    if (p->bottom_right && p->upper != MFA_BAND_OPEN_UPPER)
        seq.upper += seq.kv_len - seq.q_len;
    return seq;
}

/* The entry, or page, and the row of key j. */
static void locate_key(const struct reference_sequence *seq, int64_t j, int64_t *batch, int64_t *row)
{
    *batch = seq->kv_batch, *row = seq->kv_row + j;
    if (seq->table) {
        *batch = seq->table[*row / seq->page_size * seq->table_stride];
        *row %= seq->page_size;
    }
}

const double *reference_query(const struct reference_sequence *seq, struct reference_view view, int64_t h, int64_t i)
{
    return view.values + seq->q_batch * view.batch + h * view.head + (seq->q_row + i) * view.row;
}

const double *reference_key(const struct reference_sequence *seq, struct reference_view view, int64_t h, int64_t j)
{
    int64_t batch, row;
    locate_key(seq, j, &batch, &row);
    return view.values + batch * view.batch + h * view.head + row * view.row;
}

int64_t reference_query_index(const mfa_problem *problem, const struct reference_sequence *seq, int64_t h, int64_t i)
{
    const int64_t rows = problem->varlen_q ? problem->total_q : problem->q_len;
    return (seq->q_batch * problem->q_heads + h) * rows + seq->q_row + i;
}

int64_t reference_key_index(const mfa_problem *problem, const struct reference_sequence *seq, int64_t h, int64_t j)
{
    const int64_t rows = problem->varlen_kv ? problem->total_kv : problem->kv_len;
    return (seq->kv_batch * problem->kv_heads + h) * rows + seq->kv_row + j;
}

void reference_clear(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results)
{
    const struct {
        double *values;
        enum reference_tensor tensor;
    } all[] = {{results->O, REFERENCE_O},          {results->L, REFERENCE_L},   {results->dQ, REFERENCE_dQ},
               {results->dK, REFERENCE_dK},        {results->dV, REFERENCE_dV}, {results->dbias, REFERENCE_DBIAS},
               {results->dsinks, REFERENCE_DSINKS}};
    const int64_t rows = problem->varlen_q ? problem->total_q : problem->q_len;
    const mfa_layout *s = &problem->sinks_layout;
    const float *sinks = (const float *)(const void *)((const char *)buffers->sinks.base + buffers->sinks.offset);
    for (size_t n = 0; n < sizeof all / sizeof *all; n++)
        for (int64_t at = 0; all[n].values && at < reference_count(problem, all[n].tensor); at++)
            all[n].values[at] = all[n].tensor != REFERENCE_L ? 0
                                : problem->sinks             ? (double)sinks[at / rows % problem->q_heads * s->head]
                                                             : -INFINITY;
}

double reference_alibi(const struct reference_sequence *seq, double slope, int64_t i, int64_t j)
{
    return -slope * fabs((double)(i + seq->kv_len - seq->q_len - j));
}

void reference_band(const struct reference_sequence *seq, int64_t i, int64_t *first, int64_t *end)
{
    /* lower and upper may be any int64_t: they are clamped to the keys first, so that no sum overflows. */
    int64_t kv = seq->kv_len, lower = seq->lower, upper = seq->upper;
    *first = lower <= -i ? 0 : lower >= kv - i ? kv : i + lower;
    *end = upper < -i ? 0 : upper >= kv - 1 - i ? kv : i + upper + 1;
    if (*end < *first)
        *end = *first;
}
