/* Which tiles for which problem: a table, and what follows from it. */
#ifndef MFA_CPU_TILES_H
#define MFA_CPU_TILES_H

#include <string.h>

#include "core/backend.h"
#include "cpu/device.h"
#include "cpu/kernels/contract.h"

#define MFA_CPU_ENOUGH_TASKS 32 /* enough to balance any expected number of threads */
#define MFA_CPU_SPLIT_KEYS 512  /* minimum number of keys of a split */

/* How a problem is divided into tasks, beside the variant, which the kernel's key names. */
struct mfa_cpu_tiling {
    int64_t splits;   /* forward: parts that the keys of a chunk are divided into, 1 or more */
    int32_t block_kv; /* keys of a block: as many as the kernel's key says, or fewer where there would be few tasks */
    int32_t panels;   /* panels of queries that share one load of a block of K and V */
};

_Static_assert(sizeof(struct mfa_cpu_tiling) <= sizeof(struct mfa_tiling), "mfa_choice has room for the tiling");

static inline struct mfa_cpu_tiling mfa_cpu_tiling_of(const struct mfa_choice *choice)
{
    struct mfa_cpu_tiling tiling;
    memcpy(&tiling, choice->tiling.bytes, sizeof tiling);
    return tiling;
}

/* Tiled, or decode where the queries are so few that the set has those kernels for them. */
enum mfa_variant mfa_cpu_tiles_variant(const struct mfa_cpu_kernels *kernels, const mfa_problem *problem);

/* Makes the key, the tiling and the number of threads of a choice, but not the sizes of its workspace. They depend on
 * the problem and the instruction set; panels, which no result depends on, also on choice->threads. That comes in as
 * the number of threads allowed, and goes out as the number that this problem is worth. */
void mfa_cpu_tiles_choose(mfa_cpu_isa isa, const struct mfa_cpu_kernels *kernels, enum mfa_variant variant,
                          const mfa_problem *problem, struct mfa_choice *choice);

#endif
