/* Products of 16-bit integers (VPMADDWD), over avx512.h. An int_vec is LANES numbers of 32 bits, or as many pairs of
 * 16. It gives
 *     int_set1(n)                   n in each lane
 *     int_load(p), int_store(p, v)  LANES numbers
 *     int_add(a, b)                 sums of 32 bits
 *     int_pairs(a, b)               of each pair of a and of b: the sum of two products
 *     int_of_reals(v)               rounded to 32 bits
 *     int_join(a, b)                pairs of the low 16 bits of a and of b
 *     vec_of_ints(v)                numbers of 32 bits as reals
 *     int_load_int8(p)              2 LANES codes of int8
 *     int_zip_int8(a, b, v, w)      pairs of these of two rows, in two vectors; vec_unzip_columns(v, w) puts their
 *                                   columns in order */
#define INT16_PRODUCTS 1

/* Not an __m512i, of 64-bit integers: compilers would copy sums from one type to the other. */
typedef int32_t int_vec __attribute__((vector_size(64)));

static inline int_vec int_set1(int32_t n)
{
    return (int_vec)_mm512_set1_epi32(n);
}

static inline int_vec int_load(const int32_t *p)
{
    return (int_vec)_mm512_loadu_si512(p);
}

static inline void int_store(int32_t *p, int_vec v)
{
    _mm512_storeu_si512(p, (__m512i)v);
}

static inline int_vec int_add(int_vec a, int_vec b)
{
    return a + b;
}

static inline int_vec int_pairs(int_vec a, int_vec b)
{
    return (int_vec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

static inline int_vec int_of_reals(vec v)
{
    return (int_vec)_mm512_cvtps_epi32(v);
}

static inline int_vec int_join(int_vec a, int_vec b)
{
    return (int_vec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, _mm512_slli_epi32((__m512i)b, 16));
}

static inline vec vec_of_ints(int_vec v)
{
    return _mm512_cvtepi32_ps((__m512i)v);
}

static inline int_vec int_load_int8(const uint8_t *p)
{
    return (int_vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
}

static inline void int_zip_int8(const uint8_t *a, const uint8_t *b, int_vec *low, int_vec *high)
{
    const __m512i even = (__m512i)int_load_int8(a), odd = (__m512i)int_load_int8(b);
    *low = (int_vec)_mm512_unpacklo_epi16(even, odd);
    *high = (int_vec)_mm512_unpackhi_epi16(even, odd);
}

static inline void vec_unzip_columns(vec *low, vec *high)
{
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const vec even = *low;
    *low = _mm512_permutex2var_ps(even, first, *high);
    *high = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), *high);
}
