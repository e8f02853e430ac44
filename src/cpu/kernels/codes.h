/* Rows of codes of K and V to reals (enum mfa_kv_type in include/mfa.h). */

/* The scales of a row: each of `group` columns. */
struct code_scales {
    const float *at; /* NULL: 1 */
    int64_t stride, group;
};

static inline real code_scale(const struct code_scales *s, int64_t column)
{
    return s->at ? (real)s->at[column / s->group * s->stride] : 1;
}

/* As many integers of 32 bits as lanes, and bytes. */
typedef int32_t int_vec __attribute__((vector_size(LANES * 4)));
typedef int8_t byte_vec __attribute__((vector_size(LANES)));
typedef uint8_t ubyte_vec __attribute__((vector_size(LANES)));

static inline vec vec_of_bytes(byte_vec bytes)
{
    return __builtin_convertvector(__builtin_convertvector(bytes, int_vec), vec);
}

/* An 8-bit float is the high byte of an f16, or with a bit more of the fraction a part of one: e4m3 then lacks 2^8,
 * which is in its factor, and a NaN, which is not one of f16. */
static inline vec vec_load_float8(const uint8_t *at, int dtype)
{
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++)
        halves[i] = (uint16_t)(dtype == CPU_E5M2        ? at[i] << 8
                               : (at[i] & 0x7f) == 0x7f ? 0x7e00
                                                        : (at[i] & 0x80) << 8 | (at[i] & 0x7f) << 7);
    return vec_load_f16(halves);
}

static inline real code_factor(int dtype)
{
    return dtype == CPU_E4M3 ? 256 : 1;
}

static inline vec vec_load_code(const uint8_t *at, int dtype)
{
    byte_vec bytes;
    if (dtype != CPU_INT8)
        return vec_load_float8(at, dtype);
    memcpy(&bytes, at, sizeof bytes);
    return vec_of_bytes(bytes);
}

static inline real code_of(uint8_t byte, int dtype)
{
    uint8_t bytes[LANES] = {byte};
    real lanes[LANES];
    vec_store(lanes, vec_load_code(bytes, dtype));
    return lanes[0];
}

/* LANES numbers of codes of 4 bits, the low (half 0) or the high halves of bytes. */
static inline vec vec_load_nibbles(const uint8_t *at, int half, int dtype)
{
    static const float nf4[16] = {MFA_NF4_VALUES};
    ubyte_vec bytes;
    memcpy(&bytes, at, sizeof bytes);
    bytes = half ? bytes >> 4 : bytes & 15;
    if (dtype == CPU_INT4)
        return vec_sub(vec_of_bytes((byte_vec)bytes), vec_set1(8));
    real lanes[LANES];
    for (int i = 0; i < LANES; i++)
        lanes[i] = (real)nf4[bytes[i]];
    return vec_load(lanes);
}

static inline __attribute__((always_inline)) void load_bytes(real *to, const uint8_t *from, int dtype, int64_t stride,
                                                             int64_t n, struct code_scales scales)
{
    for (int64_t c = 0, end; c < n; c = end) {
        const real scale = code_scale(&scales, c) * code_factor(dtype);
        int64_t i = c;
        end = scales.group < n - c ? c + scales.group : n;
        for (; i + LANES <= end && stride == 1; i += LANES)
            vec_store(to + i, vec_mul(vec_load_code(from + i, dtype), vec_set1(scale)));
        for (; i < end; i++)
            to[i] = code_of(from[i * stride], dtype) * scale;
    }
}

static inline __attribute__((always_inline)) void load_nibbles(real *to, const uint8_t *block, int dtype,
                                                               int64_t stride, int64_t n, struct code_scales scales)
{
    enum { HALF = MFA_KV_BLOCK / 2 };
    for (int64_t c = 0; c < n; c += MFA_KV_BLOCK, block += HALF * stride) {
        const vec scale = vec_set1(code_scale(&scales, c));
        const uint8_t *from = block;
        uint8_t dense[HALF];
        if (stride != 1) {
            for (int i = 0; i < HALF; i++)
                dense[i] = block[i * stride];
            from = dense;
        }
        for (int i = 0; i < HALF; i += LANES) {
            vec_store(to + c + i, vec_mul(vec_load_nibbles(from + i, 0, dtype), scale));
            vec_store(to + c + HALF + i, vec_mul(vec_load_nibbles(from + i, 1, dtype), scale));
        }
    }
}

/* to[0..n) = a row of codes times their scales, then zeros up to whole vectors. */
static inline void load_codes(real *to, const void *from, int dtype, int64_t stride, int64_t n,
                              struct code_scales scales)
{
    switch (dtype) {
    case CPU_INT8: load_bytes(to, from, CPU_INT8, stride, n, scales); break;
    case CPU_E4M3: load_bytes(to, from, CPU_E4M3, stride, n, scales); break;
    case CPU_E5M2: load_bytes(to, from, CPU_E5M2, stride, n, scales); break;
    case CPU_INT4: load_nibbles(to, from, CPU_INT4, stride, n, scales); break;
    default: load_nibbles(to, from, CPU_NF4, stride, n, scales);
    }
    for (; n < padded(n); n++)
        to[n] = 0;
}
