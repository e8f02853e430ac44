/* Which tile for which problem. */
#ifndef MFA_CPU_TILES_H
#define MFA_CPU_TILES_H

#include "core/backend.h"
#include "cpu/device.h"
#include "cpu/kernels/contract.h"

enum { /* of choice->cut */
       MFA_CPU_BLOCK,  /* keys of a block: as many as the key says, or fewer where tasks would be few */
       MFA_CPU_SPLITS, /* forward: parts that the keys of a chunk are cut into */
       MFA_CPU_PANELS, /* of queries that share one visit of K and V */
       MFA_CPU_DECODE     /* 0 or 1: by the kernels for few queries */
};

/* The key, and the cut of the problem into tasks. Looks at the problem and the instruction set only, never at
 * threads: results must not depend on them. choice->threads comes in as the most there may be, and goes
 * out as the most that this problem is worth. */
void mfa_cpu_tiles_choose(mfa_cpu_isa isa, const struct mfa_cpu_kernels *kernels, const mfa_problem *problem,
                          struct mfa_choice *choice);

#endif
