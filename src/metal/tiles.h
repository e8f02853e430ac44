/* The tile for each problem and GPU family: a table, and the values derived from it. */
#ifndef MFA_METAL_TILES_H
#define MFA_METAL_TILES_H

#include <stdint.h>
#include <string.h>

#include "core/backend.h"
#include "mfa.h"

enum mfa_metal_kernel {
    MFA_METAL_FORWARD,
    MFA_METAL_DECODE,
    MFA_METAL_DECODE_VECTOR,
    MFA_METAL_MERGE,
    MFA_METAL_BACKWARD_PREPROCESS,
    MFA_METAL_BACKWARD_DQ,
    MFA_METAL_BACKWARD_DKV,
    MFA_METAL_DBIAS,
    MFA_METAL_DBIAS_SUM,
    MFA_METAL_DSINKS,
    MFA_METAL_BLOCK_MASK,
    MFA_METAL_UNUSED_QUERIES,
    MFA_METAL_UNUSED_KEYS,
    MFA_METAL_LAYOUT_TEST,
    MFA_METAL_KERNELS
};

/* How a problem is divided among threadgroups, beside the tiles that follow from the kernel's key. */
struct mfa_metal_tiling {
    int64_t splits; /* parts of the range that a row of O, or an element of dbias, is summed over; 1 or more */
};

_Static_assert(sizeof(struct mfa_metal_tiling) <= sizeof(struct mfa_tiling), "mfa_choice has room for the tiling");

static inline struct mfa_metal_tiling mfa_metal_tiling_of(const struct mfa_choice *choice)
{
    struct mfa_metal_tiling tiling;
    memcpy(&tiling, choice->tiling.bytes, sizeof tiling);
    return tiling;
}

#define MFA_METAL_BIAS_BLOCK 32 /* rows and columns of a tile of dbias: BLOCK of kernels/attention_dbias.metal */

/* How a kernel divides its work. Its threadgroup has row_groups * split * key_groups simdgroups
 * (kernels/simdgroup.h). */
struct mfa_metal_tile {
    int16_t block_q, block_kv;
    int8_t row_groups, split, key_groups;
    int8_t shared; /* the two operands loaded as tiles share the memory of one tile */
};

/* GPU families that have rows of their own, as numbers of MTLGPUFamilyApple: the one to use for a device of `family`;
 * 0 if it is too old (simdgroup matrices came with 7, the M1). */
int mfa_metal_tiles_family(int family);

/* The family of a key; 0 if its machine is not a Metal GPU. */
int mfa_metal_tiles_family_of(const struct mfa_key *key);

/* The kernel whose tile a key names: forward, one of decode or dQ. */
enum mfa_metal_kernel mfa_metal_tiles_named(const struct mfa_key *key);

/* The row for a kernel that has tiles: forward, both of decode, dQ, dK and dV. NULL for another kernel, or if there is
 * none. */
const struct mfa_metal_tile *mfa_metal_tiles_find(enum mfa_metal_kernel kernel, const struct mfa_key *key);

/* Columns that a tile of this split has for `dim`: whole fragments for each simdgroup. */
int32_t mfa_metal_tiles_columns(const struct mfa_metal_tile *tile, int64_t dim);

/* Threads of a threadgroup, and bytes of its threadgroup memory: [0] the tiles, [1] the partial sums that simdgroups
 * exchange. */
int32_t mfa_metal_tiles_threads(const struct mfa_metal_tile *tile);
void mfa_metal_tiles_memory(enum mfa_metal_kernel kernel, const struct mfa_metal_tile *tile, const struct mfa_key *key,
                            int32_t bytes[2]);

/* Whether the kernels support a canonical problem: MFA_OK, or MFA_UNSUPPORTED and a sentence. */
mfa_status mfa_metal_tiles_supports(const mfa_problem *problem);

/* Chooses the key and the tiling, all but the workspace. `family` is one with rows of its own. */
void mfa_metal_tiles_choose(int family, const mfa_problem *problem, struct mfa_choice *choice);

/* Changes the choice to tiles with half the threads, for a device that cannot run these; it may have them already. */
void mfa_metal_tiles_halve(const mfa_problem *problem, struct mfa_choice *choice);

#endif
