/* Rows of the caller's tensors to and from reals: conversion, strides, padding, transposition. */

#define REAL_MAX (sizeof(real) == 8 ? (real)DBL_MAX : (real)FLT_MAX)
#define LOG2E 1.4426950408889634074

static inline int64_t padded(int64_t n) /* to whole vectors */
{
    return (n + LANES - 1) / LANES * LANES;
}

static inline int64_t bytes_of(int dtype)
{
    return dtype == CPU_F64 ? 8 : dtype == CPU_F32 ? 4 : dtype > CPU_CODES ? 1 : 2;
}

static inline real element(const void *data, int dtype, int64_t i)
{
    switch (dtype) {
    case CPU_F64: return (real)((const double *)data)[i];
    case CPU_F32: return (real)((const float *)data)[i];
    case CPU_F16: return (real)f16_to_float(((const uint16_t *)data)[i]);
    default: return (real)bf16_to_float(((const uint16_t *)data)[i]);
    }
}

static inline void set_element(void *data, int dtype, int64_t i, real x)
{
    switch (dtype) {
    case CPU_F64: ((double *)data)[i] = (double)x; break;
    case CPU_F32: ((float *)data)[i] = (float)x; break;
    case CPU_F16: ((uint16_t *)data)[i] = f16_of_float((float)x); break;
    default: ((uint16_t *)data)[i] = bf16_of_float((float)x);
    }
}

#define CPU_REAL (sizeof(real) == 8 ? CPU_F64 : CPU_F32)

static inline int is_real(int dtype) /* elements are reals as they lie */
{
    return dtype == CPU_REAL;
}

/* to[0..n) = from[0..n * stride), then zeros up to whole vectors. */
static void load_row(real *to, const void *from, int dtype, int64_t stride, int64_t n)
{
    int64_t i = 0;
    if (stride == 1 && is_real(dtype)) {
        memcpy(to, from, (size_t)n * sizeof(real));
        i = n;
    } else if (stride == 1 && dtype == CPU_F16) {
        for (; i + LANES <= n; i += LANES)
            vec_store(to + i, vec_load_f16((const uint16_t *)from + i));
    } else if (stride == 1 && dtype == CPU_BF16) {
        for (; i + LANES <= n; i += LANES)
            vec_store(to + i, vec_load_bf16((const uint16_t *)from + i));
    }
    for (; i < n; i++)
        to[i] = element(from, dtype, i * stride);
    for (; i < padded(n); i++)
        to[i] = 0;
}

/* A row as reals: where it lies, if it is whole vectors of them, or else as load_row makes it in `copy`. */
static const real *row_of_reals(real *copy, const void *from, int dtype, int64_t stride, int64_t n)
{
    if (stride == 1 && is_real(dtype) && n % LANES == 0)
        return (const real *)from;
    load_row(copy, from, dtype, stride, n);
    return copy;
}

static void store_row(void *to, int dtype, int64_t stride, const real *from, int64_t n)
{
    int64_t i = 0;
    if (stride == 1 && is_real(dtype)) {
        memcpy(to, from, (size_t)n * sizeof(real));
        i = n;
    } else if (stride == 1 && dtype == CPU_F16) {
        for (; i + LANES <= n; i += LANES)
            vec_store_f16((uint16_t *)to + i, vec_load(from + i));
    } else if (stride == 1 && dtype == CPU_BF16) {
        for (; i + LANES <= n; i += LANES)
            vec_store_bf16((uint16_t *)to + i, vec_load(from + i));
    }
    for (; i < n; i++)
        set_element(to, dtype, i * stride, from[i]);
}

/* What rounding to `stored` took off x; 0 where that is not finite. */
static inline vec rounded_off(vec x, vec stored)
{
    vec zero = vec_set1(0), rest = vec_sub(x, stored);
    return vec_select_less(vec_max(rest, vec_sub(zero, rest)), vec_set1(REAL_MAX), rest, zero);
}

