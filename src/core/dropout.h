/* Dropout: what its probability means in numbers, and the mask that a seed gives. */
#ifndef MFA_CORE_DROPOUT_H
#define MFA_CORE_DROPOUT_H

#include "mfa.h"

/* A P is dropped if its 16 random bits are below this. */
int64_t mfa_dropout_below(double dropout);

/* 1 - dropout, or 1 where nothing is kept: what is divided by it is then 0, and stays so. */
double mfa_dropout_kept(double dropout);

/* The body of mfa_problem_dropout_mask. */
mfa_status mfa_dropout_write_mask(const mfa_problem *problem, const uint64_t *seed, uint8_t *kept);

#endif
