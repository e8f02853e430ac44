/* Packing: the caller's rows, and what kernels compute, as operands of products (layout.h). */

/* Zeros in `packs` rows of packs; with AMX, columns are whole micropanels, with BFMMLA rows come in whole steps. */
static void clear_b(struct packed_b B, int64_t packs, int64_t columns)
{
    if (USE_AMX)
        for (int64_t c = 0; c < columns; c += LANES)
            fill(B.data + packed_b_index(B.stride, 0, c), packs * LANES, 0);
    else
        for (int64_t t = 0; t < packs; t += K_STEP)
            fill(B.data + t * B.stride, K_STEP * columns, 0);
}

static void clear_a(struct packed_a A, int64_t rows, int64_t packs)
{
    const int64_t piece = USE_AMX ? LANES : USE_MMLA ? K_STEP : packs;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < packs; c += piece)
            fill(A.data + packed_a_index(A.stride, r, c), piece, 0);
}

/* A row of the caller's tensor as packs. With K_PACK = 2 its numbers have 16 bits, and these stay as they are. */
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

/* Whether rows of a tensor are row-major packs where they lie. Rows that lie a multiple of 4096 bytes apart would share
 * one set of the cache. */
static int is_packed_in_place(const void *from, int dtype, const struct mfa_strides *s, int64_t columns)
{
    int fits = K_PACK == 1 ? is_real(dtype) : (columns | s->row) % K_PACK == 0 && (uintptr_t)from % sizeof(packed) == 0;
    if (USE_AMX) /* packed in whole vectors */
        fits = fits && columns % (K_PACK * LANES) == 0;
    return fits && s->column == 1 && s->row * bytes_of(dtype) % 4096 != 0;
}

/* Whether pack_at, and pack_a of BFMMLA, can read rows that are packed in place: packing reads whole vectors. */
static inline int at_fits_vectors(int64_t columns)
{
    return K_PACK == 1 || columns % (K_PACK * LANES) == 0;
}

/* Whether n rows of a left operand that are packed in place can be read there: AMX reads whole tiles, and dense rows.
 */
static inline int a_fits_tiles(int64_t n, const struct mfa_strides *s, int64_t columns)
{
    if (!KV_IN_PLACE)
        return at_fits_vectors(columns);
    return !USE_AMX || (n % KEY_UNIT == 0 && s->row == columns);
}

/* n packs times 2^-SHRINK_BITS: exactly, but for numbers that do not count beside the largest. */
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

/* Rows of K or V as a left operand: row-major packs, `stride` apart; where KV_IN_PLACE is 0, products want them from
 * pack_a, of which two rows have 2 * stride packs. */
struct kv_block {
    const packed *rows;
    int64_t stride;
    struct prefetch_cursor *next; /* what the product with it prefetches; or NULL */
};

/* From this row on, with BFMMLA an even one. */
static inline struct kv_block block_from(struct kv_block block, int64_t row)
{
    return (struct kv_block){block.rows + row * block.stride, block.stride, block.next};
}

/* Rows of a block, whole vectors, as products read a left operand: made in `to`, or the block itself. */
static struct kv_block pack_a(struct kv_block block, int64_t rows, int64_t columns, packed *to)
{
#if !USE_MMLA
    (void)rows, (void)columns, (void)to;
    return block;
#else
    const int64_t stride = row_packs(columns);
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t t = 0; t < stride; t += LANES) {
            const packed *from = block.rows + r * block.stride + t;
            const vec first = vec_load(from), second = r + 1 < rows ? vec_load(from + block.stride) : vec_set1(0);
            packed *at = to + packed_a_index(stride, r, t);
            vec_store(at, vec_blocks_low(first, second));
            vec_store(at + LANES, vec_blocks_high(first, second));
        }
    return (struct kv_block){to, stride, block.next};
#endif
}