/* store_row of f16 or bf16, with what rounding takes off the row in `low`. */
static void store_row_and_rest(void *to, void *low, int dtype, int64_t stride, const real *from, int64_t n)
{
    int64_t i = 0;
    if (stride == 1 && dtype == CPU_F16) {
        for (uint16_t *high = to, *rest = low; i + LANES <= n; i += LANES) {
            vec x = vec_load(from + i);
            vec_store_f16(high + i, x);
            vec_store_f16(rest + i, rounded_off(x, vec_load_f16(high + i)));
        }
    } else if (stride == 1) {
        for (uint16_t *high = to, *rest = low; i + LANES <= n; i += LANES) {
            vec x = vec_load(from + i);
            vec_store_bf16(high + i, x);
            vec_store_bf16(rest + i, rounded_off(x, vec_load_bf16(high + i)));
        }
    }
    for (; i < n; i++) {
        set_element(to, dtype, i * stride, from[i]);
        real rest = from[i] - element(to, dtype, i * stride);
        set_element(low, dtype, i * stride, rest >= -REAL_MAX && rest <= REAL_MAX ? rest : 0);
    }
}

/* to[c][r] = from[r][c]; rows and columns are whole vectors. */
static void transpose(const real *from, int64_t from_stride, real *to, int64_t to_stride, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES)
            vec_transpose(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
}

/* A factor as the product of two reals. The second is 1, unless one real would be subnormal or infinite. */
struct factors {
    real first, second;
};

static inline struct factors factors_of(double factor)
{
    const double low = sizeof(real) == 8 ? DBL_MIN : (double)FLT_MIN;
    int exponent;
    if (factor == 0 || (fabs(factor) >= low && fabs(factor) <= (double)REAL_MAX))
        return (struct factors){(real)factor, 1};
    frexp(factor, &exponent);
    return (struct factors){(real)ldexp(factor, exponent / 2 - exponent), (real)ldexp(1, exponent - exponent / 2)};
}

static void scale_vectors(real *x, int64_t n, double factor) /* n: whole vectors */
{
    const struct factors f = factors_of(factor);
    for (int64_t i = 0; i < n; i += LANES)
        vec_store(x + i, vec_mul(vec_load(x + i), vec_set1(f.first)));
    for (int64_t i = 0; i < n && f.second != 1; i += LANES)
        vec_store(x + i, vec_mul(vec_load(x + i), vec_set1(f.second)));
}

/* n: whole vectors */
static int all_finite(const real *x, int64_t n)
{
    vec sum = vec_set1(0);
    for (int64_t i = 0; i < n; i += LANES)
        sum = vec_fma(vec_load(x + i), vec_set1(0), sum); /* NaN, once one is not */
    real lanes[LANES];
    int finite = 1;
    vec_store(lanes, sum);
    for (int i = 0; i < LANES; i++)
        finite &= lanes[i] == 0;
    return finite;
}

static real horizontal_max(vec x)
{
    real lane[LANES];
    vec_store(lane, x);
    for (int i = 1; i < LANES; i++)
        lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    return lane[0];
}

/* The largest |x| of n numbers, whole vectors; any number where one is a NaN. */
static inline real max_abs(const real *x, int64_t n)
{
    vec top = vec_set1(0);
    for (int64_t i = 0; i < n; i += LANES)
        top = vec_max(top, vec_max(vec_load(x + i), vec_sub(vec_set1(0), vec_load(x + i))));
    return horizontal_max(top);
}

static real horizontal_sum(vec x)
{
    real lane[LANES];
    vec_store(lane, x);
    for (int n = LANES / 2; n; n /= 2)
        for (int k = 0; k < n; k++)
            lane[k] += lane[k + n];
    return lane[0];
}

static void fill(real *x, int64_t n, real value)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = value;
}

/* to[r][c] = from[c * step + r], then zeros up to whole vectors: rows that lie next to each other, column by column,
 * are transposed in squares. */
static void load_columns(real *to, int64_t to_stride, const real *from, int64_t step, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < padded(columns); c += LANES)
            if (r + LANES <= rows && c + LANES <= columns)
                vec_transpose(from + c * step + r, step, to + r * to_stride + c, to_stride);
            else
                for (int64_t i = r; i < r + LANES && i < rows; i++)
                    for (int64_t k = c; k < c + LANES; k++)
                        to[i * to_stride + k] = k < columns ? from[k * step + i] : 0;
}

/* Allocates from a worker's scratch memory; with a NULL base it only counts. */
static real *arena_alloc(char *base, uint64_t *used, int64_t reals)
{
    real *piece = base ? (real *)(void *)(base + *used) : NULL;
    *used += ((uint64_t)reals * sizeof(real) + 63) / 64 * 64;
    return piece;
}
