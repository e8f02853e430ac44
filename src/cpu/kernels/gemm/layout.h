/* How operands of matrix products lie in memory, on each instruction set. Drivers (attention/) see the structs and
 * constants of this file and never ask which instruction set there is.
 *
 * A product multiplies packs: K_PACK = 1 real, or K_PACK = 2 numbers of bf16 in the 32 bits of a float, which a dot
 * product multiplies and adds in one step. The two numbers of a pack follow each other along k, the dimension that is
 * summed over:
 *
 *     row-major packs     [row][k / K_PACK]      left operands: K in K Q^T, V in V dO^T, P^T in P^T dO,
 *                                                dS^T in dS^T Q
 *     k-interleaved packs [k / K_PACK][column]   right operands: Q^T, dO^T, P^T, Q, dO, dS^T; V in V^T P^T,
 *                                                K in dS K.
 *                                                Intel's name for this layout is VNNI
 *
 * With K_PACK = 1 either is the matrix itself. Rows are padded with zeros to whole vectors.
 *
 * With AMX (USE_AMX) products take LANES packs of k at a time, and a register holds 16 rows of 64 bytes. Right operands
 * lie in micropanels of LANES columns, the rows of one next to each other: what a register loads is then 1 KiB in one
 * place, and what a product reads again spreads over all sets of the cache. Left operands lie likewise, in micropanels
 * of LANES packs, which end after PACKED_A_ROWS rows. Since registers read the left operand along its rows only, V^T
 * and K^T are packed as left operands. K and V in K Q^T and V dO^T are read where they lie.
 *
 * With BFMMLA (USE_MMLA) products take K_STEP = 2 packs along k, of two rows of A and two columns of B. So the two
 * packs of a row or a column lie side by side, and those of the next one after them:
 *
 *     right operands, and V^T, K^T    [k / 4][column][2 packs]
 *     other left operands             [row / 2][k / 4][row % 2][2 packs]
 *
 * Packs beyond k are 0 in one operand and finite in the other here, too. */

#ifndef K_PACK
#define K_PACK 1
#define vec_dot(a, b, sum) vec_fma(vec_set1(a), b, sum)
#define vec_dots vec_fma
#endif

#ifndef USE_MMLA
#define USE_MMLA 0
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

#ifndef INT8_PRODUCTS
#define INT8_PRODUCTS 0
#endif

#ifndef INT16_PRODUCTS
#define INT16_PRODUCTS 0
#endif

#ifndef WIDENS_CODES
#define WIDENS_CODES 1 /* decode widens codes of K and V in registers; 0: they are copied as numbers first */
#endif

typedef real packed;

/* What a panel of queries is made of: its width in vectors; the unit in which its vectors are used; the unit of the
 * keys that it visits, whole register tiles. */
#ifndef PANEL_VECTORS
#define PANEL_VECTORS 3
#define QUERY_VECTORS 1
#define KEY_UNIT 8
#endif
#define PANEL (PANEL_VECTORS * LANES)

enum {
    PACK_ELEMENTS = K_PACK,             /* numbers of a pack */
    K_STEP = USE_MMLA ? 2 : 1,          /* packs along k that an instruction multiplies; but for tile registers */
    KV_IN_PLACE = !USE_MMLA,            /* rows of K and V in memory are left operands as they lie */
    P_IN_PLACE = !USE_AMX && !USE_MMLA, /* forward: P may be written over the S that it is made from */
    GRADIENTS_IN_PLACE = K_PACK == 1,   /* backward: S and dP may lie where P and dS will */
    INTERLEAVED_IN_PLACE = K_PACK == 1, /* row-major packs are k-interleaved ones, too */
    OPERANDS_AS_GIVEN = K_PACK > 1, /* Q and dO are multiplied as the caller gave them: factors come after products */
    PREFETCH_BY_PACK = !USE_AMX,    /* products take a cursor and prefetch evenly; else only gemm_exp2 does */
    PREFETCH_O = K_PACK == 1,       /* fetching O before it is written pays */
    FACTOR_AFTER_GEMM = USE_AMX,    /* gemm_dS leaves the factor of S to the exponentials */
    TRANSPOSED_DQ = USE_AMX,        /* dS K is made as its transpose */
    RESCALE_KEYS = USE_AMX ? KEY_UNIT : 48, /* keys from which m is estimated anew where it is stale */
};

