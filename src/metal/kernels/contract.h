/* What the host tells every kernel of the Metal room, and in which order buffers are bound. C, MSL and
 * CUDA read this text alike.
 *
 * Buffer 0 is the call. Buffer 1 + n is the operand n of mfa_operands (core/operand.h):
 *     1 Q, 2 K, 3 V, 4 mask, 5 O, 6 L, 7 dO, 8 dL, 9 dQ, 10 dK, 11 dV, 12 dbias, 13 what rounding took off O
 * and from 14 on come parts of the workspace and the counter of the tests:
 *     14 tile classes, 15 partial results, 16 row sums D, 17 L for the backward pass, 18 visited tiles */
#ifndef MFA_METAL_KERNELS_CONTRACT_H
#define MFA_METAL_KERNELS_CONTRACT_H

#include "core/args.h"

#define MFA_METAL_BUFFER_CALL 0
#define MFA_METAL_BUFFER_OPERAND 1
#define MFA_METAL_BUFFER_Q 1
#define MFA_METAL_BUFFER_K 2
#define MFA_METAL_BUFFER_V 3
#define MFA_METAL_BUFFER_LSE 6
#define MFA_METAL_BUFFER_DO 7
#define MFA_METAL_BUFFER_DLSE 8
#define MFA_METAL_BUFFER_DK 10
#define MFA_METAL_BUFFER_DV 11
#define MFA_METAL_BUFFER_O_LOW 13
#define MFA_METAL_BUFFER_CLASSES 14
#define MFA_METAL_BUFFER_PARTIALS 15
#define MFA_METAL_BUFFER_D 16
#define MFA_METAL_BUFFER_L 17
#define MFA_METAL_BUFFER_VISITED 18
#define MFA_METAL_BUFFERS 19

/* What a mask does to a tile of scores: one byte a tile. */
#define MFA_METAL_TILE_HIDDEN 0 /* hides all of it: the tile is not visited */
#define MFA_METAL_TILE_MIXED 1
#define MFA_METAL_TILE_CLEAR 2 /* changes nothing: the mask is not read again */

/* The parts that a pass is cut into, one a threadgroup; `column` runs fastest. */
struct mfa_metal_grid {
    mfa_int batch, head, row, column;
};

struct mfa_metal_call {
    struct mfa_args args;
    struct mfa_metal_grid grid;
    mfa_int first;             /* number, in that grid, of this dispatch's first threadgroup */
    mfa_int block_q, block_kv; /* of the kernel that visits the tiles; rows of queries are folded ... */
    mfa_int fold;              /* ... so many heads together: row r is query r / fold of head r % fold */
    mfa_int splits;            /* parts of the range that each row, or element of dbias, is summed over */
    struct mfa_strides classes; /* of the table of tile classes: 0 along what the mask does not depend on */
    mfa_int wide;              /* bit n: runs of four elements in buffer n are aligned */
    mfa_int given;             /* bit n: the optional operand of buffer n is there */
    /* Scores are in units of log 2 in the forward pass, and as they are in the backward pass. */
    float score_factor; /* Q K^T times this is the score; with a softcap, what tanh is taken of */
    float cap_factor;   /* tanh times this is the score */
    float bias_factor;  /* an additive mask times this is what is added to it */
};

#endif
