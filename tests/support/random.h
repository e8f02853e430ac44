/* Random problems: each is determined by a seed and its number. */
#ifndef SUPPORT_RANDOM_H
#define SUPPORT_RANDOM_H

#include <stdint.h>

#include "support/generator.h"
#include "support/operands.h"

struct random_problem {
    mfa_problem problem; /* forward */
    struct variant variant;
    enum arrangement arrangement;
};

/* Draws problem n from all that the CPU runs, with every option; small enough for hundreds in a minute. */
void random_problem_draw(struct random_problem *drawn, uint64_t seed, int n);

/* The parts of that draw, for other series: a number from low to high; a length, often short, sometimes longer than
 * one tile or several, rarely 0; a band; a block map; what is broadcast, whether dL is given, and the arrangement. */
int64_t random_between(struct generator *generator, int64_t low, int64_t high);
int64_t random_length(struct generator *generator, int64_t max);
void random_band(struct generator *generator, mfa_problem *problem);
void random_block_map(struct generator *generator, mfa_problem *problem);
/* Sequences of lengths of their own, packed, in a cache or in pages; a few batch entries. */
void random_varlen(struct generator *generator, mfa_problem *problem);
/* Types of K and V that the columns allow, and then columns that share a scale. */
void random_types(struct generator *generator, mfa_problem *problem);
void random_groups(struct generator *generator, mfa_problem *problem);

void random_memory(struct generator *generator, const mfa_problem *problem, struct variant *variant,
                   enum arrangement *arrangement);

#endif