/* Packs for n numbers along k. */
static inline int64_t k_packs(int64_t n)
{
    return (n + K_PACK - 1) / K_PACK;
}

/* Packs of a row of `columns` numbers, whole vectors. */
static inline int64_t row_packs(int64_t columns)
{
    return padded(k_packs(columns));
}

/* Numbers of a row that becomes `columns` of k-interleaved packs. */
static inline int64_t interleaved_columns(int64_t columns)
{
    return row_packs(columns) * K_PACK;
}

/* Whether a product C += A^T B with so many columns of C is made as its transpose: AMX reads the left operand along its
 * rows; and with FMA, half a vector of each row of C would be empty, but rows of C^T are whole tiles. */
static inline int prefers_transposed_c(int64_t columns)
{
    return TRANSPOSED_DQ || columns % LANES == TILE_ROWS_3;
}

/* C: row r begins at data + r * stride. */
struct matrix {
    real *data;
    int64_t stride;
};

/* A left operand, packed: row-major packs; `stride` from one row, with AMX from PACKED_A_ROWS rows, to the next. */
struct packed_a {
    packed *data;
    int64_t stride;
};

/* A right operand: k-interleaved packs; `stride` from one row of packs, with AMX from one micropanel, to the next. */
struct packed_b {
    packed *data;
    int64_t stride;
};

#define PACKED_A_ROWS ((int64_t)2 * LANES)

/* The stride of a left operand whose rows have so many packs. */
static inline int64_t packed_a_stride(int64_t packs)
{
    return USE_AMX ? PACKED_A_ROWS * packs : packs;
}

/* The stride of a right operand of so many rows of packs and columns. */
static inline int64_t packed_b_stride(int64_t packs, int64_t columns)
{
    return USE_AMX ? packs * LANES : columns;
}

/* Where a pack lies. It can be added to a position that begins PACKED_A_ROWS rows and a micropanel, with BFMMLA two
 * rows and two packs. */
static inline int64_t packed_a_index(int64_t stride, int64_t row, int64_t pack)
{
    if (USE_MMLA)
        return (row - row % 2) * stride + (pack / 2 * 2 + row % 2) * 2 + pack % 2;
    if (!USE_AMX)
        return row * stride + pack;
    return row / PACKED_A_ROWS * stride + (pack / LANES * PACKED_A_ROWS + row % PACKED_A_ROWS) * LANES + pack % LANES;
}

/* It can be added to a position that begins a micropanel, with BFMMLA two packs. */
static inline int64_t packed_b_index(int64_t stride, int64_t pack, int64_t column)
{
    if (USE_MMLA)
        return (pack - pack % 2) * stride + column * 2 + pack % 2;
    return USE_AMX ? column / LANES * stride + pack * LANES + column % LANES : pack * stride + column;
}

/* The part of A that begins at this row and at number k of its rows. */
static inline struct packed_a a_from(struct packed_a A, int64_t row, int64_t k)
{
    return (struct packed_a){A.data + packed_a_index(A.stride, row, k / K_PACK), A.stride};
}

/* The part of B that begins at number k of its columns, and at this column. */
static inline struct packed_b b_from(struct packed_b B, int64_t k, int64_t column)
{
    return (struct packed_b){B.data + packed_b_index(B.stride, k / K_PACK, column), B.stride};
}

static inline struct matrix matrix_from(struct matrix C, int64_t row, int64_t column)
{
    return (struct matrix){C.data + row * C.stride + column, C.stride};
}

/* Scores, and with them m and L, are kept as S_UNIT * S. Reals stay in base e: L, which callers get in base e, then has
 * no rounding but its own, and P near 1 is exact for scores of any size. Dot products of bf16 are multiplied by a
 * factor anyway, of which log2(e) is a part: there S is in base 2, and P, which has 8 bits, hides what L is off by. */
#define S_UNIT (K_PACK > 1 ? LOG2E : 1.0)

/* exp of a score in that unit, or of a difference of two. */
static inline vec exp_of(vec x)
{
    return K_PACK > 1 ? vec_exp2(x) : vec_exp(x);
}
