/* Dot products of four bytes (AVX512_VNNI), over avx512.h. A pack is four bytes in the place of a real; numbers of 32
 * bits are an int_vec. It gives
 *     int_set1(n)                   n in each lane
 *     int_dot(a, b, sum)            sum + a b over the bytes of each pack: those of a, one pack for all lanes, are
 *                                   signed, those of b are not
 *     int_dots(a, b, sum)           the same for a vector of packs a
 *     int_sum(v)                    the sum of the lanes
 *     vec_of_ints(v)                these as reals
 *     vec_of_bytes(byte)            packs of one byte, again and again
 *     vec_pack_bytes(a, b, c, d)    packs of four vectors of reals, rounded to bytes 0 to 255; a NaN becomes 0
 *     vec_store_bytes(to, v)        LANES reals, rounded likewise; a NaN becomes any byte
 *     vec_zip_bytes(a, b, c, d)     packs of LANES bytes of each of four rows */
#define INT8_PRODUCTS 1

/* Not an __m512i, of 64-bit integers: compilers would copy sums from one type to the other. */
typedef int32_t int_vec __attribute__((vector_size(64)));

static inline int_vec int_set1(int32_t n)
{
    return (int_vec)_mm512_set1_epi32(n);
}

static inline int_vec int_add(int_vec a, int_vec b)
{
    return a + b;
}

static inline int_vec int_dots(vec a, vec b, int_vec sum)
{
    return (int_vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
}

static inline int_vec int_dot(real a, vec b, int_vec sum)
{
    return int_dots(vec_set1(a), b, sum);
}

static inline int32_t int_sum(int_vec v)
{
    return _mm512_reduce_add_epi32((__m512i)v);
}

static inline vec vec_of_ints(int_vec v)
{
    return _mm512_cvtepi32_ps((__m512i)v);
}

static inline vec vec_of_bytes(uint8_t byte)
{
    return (vec)_mm512_set1_epi8((char)byte);
}

static inline vec vec_pack_bytes(vec a, vec b, vec c, vec d)
{
    /* within 128 bits, from four bytes of each to one of each */
    const __m512i turned = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    __m512i first = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    __m512i second = _mm512_packus_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    return (vec)_mm512_shuffle_epi8(_mm512_packus_epi16(first, second), turned);
}

static inline void vec_store_bytes(uint8_t *to, vec v)
{
    _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
}

static inline vec vec_zip_bytes(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d)
{
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)a));
    low = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)b)), 8));
    low = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)c)), 16));
    return (vec)_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)d)), 24));
}
