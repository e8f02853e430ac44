#include "cpu/sequences.h"

#include <math.h>

#include "base/error.h"
#include "cpu/tiles.h"

#define TASKS_PER_WORKER 4 /* backward: heads with more of the work than such a task are divided */

static int is_varlen(const struct mfa_cpu_call *call)
{
    return (call->features & CPU_VARLEN) != 0;
}

/* --- Reading ---------------------------------------------------------------------------------- */

/* Element n of a tensor of 32-bit integers along its batch. */
static int64_t integer(const void *data, const struct mfa_strides *s, int64_t n)
{
    return ((const int32_t *)data)[n * s->batch];
}

/* Rows of packed tensors. */
struct rows {
    int64_t first, count;
};

/* Those of a batch entry, from `first` on. Each number is read once, so that rows never overlap. */
static mfa_status read_rows(const char *name, const void *data, const struct mfa_strides *s, int64_t batch,
                            int64_t total, int64_t most, long long first, struct rows *rows)
{
    const char side = name[sizeof "cu_seqlens_" - 1];
    const long long end = integer(data, s, batch + 1), n = batch;
    if (first < 0 || end > total)
        return mfa_fail(MFA_INVALID,
                        "%s[%lld] is %lld and %s[%lld] is %lld; they must be within the %lld rows of total_%s", name, n,
                        first, name, n + 1, end, (long long)total, side == 'q' ? "q" : "kv");
    if (end < first)
        return mfa_fail(MFA_INVALID, "%s[%lld] is %lld and %s[%lld] is %lld; they must not fall", name, n, first, name,
                        n + 1, end);
    if (end - first > most)
        return mfa_fail(MFA_INVALID, "%s[%lld] is %lld and %s[%lld] is %lld; that is more than %s, %lld", name, n,
                        first, name, n + 1, end, side == 'q' ? "q_len" : "kv_len", (long long)most);
    *rows = (struct rows){first, end - first};
    return MFA_OK;
}

/* A number that a batch entry has in an optional tensor, `otherwise` without one. */
static mfa_status read_number(const char *name, const void *data, const struct mfa_strides *s, int64_t batch,
                              int64_t most, const char *of, int64_t *number)
{
    *number = integer(data, s, batch);
    if (*number >= 0 && *number <= most)
        return MFA_OK;
    return mfa_fail(MFA_INVALID, "%s[%lld] is %lld; it must be 0 to %lld, %s", name, (long long)batch,
                    (long long)*number, (long long)most, of);
}

