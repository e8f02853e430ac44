/* The operands of one problem: inputs from a seed, outputs to be checked, in any arrangement. */
#ifndef SUPPORT_OPERANDS_H
#define SUPPORT_OPERANDS_H

#include <stdint.h>

#include "reference/attention.h"
#include "support/tensor.h"

/* Dimensions as bits, for what is broadcast. */
enum { ALONG_BATCH = 1, ALONG_HEAD = 2, ALONG_ROW = 4, ALONG_COLUMN = 8 };

/* Properties of a run that the problem's text does not state. */
struct variant {
    int mask_broadcast, dbias_broadcast, kv_broadcast; /* stride 0 along these */
    int heads_broadcast;                               /* of slopes, sinks, dsinks, seed */
    int map_broadcast;                                 /* of the block map; along rows or columns, but not both */
    int dlse;                                          /* given to backward */
};

/* Values of all inputs, dense and already rounded to their dtypes. */
struct inputs {
    mfa_problem problem; /* forward; its layouts have stride 0 where the variant broadcasts */
    struct variant variant;
    double *values[REFERENCE_TENSORS]; /* of Q to dL; NULL: the problem has none */
};

/* Lengths are drawn so that the rows of packed tensors suffice (lengths.h). Masks exclude about one key in four, some
 * whole rows, and a third of the keys for half of the rows; block maps hide about half of the blocks, some whole rows
 * and some whole columns of them. */
void inputs_open(struct inputs *inputs, const mfa_problem *problem, struct variant variant, uint64_t seed,
                 const char *text);
void inputs_close(struct inputs *inputs);

struct operands {
    mfa_problem problem; /* with the layouts of the tensors */
    mfa_buffers buffers; /* of both passes */
    struct tensor tensors[REFERENCE_TENSORS];
};

/* Outputs as bits, 1 << REFERENCE_O and so on. */
#define OUTPUT(tensor) (1U << REFERENCE_##tensor)
#define FORWARD_OUTPUTS (OUTPUT(O) | OUTPUT(L))
#define BACKWARD_OUTPUTS (OUTPUT(dQ) | OUTPUT(dK) | OUTPUT(dV) | OUTPUT(DBIAS) | OUTPUT(DSINKS))

/* `outputs` says which outputs exist; dbias only exists for an additive mask, dsinks with sinks, o_low for f16 and
 * bf16. */
void operands_open(struct operands *operands, const struct inputs *inputs, enum arrangement arrangement,
                   unsigned outputs);

/* Opens these outputs anew after operands_collect has closed them. */
void operands_open_outputs(struct operands *operands, enum arrangement arrangement, unsigned outputs);

/* Runs the problem's pass, in one call or (`planned`) by a plan with a workspace of exactly the stated size. */
mfa_status operands_run(struct operands *operands, mfa_context *context, int planned);

/* Reads the pass's outputs into `results`, and closes those tensors. Returns the name of one that has been
 * written beyond its elements, or NULL. */
const char *operands_collect(struct operands *operands, struct reference *results);

/* Turns a forward problem into its backward: O, L and, unless NULL, o_low become inputs that hold the given values. */
void operands_turn(struct operands *operands, enum arrangement arrangement, const struct reference *given);
void operands_close(struct operands *operands);

void reference_close(struct reference *results);

/* The member of `results` for a tensor. */
double **reference_member(struct reference *results, enum reference_tensor tensor);

/* "Q", "dbias" and so on. */
const char *tensor_name(enum reference_tensor tensor);

#endif
