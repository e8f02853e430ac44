/* What the matrix products multiply. A term is what a lane multiplies and adds in one step: a real; or, where the
 * dialect has dot products, TERM = 2 numbers of 16 bits in the room of one. The two may be neighbours in a row, and
 * then terms run across, or in a column, and then they run down:
 *
 *     across  [row][terms(columns)]   K Q^T: K and Q;  V dO^T: V and dO;  P dO: P;  dS Q: dS
 *     down    [terms(rows)][column]   V^T P^T: V and P^T;  P dO: dO;  dS Q: Q;  dS^T K: dS and K
 *
 * With TERM = 1 either is the matrix itself. Rows are padded with zeros to whole vectors. A dialect with TERM = 2
 * gives
 *     vec_dot(a, b, sum)            sum + a b, over the numbers of each term; a is one term, for all lanes
 *     vec_dots(a, b, sum)           the same for a vector of terms a
 *     vec_pair(even, odd)           the terms of two vectors of reals, rounded
 *     vec_store_across(to, v)       the reals of v, rounded, as LANES / 2 terms
 *     vec_zip_low(even, odd)        the first LANES terms down of two rows of numbers
 *     vec_zip_high(even, odd)       the others
 *
 * and may have products by tile registers (TILES; tile_product.h), which take terms LANES at a time, and of A only
 * terms across: V^T P^T then has V^T across, and dS^T K is made as its transpose, K^T dS, with K^T across. For them
 * matrices of terms lie in strips of LANES columns, the rows of a strip next to each other: what a register holds is
 * then 1 KiB in one place, and what a product reads again spreads over all sets of the cache. Strips of terms across
 * end after LEFT_ROWS rows, which a product takes at once. Only K and V, where they are read along their rows, stay
 * row by row: dense rows spread just as well. */

#ifndef K_PACK
#define K_PACK 1
#define vec_dot(a, b, sum) vec_fma(vec_set1(a), b, sum)
#define vec_dots vec_fma
#endif

#ifndef USE_AMX
#define USE_AMX 0
static inline void gemm_begin(void)
{
}

static inline void gemm_end(void)
{
}

static inline void quiet_nans(real *x, int64_t n)
{
    (void)x, (void)n;
}
#endif

typedef real packed;

/* Scores, and with them m and L, are kept as S_UNIT * S. Reals stay in base e: L, which callers get in base e, then has
 * no rounding but its own, and P near 1 is exact for scores of any size. Dot products of pairs are multiplied by a
 * factor anyway, of which log2(e) is a part: there S is in base 2, and P, which has 8 bits, hides what L is off by. */
#define S_UNIT (K_PACK > 1 ? LOG2E : 1.0)

/* exp of a score in that unit, or of a difference of two. */
static inline vec exp_of(vec x)
{
    return K_PACK > 1 ? vec_exp2(x) : vec_exp(x);
}

static inline int64_t k_packs(int64_t n)
{
    return (n + K_PACK - 1) / K_PACK;
}

static inline int64_t row_packs(int64_t columns)
{
    return padded(k_packs(columns));
}

static inline int64_t vnni_stride(int64_t columns)
{
    return row_packs(columns) * K_PACK;
}

/* From one row of terms down to the next; in strips, from one of these to the next. */
static inline int64_t packed_b_stride(int64_t rows, int64_t columns)
{
    return USE_AMX ? rows * LANES : columns;
}

/* Where a term lies. In strips that can be added to a place whose column is a whole strip's first. */
static inline int64_t packed_b_index(int64_t stride, int64_t row, int64_t column)
{
    return USE_AMX ? column / LANES * stride + row * LANES + column % LANES : row * stride + column;
}

/* The same for terms across: from one row to the next; in strips, from LEFT_ROWS to the next so many. */
#define PACKED_A_ROWS ((int64_t)2 * LANES)

static inline int64_t packed_a_stride(int64_t columns)
{
    return USE_AMX ? PACKED_A_ROWS * columns : columns;
}

/* That can be added to a place whose row is the first of LEFT_ROWS and whose column a whole strip's. */
static inline int64_t packed_a_index(int64_t stride, int64_t row, int64_t column)
{
    if (!USE_AMX)
        return row * stride + column;
    return row / PACKED_A_ROWS * stride + (column / LANES * PACKED_A_ROWS + row % PACKED_A_ROWS) * LANES +
           column % LANES;
}

/* Zeros; in strips, columns are whole ones. */
static void clear_b(packed *to, int64_t stride, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < (USE_AMX ? columns / LANES : rows); i++)
        fill(to + i * stride, USE_AMX ? rows * LANES : columns, 0);
}

