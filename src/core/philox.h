/* Philox4x32-10, the random numbers of dropout (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11).
 * C and GPU languages compile this header; the CPU kernels have the same in vectors (attention/dropout.h).
 * include/mfa.h says which numbers belong to a query and a key. */
#ifndef MFA_CORE_PHILOX_H
#define MFA_CORE_PHILOX_H

#if defined(__METAL_VERSION__)
typedef uint mfa_word;
#define MFA_PHILOX_FUNC METAL_FUNC
#define MFA_PHILOX_UNROLL UNROLL /* metal/kernels/fragment.h */
#else
#include <stdint.h>
typedef uint32_t mfa_word;
#define MFA_PHILOX_FUNC static inline
#define MFA_PHILOX_UNROLL
#endif

#define MFA_PHILOX_ROUNDS 10
#define MFA_PHILOX_M0 0xd2511f53u /* the multipliers of counter words 0 and 2 */
#define MFA_PHILOX_M1 0xcd9e8d57u
#define MFA_PHILOX_W0 0x9e3779b9u /* what a round adds to the words of the key */
#define MFA_PHILOX_W1 0xbb67ae85u

#define MFA_PHILOX_KEYS 8 /* keys of a counter: 16 bits for each */

struct mfa_philox {
    mfa_word x[4];
};

MFA_PHILOX_FUNC mfa_word mfa_high_word(mfa_word a, mfa_word b)
{
#if defined(__METAL_VERSION__)
    return mulhi(a, b);
#else
    return (mfa_word)((uint64_t)a * b >> 32);
#endif
}

/* The numbers of a counter, under the key (low, high). */
MFA_PHILOX_FUNC struct mfa_philox mfa_philox(struct mfa_philox counter, mfa_word low, mfa_word high)
{
    struct mfa_philox c = counter;
    MFA_PHILOX_UNROLL
    for (int round = 0; round < MFA_PHILOX_ROUNDS; round++) {
        const mfa_word high0 = mfa_high_word(MFA_PHILOX_M0, c.x[0]), low0 = MFA_PHILOX_M0 * c.x[0];
        const mfa_word high1 = mfa_high_word(MFA_PHILOX_M1, c.x[2]), low1 = MFA_PHILOX_M1 * c.x[2];
        c.x[0] = high1 ^ c.x[1] ^ low;
        c.x[1] = low1;
        c.x[2] = high0 ^ c.x[3] ^ high;
        c.x[3] = low0;
        low += MFA_PHILOX_W0, high += MFA_PHILOX_W1;
    }
    return c;
}

#endif
