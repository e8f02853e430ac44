/* The tolerance of results: computed for each problem by one rule. */
#ifndef REFERENCE_TOLERANCE_H
#define REFERENCE_TOLERANCE_H

#include "reference/attention.h"

/* Largest allowed |x - reference| of any element, for each tensor.
 *
 * The rule: at most twice the error of the naive computation in the same dtype, with a floor of a few ulp.
 *
 * Naive attention materialises all of S, sums in f32, rounds P and dS to the dtype where they enter a
 * product, and rounds results once (naive.h; f64: everything in double, in another order than the
 * reference). Its error is the largest of any element, as ours is: errors are measured against the
 * largest element of the tensor, for a sum of large terms may happen to be small.
 *
 * The floor is needed where naive attention happens to be exact. One key gives P = 1 exactly, and so does any key that
 * outweighs the others: naive attention takes P from the scores that it has summed up, while backward recomputes them,
 * in some kernels with other roundings, and combines them with a rounded L. And a dS may be the difference of equal
 * numbers. The floor is an ulp of the dtype at the tensor's largest element, plus twice the error that roundings to u
 * of the working precision cause in the element that they change most. Roundings count as random, so errors add as the
 * root of the sum of squares:
 *     a sum is off by u times its partial sum, at each of its terms. A partial sum of the n products of z = Q_i K_j is
 *     a part of z plus a random walk: sqrt(n z^2 / 3 + |Q_i|^2 |K_j|^2 / 6) in all
 *     S_ij is off by s_ij = u (1 + |scale| times that + |S_ij| + |mask_ij| + |ALiBi_ij|), and by u |sink| more where
 *     the sink exceeds the scores, for what counts is the difference; P_ij by P_ij s_ij
 *     L_i by l_i, the root of sum_j (P_ij s_ij)^2, and u |L_i|; in backward, which has P from L, P_ij by P_ij l_i more
 *     dP_ij is off by u |dO_i| |V_j|, D_i by u (|dO_i| |O_i| + |dL_i|) and by what the error and the rounding
 *     of the O that backward is given do to it; dS_ij by P_ij times these, and as P_ij by that times |dP_ij - D_i|
 *     of O, dV, dbias, dQ and dK each term is off by this times the element of V, dO, 1, K or Q (and scale) beside it,
 *     and each sum by its own roundings; for the last two a softcap's derivative is off as well
 *     dsink: a term P_i D_i, P_i being exp(sink - L_i), by P_i |D_i| (l_i + u + u |sink|) and by P_i times the error of
 *     D_i
 * |x| being the length of a row. Dropout's factors of P and dP are factors of their errors, too.
 *
 * In backward a P or dS below the least normal number of the working precision, 2^-126 in f32, is 0 in naive attention:
 * the kernels' exponentials are 0 there, and those that multiply bf16 read a subnormal dS as 0. A P within 1 % of that
 * number is off by itself, since one may take it to be normal and the other not. These errors may all have one sign, so
 * in a sum of n terms each counts sqrt(n) times: the root of the sum of squares is then no less than their sum.
 *
 * o + o_low is O before it was rounded. Its tolerance is the floor alone, with the rounding of o_low in place of an
 * ulp. Kernels that multiply bf16 round P to the dtype: o + o_low may also be off by twice the change that this makes,
 * and O by an ulp more, since naive attention's own change may happen to be small where O has few elements. The P of a
 * row have a factor that differs between kernels, 1 / l or exp(m - L). Where many P are nearly equal, all of them are
 * rounded up with one such factor and down with another: so the largest change with four factors counts.
 *
 * With outputs in f32 of operands in f16 or bf16 (out_type), naive attention rounds neither results nor P and dS, and
 * an ulp is that of f32: an output that had been rounded to the dtype would be far off. Of kernels that multiply bf16,
 * gradients have the tolerance of outputs in bf16, and O that of o + o_low. */
struct tolerance {
    double O, L, dQ, dK, dV, dbias, dsinks;
    double O_of_rounded_P;            /* of kernels that multiply bf16 */
    double O_low, O_low_of_rounded_P; /* of o + o_low */
};

/* `truth`: the results of reference_attention for this problem; members that are not needed are NULL. */
void reference_tolerance(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *truth,
                         struct tolerance *tolerance);

/* The same for kernels that multiply bf16. It differs where outputs are f32. */
void reference_tolerance_of_rounded_P(const mfa_problem *problem, const mfa_buffers *buffers,
                                      const struct reference *truth, struct tolerance *tolerance);

#endif
