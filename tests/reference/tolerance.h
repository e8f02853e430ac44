/* How far from the reference a result may be: a rule, not a number. */
#ifndef REFERENCE_TOLERANCE_H
#define REFERENCE_TOLERANCE_H

#include "reference/attention.h"

/* Largest allowed |x - reference| of any element, for each tensor.
 *
 * The rule: at most twice the error of the naive computation in the same dtype, with a floor of a few ulp.
 *
 * Naive is what one writes without thinking of memory: all of S, sums in f32, P and dS rounded to the
 * dtype where they enter a product, results rounded once (naive.h; f64: everything in double, in another
 * order than the reference). Its error is the largest of any element, as ours is: errors are measured
 * against the largest element of the tensor, for a sum of large terms may happen to be small.
 *
 * The floor is needed where naive is right by luck: one key gives P = 1 exactly, and a dS of two equal
 * numbers' difference. It is an ulp of the dtype at the tensor's largest element, plus what a few roundings
 * u of the working precision do to the result if they fall at random, and so add as the root of the sum of
 * squares:
 *     S_ij is off by s_i = u (1 + |scale| |Q_i| max|K_j| + max|mask|), P_ij by P_ij s_i; in backward, which
 *     has P from L, s_i has u |L_i| more
 *     O: the root of sum_j (P_ij s_i)^2, times V;  dV: the root of sum_i (P_ij s_i)^2, times dO
 *     dP_ij is off by u |dO_i| |V_j|, D_i by u (|dO_i| |O_i| + |dL_i|) and by what rounding the O that
 *     backward is given does to it; dS_ij by P_ij times these, and by P_ij s_i |dP_ij - D_i|
 *     dbias: as dS;  dQ: the root of its squares, times scale K;  dK: likewise, times scale Q; for these
 *     two a softcap's slope is off as well
 * |x| being the length of a row, and Q K V dO without an index the root mean square of their largest row. */
struct tolerance {
    double O, L, dQ, dK, dV, dbias;
};

/* `truth`: what reference_attention gave for this problem; members not wanted are NULL. */
void reference_tolerance(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *truth,
                         struct tolerance *tolerance);

#endif
