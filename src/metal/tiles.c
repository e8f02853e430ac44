#include "metal/tiles.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "core/problem.h"

/* The table, and where its numbers come from. A row is for head_dim and value_dim up to `dim`; the first that fits
 * is taken.
 *
 * Registers are the limit. An 8 x 8 fragment of f32 takes 2 registers of a lane, one of f16 or bf16 takes 1; a lane
 * has about 100 before a core runs out of threads (208 KB of registers). What a simdgroup holds, per 8 columns of
 * its slice, is Q and O forward, Q dO dQ for dQ, K V dK dV for dK and dV, beside S (and dP) of a tile. So a slice
 * is at most 128 columns forward, 128 (f32: 64) for dQ, 64 for dK and dV; wider heads are split over simdgroups,
 * where metal-flash-attention spills registers to memory (its tables cache O to 96 or 128 columns on M1, to 160 on
 * M3).
 *
 * Rows: 4 simdgroups of 8, as MLX and vllm-metal have it; of 16 up to 64 columns forward, where registers hold them:
 * each fragment of K and V that is loaded then serves two products. Half as many where slices make many simdgroups of
 * these, for all simdgroups of a threadgroup run on one core.
 *
 * Tiles of 32 keys up to 64 columns and 16 up to 128 as in MLX (on M3 and later 32, as in mlx-mfa); beyond, as many
 * as fit into 32 KB of threadgroup memory with the exchange of a split. f32 above 256 columns fits only if K and V
 * share a tile.
 *
 * K and V are read through tiles on every GPU. Metal-flash-attention reads them directly from M3 on; with tiles in
 * pairs of rows that would save the stores, barriers and checks of load_tile, 0.3 instructions a product by the count,
 * and cost as many: a load more for each two fragments of K^T, and an address that no constant offset reaches for each.
 *
 * Decode: simdgroups take different keys, unless columns are split; 64 keys a tile, so that barriers are few. The
 * vector kernel, for one or two rows, has no tiles: its blocks are those of the block mask. By the instruction count
 * it takes 17 cycles a key of a core for one row of 128 columns, 22 for two, and the matrices 26 for up to 8.
 *
 * Each row also has a tile with half the simdgroups, and 8 rows in each: half the rows or fewer, or half of decode's
 * keys. It is for a device on which a pipeline of the first has too few threads, and for problems with so few rows that
 * half of the first tile's would be idle. */
