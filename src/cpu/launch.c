#include "cpu/launch.h"

#include <math.h>
#include <string.h>

#include "core/dropout.h"
#include "core/operand.h"
#include "core/problem.h"
#include "cpu/sequences.h"
#include "cpu/tiles.h"

_Static_assert((int)CPU_F32 == MFA_F32 && (int)CPU_F16 == MFA_F16 && (int)CPU_BF16 == MFA_BF16 &&
                   (int)CPU_F64 == MFA_F64,
               "contract.h counts dtypes as mfa.h does");
_Static_assert((int)CPU_INT8 == CPU_CODES + MFA_KV_INT8 && (int)CPU_NF4 == CPU_CODES + MFA_KV_NF4,
               "and types of codes");

/* The row stride of a single row is never used, but the caller may give any number: set to 0, so that kernels that
 * multiply it, or advance by it beyond the last row, do not overflow. */
static void clear_unused_strides(const mfa_problem *p, struct mfa_args *a)
{
    if ((a->varlen_q ? a->total_q : a->q_len) <= 1)
        a->q.row = a->o.row = a->d_o.row = a->dq.row = 0;
    if (mfa_problem_kv_rows(p) <= 1)
        a->k.row = a->v.row = 0;
}

/* dQ = scale * dS K, and dK likewise: where the scale is far from 1, dS K may overflow or underflow although dQ does
 * not. Then most of the scale is a factor of dS, a power of two. */
static double dS_factor(double scale)
{
    int exponent;
    frexp(scale, &exponent);
    if (scale == 0 || (exponent > -40 && exponent < 40))
        return 1;
    return ldexp(1, exponent < -64 ? -64 : exponent > 64 ? 64 : exponent);
}

/* All members of the call except its pointers and what they say of sequences. */
static void fill_in_call(const mfa_problem *p, const struct mfa_choice *choice, struct mfa_cpu_call *call)
{
    const struct mfa_cpu_tiling tiling = mfa_cpu_tiling_of(choice);
    memset(call, 0, sizeof *call);
    call->args = mfa_problem_args(p);
    clear_unused_strides(p, &call->args);
    call->scale = p->scale, call->softcap = p->softcap, call->dS_factor = dS_factor(p->scale);
    call->kept = mfa_dropout_kept(p->dropout);
    call->dtype = call->k_dtype = call->v_dtype = p->dtype;
    if (p->k_type)
        call->k_dtype = CPU_CODES + p->k_type;
    if (p->v_type)
        call->v_dtype = CPU_CODES + p->v_type;
    call->out_dtype = mfa_operand_out_dtype(p);
    call->mask_dtype = p->mask_dtype, call->features = choice->key.features;
    call->decode = choice->key.variant == MFA_VARIANT_DECODE;
    call->int8 = choice->key.variant == MFA_VARIANT_INT8;
    call->block_kv = tiling.block_kv, call->panels = tiling.panels;
}

/* Offsets in bytes of the parts of the workspace that a run's threads share, and where the last one ends. */
struct offsets {
    uint64_t sequences, partials, D, L, dq_sums, dq_semaphore, end;
};

