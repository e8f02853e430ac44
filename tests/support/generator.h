/* Seeded random numbers (xoshiro256**, seeded through splitmix64): the same everywhere for the same seed. */
#ifndef SUPPORT_GENERATOR_H
#define SUPPORT_GENERATOR_H

#include <stdint.h>

struct generator {
    uint64_t state[4];
};

/* `text` (may be NULL) sets generators of the same seed apart, such as those of two problems. */
void generator_seed(struct generator *generator, uint64_t seed, const char *text);
uint64_t generator_next(struct generator *generator);
double generator_uniform(struct generator *generator); /* [0, 1) */
double generator_normal(struct generator *generator);  /* mean 0, variance 1 */

#endif
