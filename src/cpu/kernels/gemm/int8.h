/* Products of bytes, for K and V that are int8 with a scale for each row:
 *
 *     S[key][lane]      = K_scale[key] * Q_scale[lane] * (sum over packs t of K[key][t] Q[t][lane] + K_start[key])
 *     O[column][lane]  += weight[lane] * sum over packs t of V[t][column] P[t][lane]
 *
 * A pack is four bytes along k. The signed bytes are K and V as they are; Q, which has signs, too, is multiplied as
 * Q + 128, and K_start takes away what that adds: -128 times the sum of the key's codes. Sums are exact: one of 512
 * columns, or of 65000 keys, stays below 2^31. Tiles are INT8_ROWS rows by a panel. */

enum { INT8_K = 4, INT8_ROWS = 8 }; /* bytes of a pack; rows of a tile */

/* Packs for n bytes along k, and of a row of them, whole vectors. */
static inline int64_t int8_packs(int64_t n)
{
    return (n + INT8_K - 1) / INT8_K;
}

static inline int64_t int8_row(int64_t n)
{
    return padded(int8_packs(n));
}

#if INT8_PRODUCTS
#define LOAD_BYTES(r, v) const vec b_##v = vec_load(b + (v) * LANES);
#define INT_DOT(r, v) acc_##r##_##v = int_dot(a_##r, b_##v, acc_##r##_##v);
#define INT_DOT_ROW(r, V)                   \
    const packed a_##r = a[(r) * row_step]; \
    UNROLL_VECTORS_##V(INT_DOT, r)
#define INT_PRODUCT(R)                                                \
    for (int64_t t = 0; t < packs; t++, a += pack_step, b += PANEL) { \
        UNROLL_VECTORS(PANEL_VECTORS, LOAD_BYTES, 0)                  \
        UNROLL_ROWS(R, INT_DOT_ROW, PANEL_VECTORS)                    \
    }
#define INT_ZERO(r, v) int_vec acc_##r##_##v = int_set1(0);
#define INT_ZERO_ROW(r, V) UNROLL_VECTORS_##V(INT_ZERO, r)
#define LOAD_FACTOR(r, v) const vec factor_##v = vec_load(factors + (v) * LANES);
#define STORE_INT_S(r, v)                                               \
    acc_##r##_##v = int_add(acc_##r##_##v, int_set1(K_start[i + (r)])); \
    vec_store(S + (i + (r)) * PANEL + (v) * LANES,                      \
              vec_mul(vec_of_ints(acc_##r##_##v), vec_mul(factor_##v, vec_set1(K_scale[i + (r)]))));
#define STORE_INT_S_ROW(r, V) UNROLL_VECTORS_##V(STORE_INT_S, r)
#define ADD_INT_O(r, v)                            \
    vec_store(O + (i + (r)) * PANEL + (v) * LANES, \
              vec_fma(vec_of_ints(acc_##r##_##v), factor_##v, vec_load(O + (i + (r)) * PANEL + (v) * LANES)));
#define ADD_INT_O_ROW(r, V) UNROLL_VECTORS_##V(ADD_INT_O, r)

/* S of `rows` keys, whole tiles: row-major packs K that lie `row_step` apart, and k-interleaved packs Q of a panel. */
static __attribute__((noinline)) void int8_scores(int64_t rows, int64_t packs, const packed *K, int64_t row_step,
                                                  const int32_t *K_start, const real *K_scale, const packed *Q,
                                                  const real *factors, real *S)
{
    enum { pack_step = 1 };
    for (int64_t i = 0; i < rows; i += INT8_ROWS) {
        const packed *a = K + i * row_step, *b = Q;
        UNROLL_ROWS(8, INT_ZERO_ROW, PANEL_VECTORS)
        INT_PRODUCT(8)
        UNROLL_VECTORS(PANEL_VECTORS, LOAD_FACTOR, 0)
        UNROLL_ROWS(8, STORE_INT_S_ROW, PANEL_VECTORS)
    }
}

#define INT8_VALUES(R)                            \
    const packed *a = V + i, *b = P;              \
    UNROLL_ROWS(R, INT_ZERO_ROW, PANEL_VECTORS)   \
    INT_PRODUCT(R)                                \
    UNROLL_VECTORS(PANEL_VECTORS, LOAD_FACTOR, 0) \
    UNROLL_ROWS(R, ADD_INT_O_ROW, PANEL_VECTORS)

/* O of `columns` columns, whole vectors, += factors * V^T P^T, of k-interleaved packs V, rows of which lie `pack_step`
 * apart. Where a vector is half a tile, one may be left. */
static __attribute__((noinline)) void int8_values(int64_t columns, int64_t packs, const packed *V, int64_t pack_step,
                                                  const packed *P, const real *factors, real *O)
{
    enum { row_step = 1 };
    int64_t i = 0;
    for (; i + INT8_ROWS <= columns; i += INT8_ROWS) {
        INT8_VALUES(8)
    }
    if (LANES < INT8_ROWS && i < columns) {
        INT8_VALUES(4)
    }
}
#endif
