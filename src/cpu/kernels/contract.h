/* What the kernels promise to launch.c and what they are given. A kernel set is compiled once per
 * instruction set and real type (kernels.inc lists them); its members are tasks: each computes its own
 * part of the result, alone, allocates nothing and cannot fail. Tasks of one phase may run in any number
 * of threads and in any order; but those of backward wait, each for lower ones of the same KV head, which must have
 * begun before it. Phases run one after another. */
#ifndef MFA_CPU_KERNELS_CONTRACT_H
#define MFA_CPU_KERNELS_CONTRACT_H

#include <stdatomic.h>
#include <stdint.h>

#include "core/args.h"

#define MFA_CPU_PANELS_MAX 8 /* of a chunk or a block of queries */

/* Values as in mfa_dtype; of codes, CPU_CODES and that of mfa_kv_type. */
enum mfa_cpu_dtype {
    CPU_F32,
    CPU_F16,
    CPU_BF16,
    CPU_F64,
    CPU_CODES = 16,
    CPU_INT8,
    CPU_E4M3,
    CPU_E5M2,
    CPU_INT4,
    CPU_NF4
};

/* As in core/key.h. */
enum mfa_cpu_feature_bit {
#define FEATURE(name, ...) CPU_BIT_##name,
#include "core/options.inc"
};

enum mfa_cpu_feature {
#define FEATURE(name, ...) CPU_##name = 1 << CPU_BIT_##name,
#include "core/options.inc"
};

/* What a pass divides the work of a batch entry into, for each of its heads. */
enum mfa_cpu_unit {
    CPU_PARTS,     /* forward: chunks of queries of a KV head, times splits of its keys: tasks */
    CPU_MERGES,    /* forward: chunks whose keys are split */
    CPU_PARTIALS,  /* forward: parts of these */
    CPU_Q_BLOCKS,  /* backward: blocks of queries of a query head */
    CPU_Q_ROWS,    /* backward: their rows, in whole panels */
    CPU_KV_BLOCKS, /* backward: blocks of keys of a KV head */
    CPU_KV_TASKS,  /* backward: the same, or 1 where they are one task */
    CPU_UNITS
};

/* A sequence: the lengths of a batch entry, and where its rows lie. Rows of packed tensors that belong to no sequence,
 * and keys that are not used, are sequences too, without keys or without queries: so zeros are written there. */
struct mfa_cpu_sequence {
    int64_t batch, q_len, kv_len;
    int64_t lower, upper;       /* query i sees keys i + lower to i + upper */
    int64_t q_batch, q_row;     /* where its rows begin in tensors of queries */
    int64_t kv_batch, kv_row;   /* and in those of keys; with pages kv_row is the first key of its table that counts */
    int64_t splits;             /* forward: parts that its keys are divided into */
    int64_t of_head[CPU_UNITS]; /* how many it has of each unit, in each head */
    int64_t before[CPU_UNITS];  /* how many all sequences before it have, of all heads */
};

/* All that the tasks of one run share. "real" is float, or double in the kernels for f64. */
struct mfa_cpu_call {
    struct mfa_args args;
    double scale, softcap;
    double kept;      /* 1 - dropout, or 1: what P, and with it results, are still to be divided by */
    double dS_factor; /* backward: a power of two that dS is multiplied by, near the scale where that is far from 1 */
    int32_t dtype, k_dtype, v_dtype, mask_dtype;
    int32_t out_dtype; /* of o, dq, dk and dv: dtype or CPU_F32 */
    int32_t features;  /* a set of enum mfa_cpu_feature */
    int32_t block_kv;  /* keys of a block */
    int32_t panels;    /* forward: panels of a chunk of queries; backward: of a block of queries */
    int32_t decode;    /* 1: by the decode kernels */
    int32_t int8;      /* 1: forward by products of int8; only for sets that have them */

    /* The sequences, first those of the batch entries, and the order in which `before` counts them: those with the most
     * work first. NULL: each batch entry is like `entry`, but for its batch, q_batch, kv_batch and `before`. */
    const struct mfa_cpu_sequence *sequences;
    const int64_t *order;
    int64_t sequence_count;
    struct mfa_cpu_sequence entry;

    /* The operands; NULL where there is none. o, o_low and lse are read by backward: o_low is what rounding took off O.
     * They lie in the layouts of args, o_low in that of o. */
#define INPUT(name, ...) const void *name;
#define RESULT(name, ...) void *name;
#define RESULT_LIKE(name, ...) void *name;
#include "core/operands.inc"

    void *partials; /* forward: real [CPU_PARTIALS] of panel sums */
    void *D;        /* backward: real [CPU_Q_ROWS] */
    void *L;        /* the same of L, in the unit of the set's scores */
    /* backward: real [CPU_Q_ROWS][padded head_dim], in the set's own order; NULL: sum in dq itself, if rows there are
     * whole vectors of reals */
    void *dq_sums;
    _Atomic int64_t *dq_semaphore; /* backward: [CPU_Q_BLOCKS], the kv block that may add to dQ next */

