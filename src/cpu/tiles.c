#include "cpu/tiles.h"

#include <math.h>
#include <string.h>

#include "core/problem.h"

/* Keys of a block, and panels of queries that share one load of it, for head_dim and value_dim up to `dim`. Chosen so
 * that in forward the scores of one panel, a block of K and V and the sums stay in L2 (1 MiB on the machines that were
 * measured), and in backward P and dS of a block of queries as well. The first row that fits counts. */
/* clang-format off */
static const struct row {
    mfa_cpu_isa isa; /* MFA_CPU_SCALAR: any */
    int32_t dim;
    int32_t forward_kv, forward_panels, backward_kv, backward_panels;
} rows[] = {
    {MFA_CPU_AMXBF16, 128, 512, 8, 512, 4}, /* multiples of 64 keys */
    {MFA_CPU_AMXBF16, 256, 128, 8, 128, 2},
    {MFA_CPU_AMXBF16, 512, 64, 8, 64, 2},
    {MFA_CPU_SCALAR, 32, 768, 8, 384, 2},
    {MFA_CPU_AVX512BF16, 128, 384, 8, 384, 2},
    {MFA_CPU_SCALAR, 128, 192, 8, 384, 2},
    {MFA_CPU_SCALAR, 256, 192, 4, 96, 2},
    {MFA_CPU_SCALAR, 512, 48, 4, 48, 2},
};
/* clang-format on */

#define LOAD_PANELS 0.125 /* the time to load a block for a chunk, in units of the time of a panel */
#define SMALL_BLOCK 256   /* maximum number of keys of a block where tasks are few */
#define KV_BLOCKS_MIN 128 /* of all heads in backward: with fewer, many threads wait for the last ones */
#define EQUAL_TASKS 8     /* with fewer tasks, they should be of equal size, or threads wait for the last one */
#define BLOCK_UNIT 16     /* keys */
#define INT8_KEYS 384     /* a bound of errors in mfa.h is that of blocks of at most 512 */
#define SERIAL_FLOP 2e6   /* less work takes about as long as waking a thread */

static const struct row *row_of(mfa_cpu_isa isa, const mfa_problem *p)
{
    int64_t dim = p->head_dim > p->value_dim ? p->head_dim : p->value_dim;
    const struct row *row = rows;
    while (row->dim < dim || (row->isa != MFA_CPU_SCALAR && row->isa != isa))
        row++;
    return row;
}

/* Queries of all heads that share a KV head. */
static int64_t queries_of(const mfa_problem *p)
{
    return p->kv_heads ? p->q_heads / p->kv_heads * p->q_len : 0;
}

/* Whether the number of visible keys differs from query to query: the band's upper edge masks some, or a map does. */
static int sees_unequally(const mfa_problem *p)
{
    return p->upper < p->kv_len - 1 || p->block_map_q > 0;
}

/* Panels of a chunk, at most `most`: as many as possible, so that a block is loaded for many, but such that no thread
 * is idle for long. Under a band or a map the chunks take unequal times. */
static int32_t choose_panels(const mfa_problem *p, int32_t most, int64_t block_q, int64_t threads)
{
    const int64_t heads = p->batch * p->kv_heads, queries = queries_of(p);
    int32_t best = 1;
    double panels = (double)(heads * mfa_cpu_ceil(queries, block_q)), least = INFINITY;
    double unequal = sees_unequally(p) ? 0.5 : 0.3; /* a head may end with a short one */
    for (; most >= 1; most /= 2) {
        int64_t tasks = heads * mfa_cpu_ceil(queries, most * block_q);
        double rounds = (double)mfa_cpu_ceil(tasks, threads) + unequal;
        double time = rounds * (panels / (double)tasks + LOAD_PANELS);
        if (time < least)
            least = time, best = most;
    }
    return best;
}

/* Returns the number of tasks. If even chunks of one panel are too few, the keys are split, which shows in the last
 * bits of the results and so does not depend on the number of threads. */
static int64_t choose_forward(const mfa_problem *p, const struct row *row, const struct mfa_cpu_kernels *kernels,
                              struct mfa_choice *choice, struct mfa_cpu_tiling *tiling)
{
    const int64_t heads = p->batch * p->kv_heads, queries = queries_of(p), block_q = choice->key.block_q;
    int64_t tasks = heads * mfa_cpu_ceil(queries, block_q);
    if (choice->key.variant == MFA_VARIANT_DECODE)
        choice->key.block_kv = tiling->block_kv = kernels->decode_keys;
    tiling->panels = 1;
    if (tasks > 0 && tasks < MFA_CPU_ENOUGH_TASKS) {
        int64_t wanted = mfa_cpu_ceil(MFA_CPU_ENOUGH_TASKS, tasks), most = p->kv_len / MFA_CPU_SPLIT_KEYS;
        tiling->splits = wanted < most ? wanted : most < 1 ? 1 : most;
        if (tiling->block_kv > SMALL_BLOCK)
            tiling->block_kv = SMALL_BLOCK;
    } else if (tasks > 0 && choice->key.variant != MFA_VARIANT_DECODE) {
        tiling->panels = choose_panels(p, row->forward_panels, block_q, choice->threads);
        tasks = heads * mfa_cpu_ceil(queries, tiling->panels * block_q);
    }
    return tasks * tiling->splits;
}

