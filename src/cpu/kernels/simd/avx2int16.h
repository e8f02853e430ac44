/* Products of 16-bit integers (VPMADDWD), over avx2.h. avx512int16.h says what each name means. */
#define INT16_PRODUCTS 1

typedef int32_t int_vec __attribute__((vector_size(32)));

static inline int_vec int_set1(int32_t n)
{
    return (int_vec)_mm256_set1_epi32(n);
}

static inline int_vec int_load(const int32_t *p)
{
    return (int_vec)_mm256_loadu_si256((const __m256i *)p);
}

static inline void int_store(int32_t *p, int_vec v)
{
    _mm256_storeu_si256((__m256i *)p, (__m256i)v);
}

static inline int_vec int_add(int_vec a, int_vec b)
{
    return a + b;
}

static inline int_vec int_pairs(int_vec a, int_vec b)
{
    return (int_vec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

static inline int_vec int_of_reals(vec v)
{
    return (int_vec)_mm256_cvtps_epi32(v);
}

static inline int_vec int_join(int_vec a, int_vec b)
{
    return (int_vec)_mm256_blend_epi16((__m256i)a, _mm256_slli_epi32((__m256i)b, 16), 0xaa);
}

static inline vec vec_of_ints(int_vec v)
{
    return _mm256_cvtepi32_ps((__m256i)v);
}

static inline int_vec int_load_int8(const uint8_t *p)
{
    return (int_vec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
}

static inline void int_zip_int8(const uint8_t *a, const uint8_t *b, int_vec *low, int_vec *high)
{
    const __m256i even = (__m256i)int_load_int8(a), odd = (__m256i)int_load_int8(b);
    *low = (int_vec)_mm256_unpacklo_epi16(even, odd);
    *high = (int_vec)_mm256_unpackhi_epi16(even, odd);
}

static inline void vec_unzip_columns(vec *low, vec *high)
{
    const vec first = *low;
    *low = _mm256_permute2f128_ps(first, *high, 0x20);
    *high = _mm256_permute2f128_ps(first, *high, 0x31);
}
