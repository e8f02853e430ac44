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
 * The floor is needed where naive is right by luck: one key gives P = 1 exactly, and so does any key that outweighs the
 * others, as naive takes P from the very scores that it has summed up, where backward computes them anew, rounded
 * otherwise in some kernels, and meets those of forward through L, which is rounded; and a dS may be the difference of
 * equal numbers. The floor is an ulp
 * of the dtype at the tensor's largest element, plus twice what roundings to u of the working precision do to the
 * element that they do most to, if they fall at random, and so add as the root of the sum of squares:
 *     a sum is off by u times what it has come to, at each of its terms. That of the n products of z = Q_i K_j has come
 *     to a part of z, and beside that wanders: sqrt(n z^2 / 3 + |Q_i|^2 |K_j|^2 / 6) in all
 *     S_ij is off by s_ij = u (1 + |scale| times that + |S_ij| + |mask_ij|); P_ij by P_ij s_ij
 *     L_i by l_i, the root of sum_j (P_ij s_ij)^2, and u |L_i|; in backward, which has P from L, P_ij by P_ij l_i more
 *     dP_ij is off by u |dO_i| |V_j|, D_i by u (|dO_i| |O_i| + |dL_i|) and by what the error and the rounding
 *     of the O that backward is given do to it; dS_ij by P_ij times these, and as P_ij by that times |dP_ij - D_i|
 *     of O, dV, dbias, dQ and dK each term is off by this times the element of V, dO, 1, K or Q (and scale) beside it,
 *     and each sum by its own roundings; for the last two a softcap's derivative is off as well
 * |x| being the length of a row.
 *
 * o + o_low is O before it was rounded. It may be off by the floor alone, where the rounding of o_low takes the
 * place of an ulp. Kernels that multiply bf16 round P to the dtype: they may also be off by twice what that does to O.
 * P of a row is a multiple of a number that differs from kernel to kernel, 1 / l or exp(m - L), and where many P are
 * nearly the same, all of them are rounded up with one such number and down with another: so the largest error with
 * four of them counts. */
struct tolerance {
    double O, L, dQ, dK, dV, dbias;
    double O_low, O_low_of_rounded_P; /* of o + o_low */
};

/* `truth`: what reference_attention gave for this problem; members not wanted are NULL. */
void reference_tolerance(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *truth,
                         struct tolerance *tolerance);

#endif