static const struct row {
    int8_t family; /* and later ones, up to the next family that has rows */
    int8_t kernel;
    int8_t element; /* bytes */
    int16_t dim;
    struct mfa_metal_tile tiles[2]; /* block_q, block_kv; simdgroups by rows, slices and keys; shared */
} rows[] = {
    {7, MFA_METAL_FORWARD, 2, 64, {{64, 32, 4, 1, 1, 0}, {16, 32, 2, 1, 1, 0}}},
    {7, MFA_METAL_FORWARD, 2, 128, {{32, 16, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_FORWARD, 2, 256, {{32, 16, 4, 2, 1, 0}, {16, 16, 2, 2, 1, 0}}},
    {7, MFA_METAL_FORWARD, 2, 512, {{16, 8, 2, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_FORWARD, 4, 64, {{64, 16, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_FORWARD, 4, 128, {{32, 16, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_FORWARD, 4, 256, {{32, 8, 4, 2, 1, 0}, {16, 8, 2, 2, 1, 0}}},
    {7, MFA_METAL_FORWARD, 4, 512, {{16, 8, 2, 4, 1, 1}, {8, 8, 1, 4, 1, 1}}},

    {7, MFA_METAL_DECODE, 2, 64, {{8, 64, 1, 1, 4, 0}, {8, 32, 1, 1, 2, 0}}},
    {7, MFA_METAL_DECODE, 2, 128, {{8, 32, 1, 1, 4, 0}, {8, 16, 1, 1, 2, 0}}},
    {7, MFA_METAL_DECODE, 2, 256, {{8, 16, 1, 2, 2, 0}, {8, 8, 1, 2, 1, 0}}},
    {7, MFA_METAL_DECODE, 2, 512, {{8, 8, 1, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_DECODE, 4, 64, {{8, 32, 1, 1, 4, 0}, {8, 16, 1, 1, 2, 0}}},
    {7, MFA_METAL_DECODE, 4, 128, {{8, 16, 1, 2, 2, 0}, {8, 8, 1, 2, 1, 0}}},
    {7, MFA_METAL_DECODE, 4, 256, {{8, 8, 1, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_DECODE, 4, 512, {{8, 8, 1, 4, 1, 1}, {8, 8, 1, 4, 1, 1}}},

    {7, MFA_METAL_DECODE_VECTOR, 2, 256, {{2, 64, 1, 1, 8, 0}, {2, 32, 1, 1, 4, 0}}},
    {7, MFA_METAL_DECODE_VECTOR, 2, 512, {{2, 64, 1, 1, 4, 0}, {2, 32, 1, 1, 2, 0}}},
    {7, MFA_METAL_DECODE_VECTOR, 4, 256, {{2, 64, 1, 1, 8, 0}, {2, 32, 1, 1, 4, 0}}},
    {7, MFA_METAL_DECODE_VECTOR, 4, 512, {{2, 64, 1, 1, 4, 0}, {2, 32, 1, 1, 2, 0}}},

    {7, MFA_METAL_BACKWARD_DQ, 2, 64, {{32, 32, 4, 1, 1, 0}, {16, 32, 2, 1, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 2, 128, {{32, 16, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 2, 256, {{32, 16, 4, 2, 1, 0}, {16, 16, 2, 2, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 2, 512, {{16, 8, 2, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 4, 64, {{32, 16, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 4, 128, {{32, 8, 4, 2, 1, 0}, {16, 8, 2, 2, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 4, 256, {{16, 8, 2, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DQ, 4, 512, {{16, 8, 2, 8, 1, 1}, {8, 8, 1, 8, 1, 1}}},

    {7, MFA_METAL_BACKWARD_DKV, 2, 64, {{32, 32, 4, 1, 1, 0}, {32, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 2, 128, {{16, 32, 4, 2, 1, 0}, {16, 16, 2, 2, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 2, 256, {{16, 16, 2, 4, 1, 0}, {16, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 2, 512, {{8, 16, 2, 8, 1, 0}, {8, 8, 1, 8, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 4, 64, {{16, 32, 4, 1, 1, 0}, {16, 16, 2, 1, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 4, 128, {{8, 32, 4, 2, 1, 0}, {8, 16, 2, 2, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 4, 256, {{8, 16, 2, 4, 1, 0}, {8, 8, 1, 4, 1, 0}}},
    {7, MFA_METAL_BACKWARD_DKV, 4, 512, {{8, 16, 2, 8, 1, 1}, {8, 8, 1, 8, 1, 1}}},

    {9, MFA_METAL_FORWARD, 2, 64, {{64, 32, 4, 1, 1, 0}, {16, 32, 2, 1, 1, 0}}},
    {9, MFA_METAL_FORWARD, 2, 128, {{32, 32, 4, 1, 1, 0}, {16, 32, 2, 1, 1, 0}}},
};

static const int8_t families[] = {9, 7}; /* that have rows, newest first */

#define ENOUGH_GROUPS 256 /* threadgroups that keep every core of the largest GPU busy */
#define SPLIT_KEYS 256    /* the fewest keys of a split */

int mfa_metal_tiles_family(int family)
{
    for (size_t n = 0; n < sizeof families; n++)
        if (family >= families[n])
            return families[n];
    return 0;
}

int mfa_metal_tiles_family_of(const struct mfa_key *key)
{
    for (size_t n = 0; n < sizeof families; n++) {
        char machine[sizeof key->machine];
        snprintf(machine, sizeof machine, "apple%d", families[n]);
        if (!strncmp(machine, key->machine, sizeof machine))
            return families[n];
    }
    return 0;
}

static int64_t wider(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t ceil_of(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit;
}

/* Bytes of an element of a tile: of codes it holds f32 (kernels/codes.h). */
static int32_t tile_element(const struct mfa_key *key)
{
    return key->k_type || key->v_type ? 4 : (int32_t)mfa_dtype_size(key->dtype);
}

static const struct row *find_row(enum mfa_metal_kernel kernel, const struct mfa_key *key)
{
    const int family = mfa_metal_tiles_family_of(key);
    const int64_t dim = wider(key->head_dim, key->value_dim);
    for (size_t f = 0; f < sizeof families; f++)
        for (size_t n = 0; n < sizeof rows / sizeof *rows && families[f] <= family; n++) {
            const struct row *row = &rows[n];
            if (row->family == families[f] && row->kernel == (int)kernel && dim <= row->dim &&
                row->element == tile_element(key))
                return row;
        }
    return NULL;
}

enum mfa_metal_kernel mfa_metal_tiles_named(const struct mfa_key *key)
{
    if (key->pass == MFA_BACKWARD)
        return MFA_METAL_BACKWARD_DQ;
    if (key->variant == MFA_VARIANT_DECODE_VECTOR)
        return MFA_METAL_DECODE_VECTOR;
    return key->variant == MFA_VARIANT_DECODE ? MFA_METAL_DECODE : MFA_METAL_FORWARD;
}

const struct mfa_metal_tile *mfa_metal_tiles_find(enum mfa_metal_kernel kernel, const struct mfa_key *key)
{
    const struct row *row = find_row(kernel, key);
    if (!row)
        return NULL;
    const struct mfa_metal_tile *whole = &find_row(mfa_metal_tiles_named(key), key)->tiles[0];
    const int halved =
        (0 < key->block_q && key->block_q < whole->block_q) || (0 < key->block_kv && key->block_kv < whole->block_kv);
    return &row->tiles[halved];
}

int32_t mfa_metal_tiles_columns(const struct mfa_metal_tile *tile, int64_t dim)
{
    return (int32_t)(ceil_of(dim, (int64_t)8 * tile->split) * 8 * tile->split);
}

int32_t mfa_metal_tiles_threads(const struct mfa_metal_tile *tile)
{
    return 32 * tile->row_groups * tile->split * tile->key_groups;
}

void mfa_metal_tiles_memory(enum mfa_metal_kernel kernel, const struct mfa_metal_tile *tile, const struct mfa_key *key,
                            int32_t bytes[2])
{
    const int32_t fragment = 32 * 8; /* bytes of a fragment of f32 */
    const int32_t element = tile_element(key), simdgroups = mfa_metal_tiles_threads(tile) / 32;
    const int32_t tile_rows = kernel == MFA_METAL_BACKWARD_DKV ? tile->block_q : tile->block_kv;
    const int32_t E = mfa_metal_tiles_columns(tile, key->value_dim);
    const int32_t first = tile_rows * (mfa_metal_tiles_columns(tile, key->head_dim) * element + 16);
    const int32_t second = tile_rows * (E * element + 16);
    if (kernel == MFA_METAL_DECODE_VECTOR) { /* m, l and O of each simdgroup's rows */
        bytes[0] = (int32_t)ceil_of((int64_t)tile->key_groups * tile->block_q * (E + 2) * 4, 16) * 16;
        bytes[1] = 16;
        return;
    }
    bytes[0] = tile->shared ? (int32_t)wider(first, second) : first + second;
    if (tile->key_groups > 1) { /* attention_decode merges its simdgroups' results there at the end */
        const int32_t O = (tile->key_groups - 1) * E / 8;
        bytes[0] = (int32_t)wider(bytes[0], (int64_t)(simdgroups + O) * fragment);
    }
    const int32_t scores = tile_rows / tile->key_groups / 8 * (kernel >= MFA_METAL_BACKWARD_DQ ? 2 : 1);
    bytes[1] = tile->split > 1 ? simdgroups * scores * fragment : 16;
}

/* Rows of packed tensors and entries of a cache. */
static mfa_status supports_places(const mfa_problem *p)
{
    const struct {
        const char *name;
        int64_t value;
    } all[] = {{"total_q", p->total_q}, {"total_kv", p->total_kv}, {"kv_batch", p->kv_batch}, {"batch", p->batch}};
    for (size_t n = 0; n < sizeof all / sizeof *all && mfa_problem_is_varlen(p); n++)
        if (all[n].value > 1 << 30)
            return mfa_fail(MFA_UNSUPPORTED, "%s is %lld; Metal kernels exist for up to 2^30", all[n].name,
                            (long long)all[n].value);
    return MFA_OK;
}

/* Lengths and numbers of rows of a KV head, and the numbers of all rows, keys, blocks and sinks, which kernels count in
 * 32 bits. A grid has at most one threadgroup for 8 keys, for 4 of the others, or for a sink; with packed queries, one
 * for 8 of as many as an entry may have. */
static mfa_status supports_sizes(const mfa_problem *p)
{
    const double most = 0x1p30, q_len = (double)p->q_len, kv_len = (double)p->kv_len;
    const double q_heads = (double)p->batch * (double)p->q_heads, kv_heads = (double)p->batch * (double)p->kv_heads;
    if (p->kv_heads > 0 && (double)p->q_heads / (double)p->kv_heads * q_len > most)
        return mfa_fail(MFA_UNSUPPORTED,
                        "q_len is %lld; Metal kernels exist for up to 2^30 queries of a KV head's group",
                        (long long)p->q_len);
    if (kv_len > most)
        return mfa_fail(MFA_UNSUPPORTED, "kv_len is %lld; Metal kernels exist for up to 2^30", (long long)p->kv_len);
    const double blocks = p->mask == MFA_MASK_NONE ? 0 : q_heads * (q_len / 8 + 1) * (kv_len / 8 + 1);
    const double packed = (double)p->q_heads * (double)p->total_q, least = q_heads * (q_len / 8 + 1);
    const double queries = !p->varlen_q ? q_heads * q_len : packed > least ? packed : least;
    if (queries > 0x1p31 || kv_heads * kv_len > 0x1p31 || blocks > 0x1p31 || (p->sinks && q_heads > 0x1p31))
        return mfa_fail(
            MFA_UNSUPPORTED,
            "batch is %lld; Metal kernels exist for up to 2^31 queries, keys, sinks and blocks of a mask in all",
            (long long)p->batch);
    return supports_places(p);
}

mfa_status mfa_metal_tiles_supports(const mfa_problem *p)
{
    if (p->dtype == MFA_F64)
        return mfa_fail(MFA_UNSUPPORTED, "dtype is f64; Metal kernels exist for f32, f16 and bf16");
    if (p->mask == MFA_MASK_ADDITIVE && p->mask_dtype == MFA_F64)
        return mfa_fail(MFA_UNSUPPORTED, "mask_dtype is f64; Metal kernels exist for f32, f16 and bf16");
    const double size = fabs(p->scale); /* the factor of the product of Q and K */
    if (size != 0 && !(size >= 0x1p-100 && size <= 0x1p100))
        return mfa_fail(MFA_UNSUPPORTED, "scale is %g; Metal kernels exist for 0 and, of either sign, 2^-100 to 2^100",
                        p->scale);
    if (p->softcap > 0 && size / p->softcap > 0x1p60)
        return mfa_fail(MFA_UNSUPPORTED, "softcap is %g and scale %g; Metal kernels exist for quotients up to 2^60",
                        p->softcap, p->scale);
    return supports_sizes(p);
}

/* Rows of queries that share a KV head. */
static int64_t rows_of_head(const mfa_problem *p)
{
    return p->kv_heads > 0 ? p->q_heads / p->kv_heads * p->q_len : 0;
}

/* A forward problem is a decode step if its rows fit into one block of one of these kernels. */
static int variant_of(const mfa_problem *p)
{
    if (p->pass == MFA_BACKWARD || p->kv_heads == 0 || rows_of_head(p) > 8)
        return MFA_VARIANT_TILED;
    return rows_of_head(p) > 2 ? MFA_VARIANT_DECODE : MFA_VARIANT_DECODE_VECTOR;
}

/* Parts that a sum over `steps` is split into, so that there are enough threadgroups. */
static int64_t parts_of(int64_t groups, int64_t steps)
{
    const int64_t wanted = groups > 0 ? ceil_of(ENOUGH_GROUPS, groups) : 1;
    return wider(1, wanted < steps ? wanted : steps);
}

/* Splits of each row's keys. */
static int64_t splits_of_keys(const mfa_problem *p, const struct mfa_key *key)
{
    const struct mfa_metal_tile *tile = mfa_metal_tiles_find(mfa_metal_tiles_named(key), key);
    const int64_t heads = p->batch * p->kv_heads, in_band = p->upper - p->lower + p->q_len;
    const int64_t keys = in_band < p->kv_len ? in_band : p->kv_len;
    return parts_of(heads * ceil_of(rows_of_head(p), tile->block_q), keys / SPLIT_KEYS);
}

/* Splits of the sum of an element of dbias. */
static int64_t splits_of_bias(const mfa_problem *p)
{
    const mfa_layout *s = &p->dbias_layout;
    const int64_t size[4] = {p->batch, p->q_heads, ceil_of(p->q_len, MFA_METAL_BIAS_BLOCK),
                             ceil_of(p->kv_len, MFA_METAL_BIAS_BLOCK)};
    const int64_t stride[4] = {s->batch, s->head, s->row, s->column};
    int64_t tiles = 1, steps = 1;
    for (int n = 0; n < 4; n++) {
        int64_t *product = stride[n] ? &tiles : &steps;
        if (__builtin_mul_overflow(*product, size[n], product))
            *product = INT64_MAX;
    }
    return p->mask == MFA_MASK_ADDITIVE ? parts_of(tiles, steps) : 1;
}

static void take_tile(const mfa_problem *p, const struct mfa_metal_tile *tile, struct mfa_choice *choice)
{
    choice->key.block_q = tile->block_q, choice->key.block_kv = tile->block_kv;
    const struct mfa_metal_tiling tiling = {.splits = p->pass == MFA_FORWARD ? splits_of_keys(p, &choice->key)
                                                                             : splits_of_bias(p)};
    memcpy(choice->tiling.bytes, &tiling, sizeof tiling);
}

void mfa_metal_tiles_halve(const mfa_problem *p, struct mfa_choice *choice)
{
    take_tile(p, &find_row(mfa_metal_tiles_named(&choice->key), &choice->key)->tiles[1], choice);
}

void mfa_metal_tiles_choose(int family, const mfa_problem *p, struct mfa_choice *choice)
{
    struct mfa_key *key = &choice->key;
    memset(choice, 0, sizeof *choice);
    key->pass = p->pass, key->dtype = p->dtype;
    key->variant = variant_of(p);
    key->head_dim = (int32_t)ceil_of(p->head_dim, 8) * 8, key->value_dim = (int32_t)ceil_of(p->value_dim, 8) * 8;
    key->features = mfa_key_features(p), key->mask_dtype = p->mask_dtype;
    key->k_type = p->k_type, key->v_type = p->v_type;
    snprintf(key->machine, sizeof key->machine, "apple%d", family);
    const struct row *row = find_row(mfa_metal_tiles_named(key), key);
    const int half_is_idle =
        p->pass == MFA_FORWARD && key->variant == MFA_VARIANT_TILED && rows_of_head(p) <= row->tiles[0].block_q / 2;
    take_tile(p, &row->tiles[half_is_idle], choice);
    choice->threads = 1;
}
