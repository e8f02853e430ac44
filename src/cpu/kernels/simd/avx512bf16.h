/* AVX-512 with dot products of pairs of bf16 (AVX512_BF16). What products multiply are pairs, and all else is as in
 * avx512.h. It gives, beside scalar.h's functions,
 *     vec_dot(a, b, sum)            sum + a b, over the numbers of each pack; a is one pack, for all lanes
 *     vec_dots(a, b, sum)           the same for a vector of packs a
 *     vec_pair(even, odd)           the packs of two vectors of reals, rounded
 *     vec_store_packed(to, v)       the reals of v, rounded, as LANES / 2 packs
 *     vec_zip_low(even, odd)        the first LANES k-interleaved packs of two rows of numbers
 *     vec_zip_high(even, odd)       the others */
#include "cpu/kernels/simd/avx512.h"

#define K_PACK 2

static inline vec vec_dots(vec a, vec b, vec sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

static inline vec vec_dot(real a, vec b, vec sum)
{
    return vec_dots(vec_set1(a), b, sum);
}

/* Where the 16-bit elements of two vectors, one after the other, go when they take turns. */
static inline __m512i turns(int first)
{
    __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(_mm512_or_si512(low, _mm512_slli_epi32(low, 16)), _mm512_set1_epi32(first));
}

static inline vec vec_pair(vec even, vec odd)
{
    return (vec)_mm512_permutexvar_epi16(turns(16 << 16), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

static inline void vec_store_packed(real *to, vec v)
{
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v));
}

#define ODD_FIRST (32 << 16)

static inline vec vec_zip_low(vec even, vec odd)
{
    return (vec)_mm512_permutex2var_epi16((__m512i)even, turns(ODD_FIRST), (__m512i)odd);
}

static inline vec vec_zip_high(vec even, vec odd)
{
    return (vec)_mm512_permutex2var_epi16((__m512i)even, turns(ODD_FIRST + (16 | 16 << 16)), (__m512i)odd);
}
