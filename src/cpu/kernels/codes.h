/* Rows of codes of K and V to reals (enum mfa_kv_type in include/mfa.h). */

/* The scales of a row: each of `group` columns. */
struct code_scales {
    const float *at; /* NULL: 1 */
    int64_t stride, group;
};

/* That of group n. */
static inline real code_scale(const struct code_scales *s, int64_t n)
{
    return s->at ? (real)s->at[n * s->stride] : 1;
}

/* The factor that vec_load_e4m3 leaves out is not one of the scale's, which may be near the largest number. */
static inline vec load_code(const uint8_t *at, int dtype)
{
    return dtype == CPU_INT8   ? vec_load_int8(at)
           : dtype == CPU_E4M3 ? vec_mul(vec_load_e4m3(at), vec_set1(256))
                               : vec_load_e5m2(at);
}

static inline real code_of(uint8_t byte, int dtype)
{
    uint8_t bytes[LANES] = {byte};
    real lanes[LANES];
    vec_store(lanes, load_code(bytes, dtype));
    return lanes[0];
}

/* The numbers of codes of 4 bits. */
static const float int4_values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const float nf4_values[16] = {MFA_NF4_VALUES};

static inline __attribute__((always_inline)) void load_bytes(real *to, const uint8_t *from, int dtype, int64_t stride,
                                                             int64_t n, struct code_scales scales)
{
    for (int64_t c = 0, end, g = 0; c < n; c = end, g++) {
        const real scale = code_scale(&scales, g);
        int64_t i = c;
        end = scales.group < n - c ? c + scales.group : n;
        for (; i + LANES <= end && stride == 1; i += LANES)
            vec_store(to + i, vec_mul(load_code(from + i, dtype), vec_set1(scale)));
        for (; i < end; i++)
            to[i] = code_of(from[i * stride], dtype) * scale;
    }
}

/* A block of 32 columns. */
static inline __attribute__((always_inline)) void load_block(real *to, const uint8_t *from, const float *table,
                                                             int64_t stride, vec scale)
{
    enum { HALF = MFA_KV_BLOCK / 2 };
    uint8_t dense[HALF];
    for (int i = 0; i < HALF && stride != 1; i++)
        dense[i] = from[i * stride];
    from = stride == 1 ? from : dense;
    for (int i = 0; i < HALF; i += LANES) {
        vec_store(to + i, vec_mul(vec_load_nibbles(from + i, 0, table), scale));
        vec_store(to + HALF + i, vec_mul(vec_load_nibbles(from + i, 1, table), scale));
    }
}

static inline __attribute__((always_inline)) void load_nibbles(real *to, const uint8_t *from, const float *table,
                                                               int64_t stride, int64_t n, struct code_scales scales)
{
    for (int64_t c = 0, end, g = 0; c < n; g++) {
        const vec scale = vec_set1(code_scale(&scales, g));
        end = scales.group < n - c ? c + scales.group : n;
        for (; c < end; c += MFA_KV_BLOCK, from += MFA_KV_BLOCK / 2 * stride)
            load_block(to + c, from, table, stride, scale);
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
    case CPU_INT4: load_nibbles(to, from, int4_values, stride, n, scales); break;
    default: load_nibbles(to, from, nf4_values, stride, n, scales);
    }
    for (; n < padded(n); n++)
        to[n] = 0;
}
