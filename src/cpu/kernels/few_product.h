/* The two products of few queries, with lanes along columns:
 *
 *     S[i][k] = sum over lanes of dots[i][k] = Q_i * K_k, lane by lane
 *     O_i += sum over k < n of P_ik V_k
 *
 * K and V are read where they lie and converted in registers, each row once for R queries. A register tile has N keys,
 * or N vectors of columns: 8 sums, as many as hide the latency of a multiply-add on two units, or more where there are
 * registers for it. */

#define FEW_ROWS (LANES / 2) /* most queries; Q, P and O have as many rows, the rest zeros */
#define FEW_KEYS 96          /* of a block: whole vectors in every dialect */
#define FEW_AHEAD 128        /* keys between those in use and those asked for */

/* Rows of K or V: where they lie if they are whole vectors, else a copy as reals. */
struct lines {
    const char *rows;
    int64_t step; /* bytes */
    int dtype, copied;
};

static struct lines lines_of(real *copy, const void *data, int dtype, const struct mfa_strides *s, int64_t batch,
                             int64_t head, int64_t row, int64_t rows, int64_t columns)
{
    int64_t bytes = bytes_of(dtype), stride = padded(columns);
    const char *from = row_at(data, bytes, s, batch, head, row);
    if (s->column == 1 && columns == stride)
        return (struct lines){from, s->row * bytes, dtype, 0};
    for (int64_t r = 0; r < rows; r++)
        load_row(copy + r * stride, from + r * s->row * bytes, dtype, s->column, columns);
    return (struct lines){(const char *)copy, stride * (int64_t)sizeof(real), CPU_REAL, 1};
}

static inline struct lines line(struct lines lines, int64_t row)
{
    lines.rows += row * lines.step;
    return lines;
}

/* Lines that will be read some time later, of `left` keys. */
struct ahead {
    struct lines K, V;
    int64_t left, head_dim, value_dim;
};

static inline void ask_line(struct lines *lines, int64_t columns)
{
    for (int64_t byte = 0; byte < columns * bytes_of(lines->dtype) && !lines->copied; byte += 64)
        __builtin_prefetch(lines->rows + byte, 0, 2);
    lines->rows += lines->step;
}

/* Asks for those of n keys to be in the second-level cache by then. */
static inline void ask(struct ahead *ahead, int64_t n)
{
    for (; n > 0 && ahead->left > 0; n--, ahead->left--) {
        ask_line(&ahead->K, ahead->head_dim);
        ask_line(&ahead->V, ahead->value_dim);
    }
}

static inline __attribute__((always_inline)) vec line_load(const char *row, int64_t column, int dtype)
{
    const void *from = row + column * (dtype == CPU_F16 || dtype == CPU_BF16 ? 2 : (int64_t)sizeof(real));
    return dtype == CPU_F16 ? vec_load_f16(from) : dtype == CPU_BF16 ? vec_load_bf16(from) : vec_load(from);
}

#define ROWS_1(F, n) F(0, n)
#define ROWS_2(F, n) ROWS_1(F, n) F(1, n)
#define ROWS_4(F, n) ROWS_2(F, n) F(2, n) F(3, n)
#define ROWS_8(F, n) ROWS_4(F, n) F(4, n) F(5, n) F(6, n) F(7, n)

#define FEW_START(n, R) ROWS_##R(START, n)

#define DOT(r, n) sum_##r##_##n = vec_fma(vec_load(Q + (r) * columns + c), line_##n, sum_##r##_##n);
#define DOT_KEY(n, R)                                          \
    vec line_##n = line_load(K.rows + (n) * K.step, c, dtype); \
    ROWS_##R(DOT, n)
#define DOT_STORE(r, n) vec_store(dots + ((r) * LANES + (n)) * LANES, sum_##r##_##n);
#define DOT_STORE_KEY(n, R) ROWS_##R(DOT_STORE, n)

#define WEIGHT(r, n) const vec p_##r = vec_set1(P[(r) * FEW_KEYS + k]);
#define VALUE(r, n) sum_##r##_##n = vec_fma(p_##r, line_##n, sum_##r##_##n);
#define VALUE_COLUMN(n, R)                                                 \
    vec line_##n = line_load(V.rows + k * V.step, c + (n) * LANES, dtype); \
    ROWS_##R(VALUE, n)
#define VALUE_STORE(r, n)                     \
    at = O + (r) * columns + c + (n) * LANES; \
    vec_store(at, vec_add(vec_load(at), sum_##r##_##n));
#define VALUE_STORE_COLUMN(n, R) ROWS_##R(VALUE_STORE, n)

/* clang-format off */
#define FEW_TILE(R, N)                                                                                                 \
    static inline __attribute__((always_inline)) void dots_##R##x##N(const real *Q, struct lines K, int64_t columns,   \
                                                                     real *dots, int dtype)                            \
    {                                                                                                                  \
        EACH_##N(FEW_START, R)                                                                                         \
        for (int64_t c = 0; c < columns; c += LANES) {                                                                 \
            EACH_##N(DOT_KEY, R)                                                                                       \
        }                                                                                                              \
        EACH_##N(DOT_STORE_KEY, R)                                                                                     \
    }                                                                                                                  \
    static inline __attribute__((always_inline)) void values_##R##x##N(                                                \
        const real *P, struct lines V, int64_t n, real *O, int64_t columns, int64_t c, int dtype)                      \
    {                                                                                                                  \
        real *at;                                                                                                      \
        EACH_##N(FEW_START, R)                                                                                         \
        for (int64_t k = 0; k < n; k++) {                                                                              \
            ROWS_##R(WEIGHT, N)                                                                                        \
            EACH_##N(VALUE_COLUMN, R)                                                                                  \
        }                                                                                                              \
        EACH_##N(VALUE_STORE_COLUMN, R)                                                                                \
    }
