/* Which tile for which problem. */
#ifndef MFA_CPU_TILES_H
#define MFA_CPU_TILES_H

#include <string.h>

#include "core/backend.h"
#include "cpu/device.h"
#include "cpu/kernels/contract.h"

enum mfa_cpu_variant {
    MFA_CPU_TILED, /* forward, backward */
    MFA_CPU_DECODE /* decode, decode_backward: for few queries */
};

/* How a problem is divided into tasks. */
struct mfa_cpu_tiling {
    int64_t splits;   /* forward: parts that the keys of a chunk are divided into, 1 or more */
    int32_t block_kv; /* keys of a block: as many as the kernel's key says, or fewer where there would be few tasks */
    int32_t panels;   /* panels of queries that share one load of a block of K and V */
    enum mfa_cpu_variant variant;
};

_Static_assert(sizeof(struct mfa_cpu_tiling) <= sizeof(struct mfa_tiling), "mfa_choice has room for the tiling");

static inline struct mfa_cpu_tiling mfa_cpu_tiling_of(const struct mfa_choice *choice)
{
    struct mfa_cpu_tiling tiling;
    memcpy(&tiling, choice->tiling.bytes, sizeof tiling);
    return tiling;
}

/* Makes the key, the tiling and the number of threads of a choice, but not the sizes of its workspace. Key and tiling depend on the problem and the
 * instruction set, except that choice->threads, which comes in as the number of threads allowed, may change
 * `panels`; no result depends on it. It goes out as the number of threads that this problem is worth. */
void mfa_cpu_tiles_choose(mfa_cpu_isa isa, const struct mfa_cpu_kernels *kernels, const mfa_problem *problem,
                          struct mfa_choice *choice);

#endif
