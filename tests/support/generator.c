/* xoshiro256** by Blackman and Vigna, and the two distributions that tensors are filled from. */
#include "support/generator.h"

#include <math.h>
#include <stddef.h>

static uint64_t splitmix(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

void generator_seed(struct generator *generator, uint64_t seed, const char *text)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    for (; text && *text; text++)
        hash = (hash ^ (unsigned char)*text) * UINT64_C(0x100000001b3);
    seed ^= hash;
    for (int word = 0; word < 4; word++)
        generator->state[word] = splitmix(&seed);
}

static uint64_t rotate(uint64_t bits, int by)
{
    return bits << by | bits >> (64 - by);
}

uint64_t generator_next(struct generator *generator)
{
    uint64_t *s = generator->state, result = rotate(s[1] * 5, 7) * 9, shifted = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotate(s[3], 45);
    return result;
}

double generator_uniform(struct generator *generator)
{
    return (double)(generator_next(generator) >> 11) * 0x1p-53;
}

double generator_normal(struct generator *generator)
{
    double radius = sqrt(-2 * log(1 - generator_uniform(generator)));
    return radius * cos(6.283185307179586 * generator_uniform(generator));
}