/* k-interleaved packs of a block whose rows are whole vectors: made in `to`; with reals, the block itself. */
static struct packed_b pack_vnni(struct kv_block block, int64_t rows, int64_t columns, struct packed_b to)
{
#if K_PACK == 1
    (void)rows, (void)columns, (void)to;
    return (struct packed_b){(packed *)block.rows, block.stride};
#elif USE_MMLA
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t c = 0; c < row_packs(columns); c += LANES) {
            vec row[4];
            for (int i = 0; i < 4; i++)
                row[i] = r + i < rows ? vec_load(block.rows + (r + i) * block.stride + c) : vec_set1(0);
            const vec even[2] = {vec_zip_low(row[0], row[1]), vec_zip_high(row[0], row[1])};
            const vec odd[2] = {vec_zip_low(row[2], row[3]), vec_zip_high(row[2], row[3])};
            for (int half = 0; half < 2; half++) {
                packed *at = to.data + packed_b_index(to.stride, r / 2, 2 * c + half * LANES);
                vec_store(at, vec_packs_low(even[half], odd[half]));
                vec_store(at + LANES, vec_packs_high(even[half], odd[half]));
            }
        }
    return to;
#else
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < row_packs(columns); c += LANES) {
            const packed *even = block.rows + r * block.stride + c;
            vec first = vec_load(even), second = r + 1 < rows ? vec_load(even + block.stride) : vec_set1(0);
            packed *low = to.data + packed_b_index(to.stride, r / 2, 2 * c);
            vec_store(low, vec_zip_low(first, second));
            vec_store(low + packed_b_index(to.stride, 0, LANES), vec_zip_high(first, second));
        }
    return to;
#endif
}

/* The left operand of C += A^T B: k-interleaved packs of A; with AMX, its transpose in row-major packs. */
struct packed_at {
    const packed *data;
    int64_t stride;
    struct prefetch_cursor *next; /* as in a kv_block */
};

/* Of a block whose rows are whole vectors; made in `to`, or the block itself. */
static struct packed_at pack_at(struct kv_block block, int64_t rows, int64_t columns, packed *to)
{
#if !USE_AMX
    struct packed_b b = pack_vnni(block, rows, columns, (struct packed_b){to, interleaved_columns(columns)});
    return (struct packed_at){b.data, b.stride, NULL};
#else
    int64_t stride = packed_a_stride(row_packs(rows));
    for (int64_t r = 0; r < rows; r += 2 * LANES)
        for (int64_t c = 0; c < row_packs(columns); c += LANES) {
            packed interleaved[LANES][2 * LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const packed *even = block.rows + (r + 2 * i) * block.stride + c;
                vec first = r + 2 * i < rows ? vec_load(even) : vec_set1(0);
                vec second = r + 2 * i + 1 < rows ? vec_load(even + block.stride) : vec_set1(0);
                vec_store(interleaved[i], vec_zip_low(first, second));
                vec_store(interleaved[i] + LANES, vec_zip_high(first, second));
            }
            packed *at = to + packed_a_index(stride, 2 * c, r / 2);
            vec_transpose(interleaved[0], 2 * LANES, at, LANES);
            vec_transpose(interleaved[0] + LANES, 2 * LANES, at + LANES * LANES, LANES);
        }
    return (struct packed_at){to, stride, NULL};
#endif
}

/* A right operand as the left one of C += A^T B. */
static inline struct packed_at at_of_b(struct packed_b B)
{
    return (struct packed_at){B.data, B.stride, NULL};
}

/* The other way round; not with AMX, where the two lie differently. */
static inline struct packed_b b_of_at(struct packed_at A)
{
    return (struct packed_b){(packed *)A.data, A.stride};
}

/* The part of A^T from row k of A on, k a multiple of K_PACK, with BFMMLA of KEY_UNIT. */
static inline struct packed_at at_from(struct packed_at A, int64_t k)
{
    int64_t at = USE_AMX ? packed_a_index(A.stride, 0, k / K_PACK) : packed_b_index(A.stride, k / K_PACK, 0);
    return (struct packed_at){A.data + at, A.stride, A.next};
}