static mfa_status check_pages(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq)
{
    const struct mfa_args *a = &call->args;
    const int64_t end = seq->kv_len > 0 ? (seq->kv_row + seq->kv_len - 1) / a->page_size + 1 : 0;
    for (int64_t n = seq->kv_row / a->page_size; n < end; n++) {
        const int32_t page =
            ((const int32_t *)call->block_table)[seq->batch * a->block_table.batch + n * a->block_table.column];
        if (page < 0 || page >= a->kv_batch)
            return mfa_fail(MFA_INVALID, "block_table[%lld][%lld] is %d; there are %lld pages, from 0 on",
                            (long long)seq->batch, (long long)n, page, (long long)a->kv_batch);
    }
    return MFA_OK;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* Where packed rows of the next batch entry begin. */
struct packed_rows {
    int64_t q, kv;
};

/* The sequence of a batch entry. `all`: the rows of keys that it has, used or not. */
static mfa_status read_sequence(const struct mfa_cpu_call *call, int64_t batch, struct packed_rows *next,
                                struct mfa_cpu_sequence *seq, struct rows *all)
{
    const struct mfa_args *a = &call->args;
    struct rows q = {0, a->q_len}, kv = {0, a->kv_len};
    int64_t used, padding = 0, kv_batch = batch;
    mfa_status status = MFA_OK;
    if (a->varlen_q)
        status =
            read_rows("cu_seqlens_q", call->cu_seqlens_q, &a->cu_seqlens_q, batch, a->total_q, a->q_len, next->q, &q);
    if (a->varlen_kv && status == MFA_OK)
        status = read_rows("cu_seqlens_k", call->cu_seqlens_k, &a->cu_seqlens_k, batch, a->total_kv, a->kv_len,
                           next->kv, &kv);
    used = kv.count;
    if (a->has_seqused_k && status == MFA_OK)
        status =
            read_number("seqused_k", call->seqused_k, &a->seqused_k, batch, kv.count, "the keys of the entry", &used);
    if (a->has_leftpad_k && status == MFA_OK)
        status = read_number("leftpad_k", call->leftpad_k, &a->leftpad_k, batch, used, "the keys that count", &padding);
    if (a->has_cache_batch_idx && status == MFA_OK)
        status = read_number("cache_batch_idx", call->cache_batch_idx, &a->cache_batch_idx, batch, a->kv_batch - 1,
                             "the last entry of k and v", &kv_batch);
    if (status != MFA_OK)
        return status;
    *all = kv;
    *next = (struct packed_rows){q.first + q.count, kv.first + kv.count};
    *seq = (struct mfa_cpu_sequence){
        .batch = batch,
        .q_len = q.count,
        .kv_len = used - padding,
        .q_batch = a->varlen_q ? 0 : batch,
        .q_row = q.first,
        .kv_batch = a->varlen_kv ? 0 : kv_batch,
        .kv_row = kv.first + padding,
        .splits = 1,
    };
    const int64_t shift = a->bottom_right ? seq->kv_len - seq->q_len : 0;
    seq->lower = clamp(a->lower + shift, -seq->q_len, seq->kv_len);
    seq->upper = clamp(a->upper + shift, -seq->q_len, seq->kv_len);
    return call->features & CPU_PAGED ? check_pages(call, seq) : MFA_OK;
}

/* --- What belongs to no sequence -------------------------------------------------------------- */

/* The sequences that are being made. */
struct table {
    struct mfa_cpu_sequence *sequences;
    int64_t count;
};

/* Rows of queries that see nothing, and rows of keys that nothing sees. */
static void add_queries(struct table *table, int64_t first, int64_t count)
{
    if (count > 0)
        table->sequences[table->count++] = (struct mfa_cpu_sequence){.q_len = count, .q_row = first, .splits = 1};
}

static void add_keys(struct table *table, int64_t kv_batch, int64_t first, int64_t count)
{
    if (count > 0)
        table->sequences[table->count++] =
            (struct mfa_cpu_sequence){.kv_len = count, .kv_batch = kv_batch, .kv_row = first, .splits = 1};
}

/* Of a batch entry whose keys are the rows `all`. */
static void add_unused_keys(struct table *table, const struct mfa_cpu_sequence *seq, struct rows all)
{
    add_keys(table, seq->kv_batch, all.first, seq->kv_row - all.first);
    add_keys(table, seq->kv_batch, seq->kv_row + seq->kv_len, all.first + all.count - seq->kv_row - seq->kv_len);
}

/* The rows of packed tensors before the first batch entry and after the last. */
static void add_rest(struct table *table, const struct mfa_cpu_call *call, struct packed_rows first,
                     struct packed_rows end)
{
    const struct mfa_args *a = &call->args;
    if (a->varlen_q) {
        add_queries(table, 0, first.q);
        add_queries(table, end.q, a->total_q - end.q);
    }
    if (a->varlen_kv && (call->dk || call->dv)) {
        add_keys(table, 0, 0, first.kv);
        add_keys(table, 0, end.kv, a->total_kv - end.kv);
    }
}

/* --- Order and division ----------------------------------------------------------------------- */

static double work_of(const struct mfa_cpu_sequence *seq)
{
    return (double)seq->q_len * (double)seq->kv_len;
}

enum { CLASSES = 128 };

/* By the power of two that a sequence's work is below, at most 2^87. */
static int class_of(const struct mfa_cpu_sequence *seq)
{
    int exponent;
    frexp(work_of(seq), &exponent);
    return CLASSES - exponent;
}

/* Sequences with about the same work stay in their order. */
static void sort(const struct table *table, int64_t *order)
{
    int64_t first[CLASSES + 1] = {0};
    for (int64_t n = 0; n < table->count; n++)
        first[class_of(&table->sequences[n])]++;
    for (int64_t n = 0, sum = 0; n <= CLASSES; n++) {
        const int64_t size = first[n];
        first[n] = sum;
        sum += size;
    }
    for (int64_t n = 0; n < table->count; n++)
        order[first[class_of(&table->sequences[n])]++] = n;
}

static int64_t round_up(double x)
{
    const int64_t whole = (int64_t)x;
    return whole + ((double)whole < x);
}

/* Splits of keys where there would be few tasks otherwise: none has more than a small part of the work, as far as that
 * leaves enough keys. They show in the last bits of the results, so they do not depend on the number of threads. */
static void split(const struct mfa_cpu_call *call, int panel, const struct table *table)
{
    double work = 0;
    if (call->panels > 1)
        return;
    for (int64_t n = 0; n < table->count; n++) {
        const struct mfa_cpu_sequence *seq = &table->sequences[n];
        work += (double)(call->args.kv_heads * mfa_cpu_panels(call, seq->q_len, panel)) * (double)seq->kv_len;
    }
    for (int64_t n = 0; n < table->count; n++) {
        struct mfa_cpu_sequence *seq = &table->sequences[n];
        const int64_t most = seq->kv_len / MFA_CPU_SPLIT_KEYS;
        if (most > 1 && seq->q_len > 0 && work > 0) /* no work: there are no heads */
            seq->splits = clamp(round_up(MFA_CPU_ENOUGH_TASKS * (double)seq->kv_len / work), 1, most);
    }
}

/* Units of each sequence, and of those before it. */
static void count(const struct mfa_cpu_call *call, int panel, int workers, const struct table *table,
                  const int64_t *order)
{
    double work = 0;
    int64_t before[CPU_UNITS] = {0};
    for (int64_t n = 0; n < table->count; n++)
        work += work_of(&table->sequences[n]) * (double)call->args.kv_heads;
    for (int64_t n = 0; n < table->count; n++) {
        struct mfa_cpu_sequence *seq = &table->sequences[order[n]];
        mfa_cpu_count_units(call, panel, seq);
        if (work_of(seq) * workers * TASKS_PER_WORKER <= work && seq->kv_len > 0)
            seq->of_head[CPU_KV_TASKS] = 1;
        for (int unit = 0; unit < CPU_UNITS; unit++) {
            seq->before[unit] = before[unit];
            before[unit] += mfa_cpu_heads_of(call, (enum mfa_cpu_unit)unit) * seq->of_head[unit];
        }
    }
}

/* --- The table -------------------------------------------------------------------------------- */

static int64_t most_sequences(const struct mfa_args *a, int backward)
{
    int64_t each = 1, rest = a->varlen_q ? 2 : 0;
    if (backward) {
        each += a->has_seqused_k + a->has_leftpad_k;
        rest += a->varlen_kv ? 2 : 0;
    }
    return a->batch * each + rest;
}

uint64_t mfa_cpu_sequences_bytes(const struct mfa_cpu_call *call, int32_t pass)
{
    if (!is_varlen(call))
        return 0;
    return (uint64_t)most_sequences(&call->args, pass == MFA_BACKWARD) *
           (sizeof *call->sequences + sizeof *call->order);
}

int64_t mfa_cpu_sequences_most(const struct mfa_cpu_call *call, int panel, enum mfa_cpu_unit unit)
{
    const struct mfa_args *a = &call->args;
    if (!is_varlen(call) || (unit != CPU_PARTIALS && !a->varlen_q))
        return a->batch * mfa_cpu_heads_of(call, unit) * call->entry.of_head[unit];
    if (unit ==
        CPU_PARTIALS) /* each has a part of at least 1 / MFA_CPU_ENOUGH_TASKS of the work, or is the rest of a split */
        return call->panels > 1 ? 0 : 2 * MFA_CPU_ENOUGH_TASKS;
    /* Each sequence may have one that is not full. */
    const int64_t stretch = mfa_cpu_stretch(call), sequences = a->batch + 2;
    const int64_t block = (int64_t)call->panels * panel;
    const int64_t blocks =
        stretch ? (a->total_q / stretch + sequences) * mfa_cpu_ceil(stretch, block) : a->total_q / block + sequences;
    const int64_t rows = stretch ? blocks * block : a->total_q + sequences * panel;
    return a->q_heads * (unit == CPU_Q_BLOCKS ? blocks : rows);
}

mfa_status mfa_cpu_sequences_make(struct mfa_cpu_call *call, int panel, int workers, int64_t splits, void *memory)
{
    const struct mfa_args *a = &call->args;
    call->entry = (struct mfa_cpu_sequence){
        .q_len = a->q_len, .kv_len = a->kv_len, .lower = a->lower, .upper = a->upper, .splits = splits};
    mfa_cpu_count_units(call, panel, &call->entry);
    if (!is_varlen(call) || !memory)
        return MFA_OK;
    const int backward = call->dq || call->dk || call->dv || call->dbias || call->dsinks;
    struct table table = {memory, a->batch};
    int64_t *order = (int64_t *)(table.sequences + most_sequences(a, backward));
    const int varlen_q = a->varlen_q && a->batch > 0, varlen_kv = a->varlen_kv && a->batch > 0;
    const struct packed_rows first = {varlen_q ? integer(call->cu_seqlens_q, &a->cu_seqlens_q, 0) : 0,
                                      varlen_kv ? integer(call->cu_seqlens_k, &a->cu_seqlens_k, 0) : 0};
    struct packed_rows next = first;
    for (int64_t n = 0; n < a->batch; n++) {
        struct rows all;
        const mfa_status status = read_sequence(call, n, &next, &table.sequences[n], &all);
        if (status != MFA_OK)
            return status;
        if (call->dk || call->dv)
            add_unused_keys(&table, &table.sequences[n], all);
    }
    add_rest(&table, call, first, next);
    sort(&table, order);
    if (!backward)
        split(call, panel, &table);
    count(call, panel, workers, &table, order);
    call->sequences = table.sequences, call->order = order, call->sequence_count = table.count;
    return MFA_OK;
}