/* clang-format on */

/* All n keys, all columns: tiles of N, then of 1. */
#define FEW(R, N)                                                                                              \
    FEW_TILE(R, N)                                                                                             \
    FEW_TILE(R, 1)                                                                                             \
    static inline __attribute__((always_inline)) void dots_##R(                                                \
        const real *Q, struct lines K, int64_t n, int64_t columns, real *dots, struct ahead *ahead, int dtype) \
    {                                                                                                          \
        for (; n >= (N); n -= (N), K.rows += (N) * K.step, dots += (N) * LANES) {                              \
            ask(ahead, N);                                                                                     \
            dots_##R##x##N(Q, K, columns, dots, dtype);                                                        \
        }                                                                                                      \
        for (; n > 0; n--, K.rows += K.step, dots += LANES)                                                    \
            dots_##R##x1(Q, K, columns, dots, dtype);                                                          \
    }                                                                                                          \
    static inline __attribute__((always_inline)) void values_##R(const real *P, struct lines V, int64_t n,     \
                                                                 int64_t columns, real *O, int dtype)          \
    {                                                                                                          \
        int64_t c = 0;                                                                                         \
        for (; c + (N) * LANES <= columns; c += (N) * LANES)                                                   \
            values_##R##x##N(P, V, n, O, columns, c, dtype);                                                   \
        for (; c < columns; c += LANES)                                                                        \
            values_##R##x1(P, V, n, O, columns, c, dtype);                                                     \
    }

FEW(1, 8)
FEW(2, 4)
FEW(4, 2)
FEW(8, 2)

static inline __attribute__((always_inline)) void few_dots(int64_t rows, const real *Q, struct lines K, int64_t n,
                                                           int64_t columns, real *dots, struct ahead *ahead, int dtype)
{
    if (FEW_ROWS > 4 && rows > 4)
        dots_8(Q, K, n, columns, dots, ahead, dtype);
    else if (FEW_ROWS > 2 && rows > 2)
        dots_4(Q, K, n, columns, dots, ahead, dtype);
    else if (FEW_ROWS > 1 && rows > 1)
        dots_2(Q, K, n, columns, dots, ahead, dtype);
    else
        dots_1(Q, K, n, columns, dots, ahead, dtype);
}

static inline __attribute__((always_inline)) void few_values(int64_t rows, const real *P, struct lines V, int64_t n,
                                                             int64_t columns, real *O, int dtype)
{
    if (FEW_ROWS > 4 && rows > 4)
        values_8(P, V, n, columns, O, dtype);
    else if (FEW_ROWS > 2 && rows > 2)
        values_4(P, V, n, columns, O, dtype);
    else if (FEW_ROWS > 1 && rows > 1)
        values_2(P, V, n, columns, O, dtype);
    else
        values_1(P, V, n, columns, O, dtype);
}

/* The sum over lanes of each of LANES vectors. */
static vec sums_over_lanes(const real *vectors)
{
    real turned[LANES * LANES];
    vec_transpose(vectors, LANES, turned, LANES);
    vec sum = vec_load(turned);
    for (int i = 1; i < LANES; i++)
        sum = vec_add(sum, vec_load(turned + i * LANES));
    return sum;
}

/* S = Q K^T of `rows` queries and n keys, at most LANES. Whole vectors of S are written, FEW_KEYS apart. */
static void few_scores(int64_t rows, const real *Q, struct lines K, int64_t n, int64_t columns, real *dots, real *S,
                       struct ahead *ahead)
{
    if (K.dtype == CPU_F16)
        few_dots(rows, Q, K, n, columns, dots, ahead, CPU_F16);
    else if (K.dtype == CPU_BF16)
        few_dots(rows, Q, K, n, columns, dots, ahead, CPU_BF16);
    else
        few_dots(rows, Q, K, n, columns, dots, ahead, CPU_REAL);
    for (int64_t i = 0; i < rows; i++)
        vec_store(S + i * FEW_KEYS, sums_over_lanes(dots + i * LANES * LANES));
}

/* O += P V of `rows` queries and n keys. */
static void few_outputs(int64_t rows, const real *P, struct lines V, int64_t n, int64_t columns, real *O)
{
    if (V.dtype == CPU_F16)
        few_values(rows, P, V, n, columns, O, CPU_F16);
    else if (V.dtype == CPU_BF16)
        few_values(rows, P, V, n, columns, O, CPU_BF16);
    else
        few_values(rows, P, V, n, columns, O, CPU_REAL);
}
