/* The basics of all kernels: the layout of matrices, rounding, extreme numbers. Reports passes and failures. */
#ifndef TESTS_METAL_BASICS_H
#define TESTS_METAL_BASICS_H

#include "metal/gpu.h"

/* layout_test accepts the device's layout, and rejects a wrong one. */
void basics_check_layout(void);

/* Floats of all kinds, narrowed to f16 and bf16 as operands and as masks, by the kernels' own functions. */
void basics_check_rounding(void);

/* The lowest finite number as a mask is not -inf: a row of nothing else attends to all its keys. */
void basics_check_lowest_mask(void);

/* Sinks far larger than a float's digits: their gradient has the difference of the sink and L, which is small. */
void basics_check_large_sinks(void);

/* Infinities in O, and the largest finite numbers, whose o_low is 0. */
void basics_check_overflow(void);

/* Every code of K and V is the number that it stands for; NaN and infinities, too. */
void basics_check_codes(void);

/* The mask of dropout is that of mfa_problem_dropout_mask in every element, in both passes; some have random numbers
 * that are just below, or just, the bound. */
void basics_check_dropout(void);

/* Wrong numbers in the tensors of lengths, pages and indices: nothing outside of the operands is read or written, as
 * guard pages and metalsim's checker see, and no scratch memory that nothing has written. The usual settings are
 * restored. */
void basics_check_wrong_lengths(const struct gpu_settings *settings);

#endif
