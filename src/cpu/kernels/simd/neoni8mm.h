/* Dot products of four bytes (FEAT_I8MM), over neon.h. avx512vnni.h says what each name means. */
#define INT8_PRODUCTS 1

typedef int32x4_t int_vec;

static inline int_vec int_set1(int32_t n)
{
    return vdupq_n_s32(n);
}

static inline int_vec int_add(int_vec a, int_vec b)
{
    return vaddq_s32(a, b);
}

static inline int_vec int_dots(vec a, vec b, int_vec sum)
{
    return vusdotq_s32(sum, vreinterpretq_u8_f32(b), vreinterpretq_s8_f32(a));
}

/* a is read from the register it was loaded into, as by vec_dot of neonbf16.h. */
static inline int_vec int_dot(real a, vec b, int_vec sum)
{
    __asm__("usdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(b), "w"(a));
    return sum;
}

static inline int32_t int_sum(int_vec v)
{
    return vaddvq_s32(v);
}

static inline vec vec_of_ints(int_vec v)
{
    return vcvtq_f32_s32(v);
}

static inline vec vec_of_bytes(uint8_t byte)
{
    return vreinterpretq_f32_u8(vdupq_n_u8(byte));
}

static inline vec vec_pack_bytes(vec a, vec b, vec c, vec d)
{
    uint32x4_t low = vsliq_n_u32(vcvtnq_u32_f32(a), vcvtnq_u32_f32(b), 8);
    uint32x4_t high = vsliq_n_u32(vcvtnq_u32_f32(c), vcvtnq_u32_f32(d), 8);
    return vreinterpretq_f32_u32(vsliq_n_u32(low, high, 16));
}

static inline void vec_store_bytes(uint8_t *to, vec v)
{
    uint16x4_t halves = vqmovn_u32(vcvtnq_u32_f32(v));
    uint8x8_t bytes = vqmovn_u16(vcombine_u16(halves, halves));
    memcpy(to, &bytes, LANES);
}

static inline vec vec_zip_bytes(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d)
{
    static const uint8_t turned[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    uint8_t rows[16];
    memcpy(rows, a, LANES);
    memcpy(rows + 4, b, LANES);
    memcpy(rows + 8, c, LANES);
    memcpy(rows + 12, d, LANES);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8(rows), vld1q_u8(turned)));
}
