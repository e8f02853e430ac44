/* The number of blocks that are not EMPTY nor hidden, counted element by element from the definition. */
#include <math.h>
#include <string.h>

#include "core/problem.h"
#include "metal/run.h"
#include "reference/attention.h"

/* Rows of queries and keys of a block: row r is query r / pack_gqa of head first_head + r % pack_gqa. */
struct extent {
    struct reference_sequence seq;
    int64_t batch, first_head, pack_gqa, row, rows, key, keys;
};

static int mask_keeps(const struct inputs *inputs, int64_t batch, int64_t head, int64_t i, int64_t key)
{
    const mfa_problem *p = &inputs->problem;
    if (p->mask == MFA_MASK_NONE)
        return 1;
    const struct reference_view view = reference_view(p, REFERENCE_MASK, inputs->values[REFERENCE_MASK]);
    const double value = view.values[batch * view.batch + head * view.head + i * view.row + key * view.column];
    return p->mask == MFA_MASK_BOOL ? value != 0 : value != -INFINITY;
}

static int block_is_nonempty(const struct inputs *inputs, const struct extent *e)
{
    const struct reference_view view =
        reference_view(&inputs->problem, REFERENCE_BLOCK_MAP, inputs->values[REFERENCE_BLOCK_MAP]);
    int band = 0, mask = 0, map = 0;
    for (int64_t r = e->row; r < e->row + e->rows; r++) {
        int64_t first, end;
        reference_band(&e->seq, r / e->pack_gqa, &first, &end);
        band |= first < e->key + e->keys && end > e->key && first < end;
        for (int64_t j = e->key; j < e->key + e->keys && !mask; j++)
            mask = mask_keeps(inputs, e->batch, e->first_head + r % e->pack_gqa, r / e->pack_gqa, j);
        for (int64_t j = e->key; j < e->key + e->keys && !map; j++)
            map = reference_is_mapped(&inputs->problem, &view, e->batch, e->first_head + r % e->pack_gqa,
                                      r / e->pack_gqa, j);
    }
    return band && mask && map;
}

static int64_t count_blocks(const struct inputs *inputs, const struct operands *operands,
                            const struct mfa_metal_tile *tile, int64_t pack_gqa)
{
    const mfa_problem *p = &inputs->problem;
    int64_t count = 0;
    struct extent e = {.pack_gqa = pack_gqa};
    for (e.batch = 0; e.batch < p->batch; e.batch++) {
        e.seq = reference_sequence(&operands->problem, &operands->buffers, e.batch);
        const int64_t rows = e.seq.q_len * pack_gqa, keys = e.seq.kv_len;
        for (e.first_head = 0; e.first_head < p->q_heads; e.first_head += pack_gqa)
            for (e.row = 0; e.row < rows; e.row += tile->block_q)
                for (e.key = 0; e.key < keys; e.key += tile->block_kv) {
                    e.rows = rows - e.row < tile->block_q ? rows - e.row : tile->block_q;
                    e.keys = keys - e.key < tile->block_kv ? keys - e.key : tile->block_kv;
                    count += block_is_nonempty(inputs, &e);
                }
    }
    return count;
}

void metal_expect(const struct inputs *inputs, const struct operands *operands, struct metal_target target,
                  int64_t expected[MFA_METAL_KERNELS])
{
    const int32_t pass = operands->problem.pass;
    mfa_problem p = inputs->problem;
    struct mfa_choice choice;
    p.pass = pass;
    if (mfa_problem_check(&p, &p) != MFA_OK)
        return;
    metal_choose(target, &p, &choice);
    const int64_t group = p.kv_heads ? p.q_heads / p.kv_heads : 1;
    static const enum mfa_metal_kernel kernels[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_DECODE_VECTOR,
                                                    MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV};
    memset(expected, 0, MFA_METAL_KERNELS * sizeof *expected);
    for (size_t n = 0; n < sizeof kernels / sizeof *kernels; n++)
        if ((kernels[n] >= MFA_METAL_BACKWARD_DQ) == (pass == MFA_BACKWARD))
            expected[kernels[n]] = count_blocks(inputs, operands, mfa_metal_tiles_find(kernels[n], &choice.key),
                                                kernels[n] == MFA_METAL_BACKWARD_DKV ? 1 : group);
}