static uint64_t align(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static int64_t round_up(int64_t n, int64_t unit)
{
    return mfa_cpu_ceil(n, unit) * unit;
}

/* dQ is accumulated in the caller's tensor if its rows are whole vectors of reals, and the kernels do not sum up dQ^T,
 * as those that multiply bf16 may. */
static int sums_in_place(const struct mfa_cpu_kernels *kernels, const mfa_problem *p)
{
    return (p->dtype == MFA_F32 || p->dtype == MFA_F64) && p->dq_layout.column == 1 &&
           p->head_dim % kernels->lanes == 0;
}

static struct offsets workspace_offsets(const struct mfa_cpu_kernels *kernels, const mfa_problem *p,
                                        const struct mfa_cpu_call *call)
{
    struct offsets at = {0};
    uint64_t real = p->dtype == MFA_F64 ? 8 : 4;
    at.partials = at.D = align(mfa_cpu_sequences_bytes(call, p->pass));
    if (p->pass == MFA_FORWARD) {
        const int64_t partials = mfa_cpu_sequences_most(call, kernels->panel, CPU_PARTIALS);
        at.end = at.partials + align((uint64_t)partials * kernels->partial_bytes(call));
        return at;
    }
    const int64_t rows = mfa_cpu_sequences_most(call, kernels->panel, CPU_Q_ROWS);
    const int64_t q_blocks = mfa_cpu_sequences_most(call, kernels->panel, CPU_Q_BLOCKS);
    at.L = at.D + align((uint64_t)rows * real);
    at.dq_sums = at.L + align((uint64_t)rows * real);
    at.dq_semaphore = at.dq_sums;
    if (!sums_in_place(kernels, p))
        at.dq_semaphore += align((uint64_t)(rows * round_up(p->head_dim, kernels->lanes)) * real);
    at.end = at.dq_semaphore + align((uint64_t)q_blocks * sizeof *call->dq_semaphore);
    return at;
}

void mfa_cpu_launch_measure(const struct mfa_cpu_kernels *kernels, const mfa_problem *problem,
                            struct mfa_choice *choice)
{
    struct mfa_cpu_call call;
    fill_in_call(problem, choice, &call);
    mfa_cpu_sequences_make(&call, kernels->panel, 1, mfa_cpu_tiling_of(choice).splits, NULL);
    choice->shared = workspace_offsets(kernels, problem, &call).end;
    uint64_t bytes = problem->pass == MFA_BACKWARD ? kernels->backward_scratch(&call)
                     : call.decode                 ? kernels->decode_scratch(&call)
                                                   : kernels->forward_scratch(&call);
    if (problem->pass == MFA_BACKWARD && call.decode && bytes < kernels->decode_backward_scratch(&call))
        bytes = kernels->decode_backward_scratch(&call);
    choice->per_thread = align(bytes);
}

static void *address(const mfa_buffer *buffer)
{
    return buffer->base ? (char *)buffer->base + buffer->offset : NULL;
}

static void bind(struct mfa_cpu_call *call, const mfa_buffers *b)
{
#define INPUT(name, ...) call->name = address(&b->name);
#define RESULT(name, ...) call->name = address(&b->name);
#define RESULT_LIKE(name, ...) call->name = address(&b->name);
#include "core/operands.inc"
}

static void run_forward(mfa_cpu_threads *threads, int workers, const struct mfa_cpu_kernels *kernels,
                        struct mfa_cpu_call *call)
{
    mfa_cpu_threads_run(threads, workers, mfa_cpu_units(call, CPU_PARTS),
                        call->decode ? kernels->decode : kernels->forward, call);
    mfa_cpu_threads_run(threads, workers, mfa_cpu_units(call, CPU_MERGES), kernels->merge, call);
}

/* Blocks of one KV head add to the same dQ, one after another; those of different heads are independent. So a task is
 * an entire head while there is one for each thread; of the last heads each block is a task, with the blocks of as many
 * heads interleaved as there are threads. */
struct heads {
    mfa_cpu_task_function *block;
    struct mfa_cpu_call *call;
    int64_t entire, by_block; /* heads that are one task; heads of which each block is one */
    int64_t blocks;           /* of a head */
};

static void run_head(void *argument, int64_t task, int worker)
{
    const struct heads *heads = argument;
    const int64_t part = task - heads->entire;
    if (part >= 0) {
        const int64_t head = heads->entire + part % heads->by_block, block = part / heads->by_block;
        heads->block(heads->call, head * heads->blocks + block, worker);
        return;
    }
    for (int64_t block = 0; block < heads->blocks; block++)
        heads->block(heads->call, task * heads->blocks + block, worker);
}

/* Where sequences differ: a head of a short one is a task; of a long one each block is, with those of its heads
 * interleaved. */
static void run_sequence(void *argument, int64_t task, int worker)
{
    const struct heads *heads = argument;
    const struct mfa_cpu_place place = mfa_cpu_find(heads->call, CPU_KV_TASKS, task);
    const struct mfa_cpu_sequence *seq = &place.seq;
    const int64_t blocks = seq->of_head[CPU_KV_BLOCKS], tasks = seq->of_head[CPU_KV_TASKS];
    const int64_t kv_heads = heads->call->args.kv_heads, n = place.head * tasks + place.index;
    const int64_t first = seq->before[CPU_KV_BLOCKS] + n % kv_heads * blocks;
    if (tasks == blocks) {
        heads->block(heads->call, first + n / kv_heads, worker);
        return;
    }
    for (int64_t block = 0; block < blocks; block++)
        heads->block(heads->call, first + block, worker);
}

static void run_backward(mfa_cpu_threads *threads, int workers, const struct mfa_cpu_kernels *kernels,
                         struct mfa_cpu_call *call)
{
    const struct mfa_args *a = &call->args;
    int64_t all = a->batch * a->kv_heads, by_block = all < (int64_t)2 * workers ? all : workers + all % workers;
    struct heads heads = {call->decode ? kernels->decode_backward : kernels->backward, call, all - by_block, by_block,
                          call->entry.of_head[CPU_KV_BLOCKS]};
    mfa_cpu_threads_run(threads, workers, mfa_cpu_units(call, CPU_Q_BLOCKS), kernels->backward_preprocess, call);
    if ((call->dq || call->dk || call->dv) && call->sequences)
        mfa_cpu_threads_run(threads, workers, mfa_cpu_units(call, CPU_KV_TASKS), run_sequence, &heads);
    else if (call->dq || call->dk || call->dv)
        mfa_cpu_threads_run(threads, workers, heads.entire + heads.by_block * heads.blocks, run_head, &heads);
    if (call->dbias) {
        struct mfa_cpu_dbias_tiles t = mfa_cpu_dbias_tiles(call, kernels->panel);
        mfa_cpu_threads_run(threads, workers, t.batch * t.heads * t.rows * t.columns, kernels->dbias, call);
    }
    if (call->dsinks)
        mfa_cpu_threads_run(threads, workers, mfa_cpu_dsinks_count(a), kernels->dsinks, call);
}

mfa_status mfa_cpu_launch(mfa_cpu_threads *threads, int workers, const struct mfa_cpu_kernels *kernels,
                          const mfa_problem *problem, const struct mfa_choice *choice, const mfa_buffers *buffers,
                          void *workspace)
{
    struct mfa_cpu_call call;
    char *memory = workspace;
    fill_in_call(problem, choice, &call);
    bind(&call, buffers);
    const mfa_status status =
        mfa_cpu_sequences_make(&call, kernels->panel, workers, mfa_cpu_tiling_of(choice).splits, memory);
    if (status != MFA_OK)
        return status;
    struct offsets at = workspace_offsets(kernels, problem, &call);
    call.scratch = memory + at.end, call.scratch_bytes = choice->per_thread;
    if (problem->pass == MFA_FORWARD) {
        call.partials = memory + at.partials;
        run_forward(threads, workers, kernels, &call);
    } else {
        call.D = memory + at.D, call.L = memory + at.L, call.dq_semaphore = (void *)(memory + at.dq_semaphore);
        call.dq_sums = sums_in_place(kernels, problem) ? NULL : memory + at.dq_sums;
        run_backward(threads, workers, kernels, &call);
    }
    return MFA_OK;
}