    char *scratch; /* of worker w: scratch + w * scratch_bytes, 64-byte aligned */
    uint64_t scratch_bytes;
};

typedef void mfa_cpu_task_function(void *call, int64_t task, int worker);

struct mfa_cpu_kernels {
    int lanes; /* reals in a vector; 0: this compiler could not build the set */
    int panel; /* queries of a panel, whole vectors: block_q */
    int int8;  /* 1: forward has products of int8, for K and V of CPU_INT8 with a scale for each row, and q of any
                  dtype but f64; else `int8` of a call must be 0 */

    /* forward: CPU_PARTS tasks; then merge: CPU_MERGES. decode takes the place of forward where a KV head has at most
     * decode_rows queries in all: one panel, blocks of decode_keys keys; decode_backward that of backward up to
     * decode_backward_rows */
    mfa_cpu_task_function *forward, *decode, *merge;
    int decode_rows, decode_backward_rows, decode_keys;
    /* backward: backward_preprocess, CPU_Q_BLOCKS tasks, which makes D; then backward or decode_backward,
     * CPU_KV_BLOCKS */
    mfa_cpu_task_function *backward_preprocess, *backward, *decode_backward;
    /* if dbias is wanted: one task for each tile of it (mfa_cpu_dbias_tiles) */
    mfa_cpu_task_function *dbias;
    /* if dsinks is wanted: one task for each element of it (mfa_cpu_dsinks_count) */
    mfa_cpu_task_function *dsinks;

    /* Bytes of scratch that a worker needs, whole multiples of 64; only sizes and tiling of the call are read. That of
     * forward or decode is for merge too, that of backward for backward_preprocess and dbias. */
    uint64_t (*forward_scratch)(const struct mfa_cpu_call *call);
    uint64_t (*decode_scratch)(const struct mfa_cpu_call *call);
    uint64_t (*backward_scratch)(const struct mfa_cpu_call *call);
    uint64_t (*decode_backward_scratch)(const struct mfa_cpu_call *call);
    uint64_t (*partial_bytes)(const struct mfa_cpu_call *call); /* of one of CPU_PARTIALS */
};

#define KERNELS(isa, dtype, name) extern const struct mfa_cpu_kernels mfa_cpu_kernels_##name;
#include "cpu/kernels/kernels.inc"
#undef KERNELS

static inline int64_t mfa_cpu_ceil(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit;
}

/* Queries of a stretch, at whose end a panel ends, however few queries it has: those of a block of the map, so that a
 * panel lies in one row of the map and sees all of a block or nothing. 0: no stretches; decode's panel is a whole KV
 * head. */
static inline int64_t mfa_cpu_stretch(const struct mfa_cpu_call *call)
{
    return call->decode ? 0 : call->args.block_map_q;
}

/* How many units of so many queries a head of q_len queries has, if stretches begin with a new one. */
static inline int64_t mfa_cpu_units_of_head(const struct mfa_cpu_call *call, int64_t q_len, int64_t unit)
{
    const int64_t stretch = mfa_cpu_stretch(call);
    if (!stretch)
        return mfa_cpu_ceil(q_len, unit);
    return q_len / stretch * mfa_cpu_ceil(stretch, unit) + mfa_cpu_ceil(q_len % stretch, unit);
}

/* Queries [first, end) of a head. */
struct mfa_cpu_queries {
    int64_t first, end;
};

/* Those of unit number n of a head. */
static inline struct mfa_cpu_queries mfa_cpu_unit_of_head(const struct mfa_cpu_call *call, int64_t q_len, int64_t unit,
                                                          int64_t n)
{
    const int64_t stretch = mfa_cpu_stretch(call);
    const int64_t units = stretch ? mfa_cpu_ceil(stretch, unit) : n + 1, begin = n / units * stretch;
    const int64_t first = begin + n % units * unit, end = stretch && begin + stretch < q_len ? begin + stretch : q_len;
    return (struct mfa_cpu_queries){first, first + unit < end ? first + unit : end};
}

/* Panels of a KV head. Without stretches the rows of its query heads follow each other in them. */
static inline int64_t mfa_cpu_panels(const struct mfa_cpu_call *call, int64_t q_len, int panel)
{
    const int64_t heads = call->args.q_heads_per_kv;
    return mfa_cpu_stretch(call) ? heads * mfa_cpu_units_of_head(call, q_len, panel)
                                 : mfa_cpu_ceil(heads * q_len, panel);
}

/* Chunks of a KV head. */
static inline int64_t mfa_cpu_chunks(const struct mfa_cpu_call *call, int64_t q_len, int panel)
{
    return mfa_cpu_ceil(mfa_cpu_panels(call, q_len, panel), call->panels);
}

/* Blocks of queries of a query head. */
static inline int64_t mfa_cpu_q_blocks(const struct mfa_cpu_call *call, int64_t q_len, int panel)
{
    return mfa_cpu_units_of_head(call, q_len, (int64_t)call->panels * panel);
}

