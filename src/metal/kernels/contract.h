/* The arguments of every kernel of the Metal backend, and the order in which buffers are bound. C, MSL and CUDA compile
 * this text alike.
 *
 * Buffer 0 is the call, 1 to 4 are parts of the workspace, and 5 is the counter of the tests:
 *     1 block mask, 2 partial results, 3 row sums D, 4 L for the backward pass, 5 visited blocks
 * Threadgroup memory is not an argument: kernels declare theirs, and the host sets no length.
 * Buffer 6 + n is the operand n of core/operands.inc; those that C or the kernels' code name stand below. Metal has 31
 * buffers, one too few: k_scale and v_scale, which only the forward pass has, take the places of dk and dv. */
#ifndef MFA_METAL_KERNELS_CONTRACT_H
#define MFA_METAL_KERNELS_CONTRACT_H

#include "core/args.h"

#define MFA_METAL_BUFFER_CALL 0
#define MFA_METAL_BUFFER_BLOCK_MASK 1 /* the first of the workspace */
#define MFA_METAL_BUFFER_PARTIALS 2
#define MFA_METAL_BUFFER_D 3
#define MFA_METAL_BUFFER_L 4
#define MFA_METAL_BUFFER_VISITED 5
#define MFA_METAL_BUFFER_OPERAND 6 /* the first of them */
#define MFA_METAL_BUFFER_Q 6
#define MFA_METAL_BUFFER_K 7
#define MFA_METAL_BUFFER_V 8
#define MFA_METAL_BUFFER_O 10
#define MFA_METAL_BUFFER_LSE 11
#define MFA_METAL_BUFFER_DO 12
#define MFA_METAL_BUFFER_DLSE 13
#define MFA_METAL_BUFFER_DQ 14
#define MFA_METAL_BUFFER_DK 15
#define MFA_METAL_BUFFER_DV 16
#define MFA_METAL_BUFFER_K_SCALE MFA_METAL_BUFFER_DK
#define MFA_METAL_BUFFER_V_SCALE MFA_METAL_BUFFER_DV
#define MFA_METAL_BUFFER_O_LOW 18
#define MFA_METAL_BUFFER_SINKS 20
#define MFA_METAL_BUFFER_DSINKS 21

/* The block mask: what the mask leaves of each block of block_q rows x block_kv keys, one byte a block. */
#define MFA_METAL_BLOCK_EMPTY 0   /* the mask excludes every score: the block is not visited */
#define MFA_METAL_BLOCK_PARTIAL 1 /* the mask is applied to each score */
#define MFA_METAL_BLOCK_FULL 2    /* the mask changes no score, and is not read again */

/* The grid of a pass, one threadgroup each; `column` runs fastest. */
struct mfa_metal_grid {
    mfa_int batch, head, row, column;
};

struct mfa_metal_call {
    struct mfa_args args;
    struct mfa_metal_grid grid;
    mfa_int first_group;                 /* number, in that grid, of this dispatch's first threadgroup */
    mfa_int block_q, block_kv;           /* of the kernel that visits the blocks */
    mfa_int page_multiplier, page_shift; /* the page of row n: mulhi(2 n, multiplier) >> shift */
    mfa_int pack_gqa;              /* query heads packed into rows: row r is query r / pack_gqa of head r % pack_gqa */
    mfa_int splits;                /* parts of the range that each row, or element of dbias, is summed over */
    struct mfa_strides block_mask; /* of that table: 0 along dimensions on which the mask does not depend */
    mfa_int vec4;                  /* bit n: four neighbouring elements of a row of buffer n can be loaded at once */
    mfa_int present;               /* bit n: the operand of buffer n is given */
    /* Scores are in units of log 2 in the forward pass, and as they are in the backward pass. */
    float score_factor; /* Q K^T times this is the score; with a softcap, the argument of tanh */
    float cap_factor;   /* tanh times this is the score */
    float bias_factor;  /* an additive mask times this is added to the score */
};

#endif
