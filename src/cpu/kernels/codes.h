/* Rows of codes of K and V to reals (enum mfa_kv_type in include/mfa.h). */

/* The scales of a row: each of `group` columns. */
struct code_scales {
    const float *at;
    int64_t stride, group;
};

/* That of group n. */
static inline real code_scale(const struct code_scales *s, int64_t n)
{
    return (real)s->at[n * s->stride];
}

/* What numbers of load_part are still to be multiplied by. It is not a factor of a scale, which may be near the largest
 * number. */
static inline real code_unit(int dtype)
{
    return dtype == CPU_E4M3 ? 256 : 1;
}

static inline vec load_part(const uint8_t *at, int dtype)
{
    return dtype == CPU_INT8 ? vec_load_int8(at) : dtype == CPU_E4M3 ? vec_load_e4m3(at) : vec_load_e5m2(at);
}

static inline vec load_code(const uint8_t *at, int dtype)
{
    const vec part = load_part(at, dtype);
    return dtype == CPU_E4M3 ? vec_mul(part, vec_set1(code_unit(dtype))) : part;
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
static inline __attribute__((always_inline)) void load_block(real *to, const uint8_t *from, struct code_table table)
{
    enum { HALF = MFA_KV_BLOCK / 2 };
    for (int i = 0; i < HALF; i += LANES) {
        vec_store(to + i, vec_load_nibbles(from + i, 0, table));
        vec_store(to + HALF + i, vec_load_nibbles(from + i, 1, table));
    }
}

static inline __attribute__((always_inline)) void load_nibbles(real *to, const uint8_t *from, const float *numbers,
                                                               int64_t stride, int64_t n, struct code_scales scales)
{
    enum { BYTES = MFA_KV_BLOCK / 2 };
    uint8_t dense[BYTES];
    for (int64_t c = 0, end, g = 0; c < n; g++) {
        const struct code_table table = vec_code_table(numbers, code_scale(&scales, g));
        end = scales.group < n - c ? c + scales.group : n;
        for (; c < end; c += MFA_KV_BLOCK, from += BYTES * stride) {
            for (int i = 0; i < BYTES && stride != 1; i++)
                dense[i] = from[i * stride];
            load_block(to + c, stride == 1 ? from : dense, table);
        }
    }
}

/* Rows of codes. */
struct code_rows {
    const uint8_t *at;
    int dtype;
    int64_t row, column, columns; /* strides; how many columns */
    struct code_scales scales;    /* of the first row */
    int64_t scales_row;
};

static inline __attribute__((always_inline)) void load_rows_of(real *to, int64_t to_stride, struct code_rows rows,
                                                               const int dtype, int64_t column, int64_t n)
{
    for (; n > 0; n--, to += to_stride, rows.at += rows.row, rows.scales.at += rows.scales_row) {
        if (dtype == CPU_INT4 || dtype == CPU_NF4)
            load_nibbles(to, rows.at, dtype == CPU_INT4 ? int4_values : nf4_values, column, rows.columns, rows.scales);
        else
            load_bytes(to, rows.at, dtype, column, rows.columns, rows.scales);
        for (int64_t c = rows.columns; c < padded(rows.columns); c++)
            to[c] = 0;
    }
}

static inline __attribute__((always_inline)) void load_codes_of(real *to, int64_t to_stride, struct code_rows rows,
                                                                int64_t column, int64_t n)
{
    switch (rows.dtype) {
    case CPU_INT8: load_rows_of(to, to_stride, rows, CPU_INT8, column, n); break;
    case CPU_E4M3: load_rows_of(to, to_stride, rows, CPU_E4M3, column, n); break;
    case CPU_E5M2: load_rows_of(to, to_stride, rows, CPU_E5M2, column, n); break;
    case CPU_INT4: load_rows_of(to, to_stride, rows, CPU_INT4, column, n); break;
    default: load_rows_of(to, to_stride, rows, CPU_NF4, column, n);
    }
}

/* to[r][0..columns) = n rows of codes times their scales, then zeros up to whole vectors. */
static inline void load_codes(real *to, int64_t to_stride, struct code_rows rows, int64_t n)
{
    if (rows.column == 1)
        load_codes_of(to, to_stride, rows, 1, n);
    else
        load_codes_of(to, to_stride, rows, rows.column, n);
}