static void clear_a(packed *to, int64_t stride, int64_t rows, int64_t columns)
{
    const int64_t piece = USE_AMX ? LANES : columns;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += piece)
            fill(to + packed_a_index(stride, r, c), piece, 0);
}

/* A row of the caller's, across. With TERM = 2 tensors have numbers of 16 bits, and these stay as they are. */
static void load_packs(packed *to, const void *from, int dtype, int64_t stride, int64_t n)
{
#if K_PACK == 1
    load_row(to, from, dtype, stride, n);
#else
    (void)dtype;
    enum { PIECE = 2 * LANES }; /* bytes: compilers know how to copy so many */
    char *at = (char *)to, *end = at + row_packs(n) * (int64_t)sizeof(packed);
    const char *data = from;
    int64_t i = 0;
    if (stride == 1)
        for (; i + LANES <= n; i += LANES)
            memcpy(at + 2 * i, data + 2 * i, PIECE);
    for (char *rest = at + 2 * i; rest < end; rest += PIECE)
        memset(rest, 0, PIECE);
    if (stride == 1 && i < n)
        memcpy(at + 2 * i, data + 2 * i, (size_t)(n - i) * 2);
    else
        for (; i < n; i++)
            memcpy(at + 2 * i, data + 2 * i * stride, 2);
#endif
}

/* n terms as they were loaded, times 2^-SHRINK_BITS: exactly, but for numbers that nobody sees beside the largest. */
#define SHRINK_BITS 32

static void shrink_packs(packed *x, int64_t n)
{
#if K_PACK == 1
    scale_vectors(x, n, ldexp(1, -SHRINK_BITS));
#else
    uint16_t *bits = (uint16_t *)(void *)x; /* a sign, 8 bits of exponent, 7 of fraction */
    for (int64_t i = 0; i < n * K_PACK; i++) {
        int exponent = bits[i] >> 7 & 0xff;
        if (exponent != 0xff) /* infinite, NaN */
            bits[i] = (uint16_t)(exponent > SHRINK_BITS ? bits[i] - (SHRINK_BITS << 7) : bits[i] & 0x8000);
    }
#endif
}

/* Rows of memory that will be read soon, in the order in which they lie: for each number of A that a product reads, it
 * asks for one of these, evenly, since what is asked for at once fills the buffers of the misses. */
struct prefetch_cursor {
    const char *at, *end; /* of a row */
    int64_t bytes, gap; /* of a row; from its end to the next */
    int64_t each; /* bytes for each term of A */
};

static inline __attribute__((always_inline)) void prefetch_next(struct prefetch_cursor *rows, int64_t terms)
{
    __builtin_prefetch(rows->at, 0, 2); /* into the second-level cache */
    rows->at += terms * rows->each;
    if (rows->at >= rows->end) {
        rows->at += rows->gap;
        rows->end += rows->gap + rows->bytes;
    }
}

/* The same for terms of few lines, a prefetch for each. */
static inline void prefetch_all(struct prefetch_cursor *rows, int64_t terms)
{
    int64_t line = rows->gap && rows->bytes < 64 ? rows->bytes : 64, each = rows->each;
    for (int64_t left = terms * each; left > 0; left -= line) {
        rows->each = left < line ? left : line;
        prefetch_next(rows, 1);
    }
    rows->each = each;
}

/* A block of K or V, across: the caller's own memory where it can be used as it lies, else a copy. Rows
 * that lie a multiple of 4096 bytes apart would share one set of the cache: these are copied too. */
struct kv_block {
    const packed *rows;
    int64_t stride;
    struct prefetch_cursor *next; /* block's rows, to be asked for meanwhile; or NULL */
};

static struct kv_block load_block(packed *copy, const void *data, int dtype, const struct mfa_strides *s, int64_t batch,
                                  int64_t head, int64_t row, int64_t rows, int64_t columns, int must_copy)
{
    int64_t bytes = bytes_of(dtype), stride = row_packs(columns);
    const char *from = row_at(data, bytes, s, batch, head, row);
    int fits = K_PACK == 1 ? is_real(dtype) : (columns | s->row) % K_PACK == 0 && (uintptr_t)from % sizeof(packed) == 0;
    if (USE_AMX) /* turned in whole vectors */
        fits = fits && columns % (K_PACK * LANES) == 0;
    if (!must_copy && fits && s->column == 1 && s->row * bytes % 4096 != 0)
        return (struct kv_block){(const packed *)(const void *)from, s->row / K_PACK, NULL};
    if (is_real(dtype) && s->row == 1 && s->column != 1)
        load_columns(copy, stride, (const real *)(const void *)from, s->column, rows, columns);
    else
        for (int64_t r = 0; r < rows; r++)
            load_packs(copy + r * stride, from + r * s->row * bytes, dtype, s->column, columns);
    return (struct kv_block){copy, stride, NULL};
}

