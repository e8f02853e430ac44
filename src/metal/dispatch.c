#include "metal/dispatch.h"

#include <string.h>

#include "core/operand.h"
#include "core/problem.h"
#include "metal/source.h"

#define ROWS_OF_GROUP 4      /* simdgroups of a threadgroup of the small kernels, each with a row or a block */
#define FLOP_OF_COMMAND 1e11 /* a tenth of a second on an M1 */
#define ENOUGH_GROUPS 256    /* that fill rows of no sequence */
#define GROUPS_OF_COMMAND 64 /* at least, to keep cores busy */

/* --- Sizes ---------------------------------------------------------------------------------------- */

static int64_t ceil_of(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit;
}

/* Saturating: a workspace larger than any memory fails by its size. */
static uint64_t times(uint64_t a, uint64_t b)
{
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

static uint64_t plus_aligned(uint64_t at, uint64_t bytes)
{
    uint64_t sum;
    return __builtin_add_overflow(at, bytes, &sum) || sum > UINT64_MAX - 63 ? UINT64_MAX : (sum + 63) / 64 * 64;
}

/* Queries in all batch entries of a head: of tensors, where they may be packed. */
static int64_t queries_of(const mfa_problem *p)
{
    return p->varlen_q ? p->total_q : p->batch * p->q_len;
}

static int64_t q_heads_per_kv(const mfa_problem *p)
{
    return p->kv_heads ? p->q_heads / p->kv_heads : 1;
}

static int64_t groups_of(const struct mfa_metal_grid *grid)
{
    const uint64_t groups =
        times(times((uint64_t)grid->batch, (uint64_t)grid->head), times((uint64_t)grid->row, (uint64_t)grid->column));
    return groups > INT64_MAX ? INT64_MAX : (int64_t)groups;
}

/* Extents of the block mask for a kernel with this tile and this many query heads packed into its rows: 1 along
 * dimensions on which the mask does not depend. */
static struct mfa_metal_grid block_mask_grid(const mfa_problem *p, const struct mfa_metal_tile *tile, int64_t pack_gqa)
{
    const mfa_layout *s = &p->mask_layout;
    const int one_row = s->row == 0 && (s->head == 0 || pack_gqa == 1);
    const int one_batch = s->batch == 0 && !mfa_problem_is_varlen(p); /* else lengths differ */
    return (struct mfa_metal_grid){one_batch ? 1 : p->batch, s->head ? p->q_heads / pack_gqa : 1,
                                   one_row ? 1 : ceil_of(p->q_len * pack_gqa, tile->block_q),
                                   s->column ? ceil_of(p->kv_len, tile->block_kv) : 1};
}

static struct mfa_metal_grid bias_grid(const mfa_problem *p)
{
    const mfa_layout *s = &p->dbias_layout;
    return (struct mfa_metal_grid){s->batch ? p->batch : 1, s->head ? p->q_heads : 1,
                                   s->row ? ceil_of(p->q_len, MFA_METAL_BIAS_BLOCK) : 1,
                                   s->column ? ceil_of(p->kv_len, MFA_METAL_BIAS_BLOCK) : 1};
}

/* --- The workspace -------------------------------------------------------------------------------- */

/* Offsets of its parts, and its size in bytes. */
struct regions {
    uint64_t block_mask[2]; /* of forward, or of dQ and of dK dV */
    uint64_t partials, D, L, end;
};

static uint64_t block_mask_bytes(const mfa_problem *p, const struct mfa_key *key, enum mfa_metal_kernel kernel)
{
    if (p->mask == MFA_MASK_NONE)
        return 0;
    const struct mfa_metal_grid t =
        block_mask_grid(p, mfa_metal_tiles_find(kernel, key), kernel == MFA_METAL_BACKWARD_DKV ? 1 : q_heads_per_kv(p));
    return (uint64_t)groups_of(&t);
}

static uint64_t partials_bytes(const mfa_problem *p, const struct mfa_choice *choice)
{
    uint64_t numbers;
    if (mfa_metal_tiling_of(choice).splits == 1)
        return 0;
    if (p->pass == MFA_FORWARD) {
        numbers = times(times((uint64_t)queries_of(p), (uint64_t)p->q_heads), (uint64_t)p->value_dim + 2);
    } else {
        const struct mfa_metal_grid t = bias_grid(p);
        numbers = times((uint64_t)groups_of(&t), (uint64_t)MFA_METAL_BIAS_BLOCK * MFA_METAL_BIAS_BLOCK);
    }
    return times(times(numbers, (uint64_t)mfa_metal_tiling_of(choice).splits), sizeof(float));
}

static struct regions lay_out(const mfa_problem *p, const struct mfa_choice *choice)
{
    struct regions at = {{0, 0}, 0, 0, 0, 0};
    const int forward = p->pass == MFA_FORWARD;
    const enum mfa_metal_kernel first = mfa_metal_tiles_named(&choice->key);
    const uint64_t row_sums = forward ? 0 : (uint64_t)(p->q_heads * queries_of(p)) * sizeof(float);
    at.block_mask[1] = plus_aligned(0, block_mask_bytes(p, &choice->key, first));
    at.partials =
        plus_aligned(at.block_mask[1], forward ? 0 : block_mask_bytes(p, &choice->key, MFA_METAL_BACKWARD_DKV));
    at.D = plus_aligned(at.partials, partials_bytes(p, choice));
    at.L = plus_aligned(at.D, row_sums);
    at.end = plus_aligned(at.L, row_sums);
    return at;
}

void mfa_metal_dispatch_measure(const mfa_problem *problem, struct mfa_choice *choice)
{
    choice->shared = lay_out(problem, choice).end;
    choice->per_thread = 0;
}

int32_t mfa_metal_dispatch_threads(enum mfa_metal_kernel kernel, const struct mfa_key *key)
{
    const struct mfa_metal_tile *tile = mfa_metal_tiles_find(kernel, key);
    return tile ? mfa_metal_tiles_threads(tile) : kernel == MFA_METAL_LAYOUT_TEST ? 32 : 32 * ROWS_OF_GROUP;
}

/* --- The call ------------------------------------------------------------------------------------- */

static mfa_int present(const mfa_problem *p, const mfa_buffers *buffers)
{
    mfa_int bits = 0;
    for (int n = 0; n < MFA_OPERAND_COUNT; n++)
        if (mfa_operand_role(&mfa_operands[n], p) && mfa_operand_buffer(buffers, n)->base)
            bits |= (mfa_int)1 << mfa_metal_source_buffer_of(n);
    return bits;
}

/* Whether groups of four elements of an operand's rows are aligned, so that kernels can load four at once. */
static int is_vec4(const mfa_problem *p, const struct mfa_operand *operand, uint64_t offset)
{
    const mfa_layout *s = (const mfa_layout *)((const char *)p + operand->layout);
    const int64_t stride[3] = {s->batch, s->head, s->row};
    int64_t shape[4];
    mfa_operand_shape(operand, p, shape);
    for (int n = 0; n < 3; n++)
        if (shape[n] > 1 && stride[n] % 4 != 0)
            return 0;
    return s->column == 1 && offset % (4 * mfa_operand_element(operand, p)) == 0;
}

static mfa_int vec4(const mfa_problem *p, const mfa_buffers *buffers)
{
    mfa_int bits = 0;
    for (int n = 0; n < MFA_OPERAND_COUNT; n++)
        if (mfa_operand_role(&mfa_operands[n], p) &&
            is_vec4(p, &mfa_operands[n], mfa_operand_buffer(buffers, n)->offset))
            bits |= (mfa_int)1 << mfa_metal_source_buffer_of(n);
    return bits;
}

/* Rows are below 2^30, so a larger page is as good as one of 2^30. They are divided by a multiplication (Granlund and
 * Montgomery, Division by invariant integers using multiplication, PLDI'94): exact for numbers below 2^31. */
static void set_page_size(struct mfa_metal_call *call, int64_t page_size)
{
    const int64_t most = 1 << 30, size = page_size < most ? page_size : most;
    if (size == 0)
        return;
    while (INT64_C(1) << call->page_shift < size)
        call->page_shift++;
    call->page_multiplier = (INT64_C(1) << (31 + call->page_shift)) / size + 1;
    call->args.page_size = size;
}

static struct mfa_metal_call call_of(const mfa_problem *p, const struct mfa_choice *choice, const mfa_buffers *buffers)
{
    const double log2e = 1.4426950408889634074;
    struct mfa_metal_call call;
    memset(&call, 0, sizeof call);
    call.args = mfa_problem_args(p);
    if (p->kv_batch == 0 && (p->cache_batch_idx || p->page_size))
        call.args.kv_len = 0;
    if (p->lower > p->upper) /* no query attends to any key, nor does a block of them */
        call.args.lower = p->kv_len, call.args.upper = -p->q_len;
    set_page_size(&call, p->page_size);
    call.pack_gqa = call.args.q_heads_per_kv, call.splits = mfa_metal_tiling_of(choice).splits;
    call.present = present(p, buffers), call.vec4 = vec4(p, buffers);
    const double unit = p->pass == MFA_FORWARD ? log2e : 1;
    call.score_factor = (float)(p->softcap > 0 ? p->scale / p->softcap : p->scale * unit);
    call.cap_factor = (float)(p->softcap * unit);
    call.bias_factor = (float)unit;
    return call;
}

/* --- The list ------------------------------------------------------------------------------------- */

struct run {
    const mfa_problem *problem;
    const struct mfa_choice *choice;
    struct mfa_metal_call call;
    struct regions at;
    struct mfa_metal_dispatch *list;
    int count;
};

/* The next dispatch of the list, complete for a kernel without tiles. `table`: which block mask it makes or reads. */
static struct mfa_metal_dispatch *begin(const struct run *run, enum mfa_metal_kernel kernel, int table, int64_t groups)
{
    struct mfa_metal_dispatch *d = &run->list[run->count];
    const uint64_t offsets[] = {run->at.block_mask[table], run->at.partials, run->at.D, run->at.L};
    memset(d, 0, sizeof *d);
    d->kernel = kernel, d->groups = groups, d->call = run->call;
    d->threads = mfa_metal_dispatch_threads(kernel, &run->choice->key);
    const uint32_t buffers = mfa_metal_source_buffers(kernel, &run->choice->key);
    for (int n = MFA_METAL_BUFFER_BLOCK_MASK; n < MFA_METAL_BUFFERS; n++)
        if (buffers >> n & 1) {
            const int in_workspace = n < MFA_METAL_BUFFER_OPERAND;
            d->bindings[d->binding_count++] =
                (struct mfa_metal_binding){n, in_workspace ? -1 : mfa_metal_source_operand_of(n, run->problem->pass),
                                           in_workspace ? offsets[n - MFA_METAL_BUFFER_BLOCK_MASK] : 0};
        }
    return d;
}

/* Adds the dispatch to the list unless it has no threadgroups. `flop`: an estimate for one threadgroup. */
static void finish(struct run *run, struct mfa_metal_dispatch *d, double flop)
{
    const double most = 1 << 30, chunk = FLOP_OF_COMMAND / flop;
    d->chunk = chunk < GROUPS_OF_COMMAND ? GROUPS_OF_COMMAND : (int64_t)(chunk < most ? chunk : most);
    run->count += d->groups > 0;
}

/* The block mask, if the problem has a mask, and then the kernel that reads it. */
static void add_tiled(struct run *run, enum mfa_metal_kernel kernel, const struct mfa_metal_tile *tile, int table,
                      int64_t pack_gqa, struct mfa_metal_grid grid, double flop)
{
    const mfa_problem *p = run->problem;
    struct mfa_strides strides = {0, 0, 0, 0};
    struct mfa_metal_dispatch *d;
    if (p->mask != MFA_MASK_NONE) {
        const struct mfa_metal_grid t = block_mask_grid(p, tile, pack_gqa);
        strides.column = t.column > 1;
        strides.row = t.row > 1 ? t.column : 0;
        strides.head = t.head > 1 ? t.row * t.column : 0;
        strides.batch = t.batch > 1 ? t.head * t.row * t.column : 0;
        d = begin(run, MFA_METAL_BLOCK_MASK, table, ceil_of(groups_of(&t), ROWS_OF_GROUP));
        d->call.grid = t, d->call.pack_gqa = pack_gqa;
        d->call.block_q = tile->block_q, d->call.block_kv = tile->block_kv;
        finish(run, d, ROWS_OF_GROUP * tile->block_q * tile->block_kv);
    }
    d = begin(run, kernel, table, groups_of(&grid));
    d->call.grid = grid, d->call.pack_gqa = pack_gqa, d->call.block_mask = strides, d->call.splits = grid.column;
    d->call.block_q = tile->block_q, d->call.block_kv = tile->block_kv;
    finish(run, d, flop);
}

/* The most of `length` keys, or queries, that lie in the band of a block of `block` of the others. */
static double max_in_band(const mfa_problem *p, int64_t length, int64_t block)
{
    const double in_band = (double)p->upper - (double)p->lower + (double)block;
    return in_band < 1 ? 1 : in_band < (double)length ? in_band : (double)length;
}

/* What rows get that belong to no sequence: `rows` of them at most, in each of `batch` parts and of `heads`. */
static void add_unused(struct run *run, enum mfa_metal_kernel kernel, mfa_int written, int64_t batch, int64_t heads,
                       int64_t rows)
{
    const int64_t enough = ceil_of(ENOUGH_GROUPS, batch * heads > 0 ? batch * heads : 1);
    const int64_t all = ceil_of(rows, ROWS_OF_GROUP), parts = all < enough ? all : enough;
    const struct mfa_metal_grid grid = {batch, heads, parts, 1};
    struct mfa_metal_dispatch *d = begin(run, kernel, 0, groups_of(&grid));
    d->call.grid = grid, d->call.present &= written;
    finish(run, d, (double)(rows * (run->problem->head_dim + run->problem->value_dim)) / (double)(parts + 1));
}

static void list_unused_queries(struct run *run)
{
    const mfa_problem *p = run->problem;
    const mfa_int results = 1 << MFA_METAL_BUFFER_O | 1 << MFA_METAL_BUFFER_LSE | 1 << MFA_METAL_BUFFER_O_LOW;
    if (p->varlen_q)
        add_unused(run, MFA_METAL_UNUSED_QUERIES, p->pass == MFA_FORWARD ? results : 1 << MFA_METAL_BUFFER_DQ, 1,
                   p->q_heads, p->total_q);
}

static void list_unused_keys(struct run *run)
{
    const mfa_problem *p = run->problem;
    const int64_t entries = p->seqused_k || p->leftpad_k ? p->batch : 0;
    add_unused(run, MFA_METAL_UNUSED_KEYS, 1 << MFA_METAL_BUFFER_DK | 1 << MFA_METAL_BUFFER_DV, entries + p->varlen_kv,
               p->kv_heads, mfa_problem_kv_rows(p));
}

static void list_forward(struct run *run)
{
    const mfa_problem *p = run->problem;
    const enum mfa_metal_kernel kernel = mfa_metal_tiles_named(&run->choice->key);
    const struct mfa_metal_tile *tile = mfa_metal_tiles_find(kernel, &run->choice->key);
    const int64_t rows = q_heads_per_kv(p) * p->q_len, splits = mfa_metal_tiling_of(run->choice).splits;
    const double flop = 2.0 * tile->block_q * (double)(p->head_dim + p->value_dim) *
                        max_in_band(p, p->kv_len, tile->block_q) / (double)splits;
    add_tiled(run, kernel, tile, 0, q_heads_per_kv(p),
              (struct mfa_metal_grid){p->batch, p->kv_heads, ceil_of(rows, tile->block_q), splits}, flop);
    if (splits > 1) {
        struct mfa_metal_dispatch *d =
            begin(run, MFA_METAL_MERGE, 0, ceil_of(p->q_heads * queries_of(p), ROWS_OF_GROUP));
        finish(run, d, 4.0 * ROWS_OF_GROUP * (double)(splits * p->value_dim));
    }
    list_unused_queries(run);
}

static void list_bias(struct run *run)
{
    const mfa_problem *p = run->problem;
    const int64_t splits = mfa_metal_tiling_of(run->choice).splits, block = MFA_METAL_BIAS_BLOCK;
    const struct mfa_metal_grid tiles = bias_grid(p);
    const double rows = (double)ceil_of(p->q_len, block), columns = (double)ceil_of(p->kv_len, block);
    const double all = (double)(p->batch * p->q_heads) * rows * columns;
    struct mfa_metal_dispatch *d = begin(run, MFA_METAL_DBIAS, 0, groups_of(&tiles) * splits);
    d->call.grid = tiles;
    finish(run, d, 2.0 * (double)(block * block * (p->head_dim + p->value_dim)) * all / (double)(d->groups + 1));
    if (splits > 1) {
        d = begin(run, MFA_METAL_DBIAS_SUM, 0, groups_of(&tiles));
        d->call.grid = tiles;
        finish(run, d, (double)(block * block * splits));
    }
}

static void list_dsinks(struct run *run)
{
    const mfa_problem *p = run->problem;
    const struct mfa_metal_grid grid = {p->dsinks_layout.batch ? p->batch : 1, p->dsinks_layout.head ? p->q_heads : 1,
                                        1, 1};
    struct mfa_metal_dispatch *d = begin(run, MFA_METAL_DSINKS, 0, groups_of(&grid));
    d->call.grid = grid;
    finish(run, d, 4.0 * (double)(p->q_heads * queries_of(p)) / (double)(d->groups + 1));
}

static void list_backward(struct run *run, const mfa_buffers *buffers)
{
    const mfa_problem *p = run->problem;
    const struct mfa_key *key = &run->choice->key;
    const struct mfa_metal_tile *dq = mfa_metal_tiles_find(MFA_METAL_BACKWARD_DQ, key);
    const struct mfa_metal_tile *dkv = mfa_metal_tiles_find(MFA_METAL_BACKWARD_DKV, key);
    const double columns = (double)p->head_dim, values = (double)p->value_dim;
    struct mfa_metal_dispatch *d =
        begin(run, MFA_METAL_BACKWARD_PREPROCESS, 0, ceil_of(p->q_heads * queries_of(p), ROWS_OF_GROUP));
    finish(run, d, 2.0 * ROWS_OF_GROUP * values);
    if (buffers->dq.base)
        add_tiled(run, MFA_METAL_BACKWARD_DQ, dq, 0, q_heads_per_kv(p),
                  (struct mfa_metal_grid){p->batch, p->kv_heads, ceil_of(q_heads_per_kv(p) * p->q_len, dq->block_q), 1},
                  2.0 * dq->block_q * max_in_band(p, p->kv_len, dq->block_q) * (2 * columns + values));
    if (buffers->dk.base || buffers->dv.base)
        add_tiled(run, MFA_METAL_BACKWARD_DKV, dkv, 1, 1,
                  (struct mfa_metal_grid){p->batch, p->kv_heads, ceil_of(p->kv_len, dkv->block_kv), 1},
                  4.0 * dkv->block_kv * (double)q_heads_per_kv(p) * max_in_band(p, p->q_len, dkv->block_kv) *
                      (columns + values));
    if (buffers->dq.base)
        list_unused_queries(run);
    if (buffers->dk.base || buffers->dv.base)
        list_unused_keys(run);
    if (buffers->dbias.base)
        list_bias(run);
    if (buffers->dsinks.base)
        list_dsinks(run);
}

int mfa_metal_dispatch_list(const mfa_problem *problem, const struct mfa_choice *choice, const mfa_buffers *buffers,
                            struct mfa_metal_dispatch list[MFA_METAL_DISPATCHES])
{
    struct run run = {.problem = problem, .choice = choice, .list = list};
    run.call = call_of(problem, choice, buffers);
    run.at = lay_out(problem, choice);
    if (problem->pass == MFA_FORWARD)
        list_forward(&run);
    else
        list_backward(&run, buffers);
    return run.count;
}