/* Panels of a query head in backward: of each of its blocks of queries `panels`, of which the last may have none. */
static inline int64_t mfa_cpu_q_panels(const struct mfa_cpu_call *call, int64_t q_len, int panel)
{
    return mfa_cpu_stretch(call) ? mfa_cpu_q_blocks(call, q_len, panel) * call->panels : mfa_cpu_ceil(q_len, panel);
}

/* Fills in of_head of a sequence whose other members, but `before`, are set. CPU_KV_TASKS are the blocks. */
static inline void mfa_cpu_count_units(const struct mfa_cpu_call *call, int panel, struct mfa_cpu_sequence *seq)
{
    const int64_t chunks = mfa_cpu_chunks(call, seq->q_len, panel), splits = seq->splits;
    const int64_t kv_blocks = mfa_cpu_ceil(seq->kv_len, call->block_kv);
    seq->of_head[CPU_PARTS] = chunks * splits;
    seq->of_head[CPU_MERGES] = splits > 1 ? chunks : 0;
    seq->of_head[CPU_PARTIALS] = splits > 1 ? chunks * splits : 0;
    seq->of_head[CPU_Q_BLOCKS] = mfa_cpu_q_blocks(call, seq->q_len, panel);
    seq->of_head[CPU_Q_ROWS] = mfa_cpu_q_panels(call, seq->q_len, panel) * panel;
    seq->of_head[CPU_KV_BLOCKS] = seq->of_head[CPU_KV_TASKS] = kv_blocks;
}

static inline int64_t mfa_cpu_heads_of(const struct mfa_cpu_call *call, enum mfa_cpu_unit unit)
{
    return unit == CPU_Q_BLOCKS || unit == CPU_Q_ROWS ? call->args.q_heads : call->args.kv_heads;
}

/* How many units all sequences have, of all heads. */
static inline int64_t mfa_cpu_units(const struct mfa_cpu_call *call, enum mfa_cpu_unit unit)
{
    const int64_t heads = mfa_cpu_heads_of(call, unit);
    if (!call->sequences)
        return call->args.batch * heads * call->entry.of_head[unit];
    if (call->sequence_count == 0)
        return 0;
    const struct mfa_cpu_sequence *last = &call->sequences[call->order[call->sequence_count - 1]];
    return last->before[unit] + heads * last->of_head[unit];
}

/* The sequence of a batch entry. */
static inline struct mfa_cpu_sequence mfa_cpu_sequence_of(const struct mfa_cpu_call *call, int64_t batch)
{
    if (call->sequences)
        return call->sequences[batch];
    struct mfa_cpu_sequence seq = call->entry;
    seq.batch = seq.q_batch = seq.kv_batch = batch;
    for (int unit = 0; unit < CPU_UNITS; unit++)
        seq.before[unit] = batch * mfa_cpu_heads_of(call, (enum mfa_cpu_unit)unit) * seq.of_head[unit];
    return seq;
}

/* Unit `index` of a head of a sequence. */
struct mfa_cpu_place {
    struct mfa_cpu_sequence seq;
    int64_t head, index;
};

/* Where unit number n of all sequences is. */
static inline struct mfa_cpu_place mfa_cpu_find(const struct mfa_cpu_call *call, enum mfa_cpu_unit unit, int64_t n)
{
    struct mfa_cpu_place place;
    if (call->sequences) {
        int64_t low = 0, high = call->sequence_count; /* the last in this order with before <= n */
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            if (call->sequences[call->order[middle]].before[unit] <= n)
                low = middle;
            else
                high = middle;
        }
        place.seq = call->sequences[call->order[low]];
    } else {
        place.seq = mfa_cpu_sequence_of(call, n / call->entry.of_head[unit] / mfa_cpu_heads_of(call, unit));
    }
    n -= place.seq.before[unit];
    place.head = n / place.seq.of_head[unit], place.index = n % place.seq.of_head[unit];
    return place;
}

/* Along a dimension over which dbias is summed (stride 0), it has one tile. */
struct mfa_cpu_dbias_tiles {
    int64_t batch, heads, rows, columns; /* counts of tiles */
};

static inline struct mfa_cpu_dbias_tiles mfa_cpu_dbias_tiles(const struct mfa_cpu_call *call, int panel)
{
    const struct mfa_args *a = &call->args;
    struct mfa_cpu_dbias_tiles t = {
        .batch = a->dbias.batch ? a->batch : 1,
        .heads = a->dbias.head ? a->q_heads : 1,
        .rows = a->dbias.row ? mfa_cpu_q_panels(call, a->q_len, panel) : 1,
        .columns = a->dbias.column ? mfa_cpu_ceil(a->kv_len, call->block_kv) : 1,
    };
    return t;
}

static inline int64_t mfa_cpu_dsinks_count(const struct mfa_args *a)
{
    return (a->dsinks.batch ? a->batch : 1) * (a->dsinks.head ? a->q_heads : 1);
}

#endif