/* Terms down of a block whose rows are whole vectors: the block itself, or made in `down`. */
static struct kv_block pack_vnni(struct kv_block block, int64_t rows, int64_t columns, packed *down, int64_t stride)
{
#if K_PACK == 1
    (void)rows, (void)columns, (void)down, (void)stride;
    return block;
#else
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < row_packs(columns); c += LANES) {
            const packed *even = block.rows + r * block.stride + c;
            vec first = vec_load(even), second = r + 1 < rows ? vec_load(even + block.stride) : vec_set1(0);
            packed *low = down + packed_b_index(stride, r / 2, 2 * c);
            vec_store(low, vec_zip_low(first, second));
            vec_store(low + packed_b_index(stride, 0, LANES), vec_zip_high(first, second));
        }
    return (struct kv_block){down, stride, NULL};
#endif
}

/* A block as the left operand of C += A^T B: terms down; or, for tile registers, its transpose, terms across. */
static struct kv_block pack_a(struct kv_block block, int64_t rows, int64_t columns, packed *left)
{
#if !USE_AMX
    return pack_vnni(block, rows, columns, left, vnni_stride(columns));
#else
    int64_t stride = packed_a_stride(row_packs(rows));
    for (int64_t r = 0; r < rows; r += 2 * LANES)
        for (int64_t c = 0; c < row_packs(columns); c += LANES) {
            packed down[LANES][2 * LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const packed *even = block.rows + (r + 2 * i) * block.stride + c;
                vec first = r + 2 * i < rows ? vec_load(even) : vec_set1(0);
                vec second = r + 2 * i + 1 < rows ? vec_load(even + block.stride) : vec_set1(0);
                vec_store(down[i], vec_zip_low(first, second));
                vec_store(down[i] + LANES, vec_zip_high(first, second));
            }
            packed *to = left + packed_a_index(stride, 2 * c, r / 2);
            vec_transpose(down[0], 2 * LANES, to, LANES);
            vec_transpose(down[0] + LANES, 2 * LANES, to + LANES * LANES, LANES);
        }
    return (struct kv_block){left, stride, NULL};
#endif
}

/* Where row r of the block begins in it, r even. */
static inline const packed *packed_a_row(struct kv_block left, int64_t r)
{
    return left.rows +
           (USE_AMX ? packed_a_index(left.stride, 0, r / K_PACK) : packed_b_index(left.stride, r / K_PACK, 0));
}

/* The transpose of rows that lie `from_stride` apart, both numbers whole vectors. */
static void pack_b_transposed(const packed *from, int64_t from_stride, packed *to, int64_t stride, int64_t rows,
                              int64_t columns)
{
    for (int64_t r = 0; r < rows; r += LANES)
        transpose(from + r * from_stride, from_stride, to + packed_b_index(stride, 0, r), USE_AMX ? LANES : stride,
                  LANES, columns);
}

/* Zeros in the rows of terms down that a product with the first n takes along. */
static void pad_b(packed *to, int64_t stride, int64_t n, int64_t columns)
{
    if (USE_AMX)
        clear_b(to + packed_b_index(stride, k_packs(n), 0), stride, row_packs(n) - k_packs(n), columns);
}

/* Rows k and k + 1 of a matrix whose terms run down, k even. */
static inline void store_b_pair(packed *to, int64_t stride, int64_t k, vec even, vec odd)
{
#if K_PACK == 1
    vec_store(to + k * stride, even);
    vec_store(to + (k + 1) * stride, odd);
#else
    vec_store(to + packed_b_index(stride, k / 2, 0), vec_pair(even, odd));
#endif
}

/* The last row, k even. */
static inline void store_b_last(packed *to, int64_t stride, int64_t k, vec even)
{
#if K_PACK == 1
    vec_store(to + k * stride, even);
#else
    vec_store(to + packed_b_index(stride, k / 2, 0), vec_pair(even, vec_set1(0)));
#endif
}

/* LANES reals of a row whose terms run across. */
static inline void store_a(packed *to, vec v)
{
#if K_PACK == 1
    vec_store(to, v);
#else
    vec_store_packed(to, v);
#endif
}