/* B = rows^T, of row-major packs that lie `stride` apart; both numbers are whole vectors. */
static void pack_b_transposed(const packed *rows, int64_t stride, struct packed_b B, int64_t count, int64_t packs)
{
#if USE_MMLA
    for (int64_t r = 0; r < count; r += 2)
        for (int64_t t = 0; t < packs; t += LANES) {
            const vec first = vec_load(rows + r * stride + t), second = vec_load(rows + (r + 1) * stride + t);
            vec_store(B.data + packed_b_index(B.stride, t, r), vec_blocks_low(first, second));
            vec_store(B.data + packed_b_index(B.stride, t + K_STEP, r), vec_blocks_high(first, second));
        }
#else
    for (int64_t r = 0; r < count; r += LANES)
        transpose(rows + r * stride, stride, B.data + packed_b_index(B.stride, 0, r), USE_AMX ? LANES : B.stride, LANES,
                  packs);
#endif
}

/* Zeros in the rows of packs that a product over the first k numbers reads beside them. */
static void pad_b(struct packed_b B, int64_t k, int64_t columns)
{
    if (USE_AMX)
        clear_b((struct packed_b){B.data + packed_b_index(B.stride, k_packs(k), 0), B.stride},
                row_packs(k) - k_packs(k), columns);
}

#if K_PACK > 1
typedef uint16_t half_vec __attribute__((vector_size(sizeof(vec))));

/* The packs of rows k and k + 1 of LANES columns of a right operand. With BFMMLA rows come in turn: k a multiple of 4
 * leaves zeros in the two rows after it. */
static inline void store_b_packs(struct packed_b B, int64_t k, vec packs)
{
#if USE_MMLA
    packed *at = B.data + packed_b_index(B.stride, k / 4 * 2, 0);
    const vec even = k % 4 ? vec_packs_even(vec_load(at), vec_load(at + LANES)) : packs;
    const vec odd = k % 4 ? packs : vec_set1(0);
    vec_store(at, vec_packs_low(even, odd));
    vec_store(at + LANES, vec_packs_high(even, odd));
#else
    vec_store(B.data + packed_b_index(B.stride, k / 2, 0), packs);
#endif
}

/* The bits of these packs that are in `mask`, too. */
static inline void mask_b_packs(struct packed_b B, int64_t k, half_vec mask)
{
#if USE_MMLA
    packed *at = B.data + packed_b_index(B.stride, k / 4 * 2, 0);
    const vec all = (vec)((half_vec){0} - 1), even = k % 4 ? all : (vec)mask, odd = k % 4 ? (vec)mask : all;
    vec_store(at, (vec)((half_vec)vec_load(at) & (half_vec)vec_packs_low(even, odd)));
    vec_store(at + LANES, (vec)((half_vec)vec_load(at + LANES) & (half_vec)vec_packs_high(even, odd)));
#else
    packed *at = B.data + packed_b_index(B.stride, k / 2, 0);
    vec_store(at, (vec)((half_vec)vec_load(at) & mask));
#endif
}
#endif

/* Rows k and k + 1 of a right operand, k even. */
static inline void store_b_pair(struct packed_b B, int64_t k, vec even, vec odd)
{
#if K_PACK == 1
    vec_store(B.data + k * B.stride, even);
    vec_store(B.data + (k + 1) * B.stride, odd);
#else
    store_b_packs(B, k, vec_pair(even, odd));
#endif
}

/* The last row, k even. */
static inline void store_b_last(struct packed_b B, int64_t k, vec even)
{
#if K_PACK == 1
    vec_store(B.data + k * B.stride, even);
#else
    store_b_packs(B, k, vec_pair(even, vec_set1(0)));
#endif
}

/* LANES reals as row-major packs. */
static inline void store_a(packed *to, vec v)
{
#if K_PACK == 1
    vec_store(to, v);
#else
    vec_store_packed(to, v);
#endif
}
