/* Generated problems. */
#ifndef TESTS_METAL_PROBLEMS_H
#define TESTS_METAL_PROBLEMS_H

#include <stdint.h>

#include "metal/run.h"
#include "support/operands.h"

struct generated {
    mfa_problem problem;
    int passes; /* of support/cases.h */
    struct variant variant;
    enum arrangement arrangement;
    struct metal_target target;
    char text[512]; /* of the problem */
};

/* Problem n of a series; 0: there are no more. */

/* For each row of the tiles, in each dtype, the smallest and the largest columns that it serves, with several tiles of
 * queries and of keys; and decode steps, for the decode kernel and the merge of splits. The usual tiles come first,
 * then those with half the threads. */
#define PROBLEMS_OF_TILES 192
int problems_of_tiles(struct generated *g, uint64_t seed, int n);

/* Random problems, without end. Groups of twenty share types, columns and features, and so programs, because compiling
 * takes most of the time; they differ in lengths, strides, bands and broadcasts. */
int problems_random(struct generated *g, uint64_t seed, int n);

#endif