/* Panels of a block of queries, about `most`, but such that the blocks of a row of the map are of one size. */
static int32_t fit_panels(const mfa_problem *p, int32_t most, int64_t block_q)
{
    const int64_t panels = mfa_cpu_ceil(p->block_map_q, block_q), blocks = panels > most ? panels / most : 1;
    const int64_t fit = mfa_cpu_ceil(panels, blocks);
    if (p->block_map_q == 0)
        return most;
    return (int32_t)(fit < MFA_CPU_PANELS_MAX ? fit : MFA_CPU_PANELS_MAX);
}

/* Returns the number of tasks. Where blocks are few, they are halved, and where these are very few, there is an even
 * number of blocks of one size, unless a band or a map makes their times unequal. Groups are then twice as large, and
 * take as much memory as before. */
static int64_t choose_backward(const mfa_problem *p, const struct row *row, int64_t block_q,
                               struct mfa_cpu_tiling *tiling)
{
    int64_t heads = p->batch * p->kv_heads, blocks = mfa_cpu_ceil(p->kv_len, row->backward_kv);
    tiling->panels = row->backward_panels;
    if (row->backward_kv > SMALL_BLOCK && heads * blocks > 0 && heads * blocks < KV_BLOCKS_MIN) {
        tiling->block_kv /= 2;
        tiling->panels *= 2;
        blocks = mfa_cpu_ceil(p->kv_len, tiling->block_kv);
        if (heads * blocks < EQUAL_TASKS && blocks > 1 && !sees_unequally(p)) {
            blocks += blocks * heads % 2;
            tiling->block_kv = (int32_t)(mfa_cpu_ceil(mfa_cpu_ceil(p->kv_len, blocks), BLOCK_UNIT) * BLOCK_UNIT);
            blocks = mfa_cpu_ceil(p->kv_len, tiling->block_kv);
        }
    }
    tiling->panels = fit_panels(p, tiling->panels, block_q);
    return heads * blocks;
}

/* A problem whose batch entries all have the average length of this one's packed sequences. */
static mfa_problem average(const mfa_problem *p)
{
    mfa_problem even = *p;
    if (p->varlen_q && p->batch > 0)
        even.q_len = mfa_cpu_ceil(p->total_q, p->batch);
    if (p->varlen_kv && p->batch > 0)
        even.kv_len = mfa_cpu_ceil(p->total_kv, p->batch);
    return even;
}

/* Training is what has dropout, and the decode kernels have not. */
enum mfa_variant mfa_cpu_tiles_variant(const struct mfa_cpu_kernels *kernels, const mfa_problem *p)
{
    const int most = p->pass == MFA_FORWARD ? kernels->decode_rows : kernels->decode_backward_rows;
    const int64_t queries = queries_of(p);
    return queries > 0 && queries <= most && !(p->dropout > 0) ? MFA_VARIANT_DECODE : MFA_VARIANT_TILED;
}

void mfa_cpu_tiles_choose(mfa_cpu_isa isa, const struct mfa_cpu_kernels *kernels, enum mfa_variant variant,
                          const mfa_problem *p, struct mfa_choice *choice)
{
    const mfa_problem even = average(p);
    const struct row *row = row_of(isa, p);
    const int forward = p->pass == MFA_FORWARD;
    memset(&choice->key, 0, sizeof choice->key);
    choice->key.pass = p->pass, choice->key.dtype = p->dtype;
    choice->key.variant = variant;
    choice->key.head_dim = (int32_t)p->head_dim, choice->key.value_dim = (int32_t)p->value_dim;
    choice->key.block_q = variant != MFA_VARIANT_DECODE ? kernels->panel
                          : forward                     ? kernels->decode_rows
                                                        : kernels->decode_backward_rows;
    choice->key.block_kv = forward ? row->forward_kv : row->backward_kv;
    if (variant == MFA_VARIANT_INT8 && choice->key.block_kv > INT8_KEYS)
        choice->key.block_kv = INT8_KEYS;
    choice->key.features = mfa_key_features(p), choice->key.mask_dtype = p->mask_dtype;
    choice->key.k_type = p->k_type, choice->key.v_type = p->v_type;
    memcpy(choice->key.machine, mfa_cpu_isa_name(isa), strlen(mfa_cpu_isa_name(isa)));

    struct mfa_cpu_tiling tiling = {.splits = 1, .block_kv = choice->key.block_kv};
    int64_t tasks = forward ? choose_forward(&even, row, kernels, choice, &tiling)
                            : choose_backward(&even, row, kernels->panel, &tiling);
    memcpy(choice->tiling.bytes, &tiling, sizeof tiling);
    const double flop = 4.0 * (double)(p->batch * p->q_heads * even.q_len) * (double)p->kv_len * (double)p->head_dim;
    if (flop < SERIAL_FLOP || tasks < 1)
        tasks = 1;
    else if (mfa_problem_is_varlen(p))
        tasks = choice->threads; /* how many there are is known when a run begins */
    choice->threads = tasks < choice->threads ? (int)tasks : choice->threads;
}
