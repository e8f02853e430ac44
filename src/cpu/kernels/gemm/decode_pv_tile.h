/* Template of decode.h: TILE, O += P V for n keys, QUERIES queries and VECTORS vectors of columns from c on. Where
 * packs are pairs, P holds those of keys k and k + LANES / R; half as in value_load, and of a block of 4-bit codes. */

#define ZERO_COLUMN(v, R) ROWS_##R(ACC_ZERO, v)
#define LOAD_P(r, v) const packed p_##r = P[r];
#define DOT(r, v) acc_##r##_##v = vec_dot(p_##r, line_##v, acc_##r##_##v);
#define COLUMN_OF_SCALE(v, n) \
    const int64_t scale_##v = is_codes(V.dtype) && !V.scaled_by_row ? (c + (v) * LANES) / V.group * V.scale_column : 0;
#define GROUP(v, n)                                                                                                   \
    groups[v] = is_nibbles(V.dtype) && (v) * LANES % MFA_KV_BLOCK > 0 ? groups[(v) > 0 ? (v) - 1 : 0] /* a block's */ \
                                                                      : code_group_at(V, 0, scale_##v);
#define VALUE(v)                                                                      \
    (is_codes(V.dtype) ? codes_at(V, V.rows, c + (v) * LANES, first + (v), groups[v]) \
                       : value_load(V.rows + (c + (v) * LANES) * bytes, pair, (half + (v)) % 2, V.dtype))
#define DOT_COLUMN(v, R)     \
    vec line_##v = VALUE(v); \
    ROWS_##R(DOT, v)
#define ADD(r, v)                             \
    at = O + (r) * columns + c + (v) * LANES; \
    vec_store(at, vec_add(vec_load(at), acc_##r##_##v));
#define ADD_COLUMN(v, R) ROWS_##R(ADD, v)

static inline __attribute__((always_inline)) void TILE(const packed *P, struct kv_rows V, int64_t n, real *O,
                                                       int64_t columns, int64_t c, const int half,
                                                       struct prefetch_cursor *next)
{
    const int64_t keys = K_PACK > 1 ? LANES / QUERIES : 1, pair = keys * V.step;
    const int64_t bytes = is_half(V.dtype) ? 2 : (int64_t)sizeof(real);
    struct prefetch_cursor cursor = *next;
    real *at;
    const int first = VECTORS * LANES % MFA_KV_BLOCK == 0 ? 0
                      : 2 * LANES == MFA_KV_BLOCK         ? half
                                                          : (int)(c % MFA_KV_BLOCK) / LANES;
    UNROLL_ROWS(VECTORS, COLUMN_OF_SCALE, 0)
    UNROLL_ROWS(VECTORS, ZERO_COLUMN, QUERIES)
    for (int64_t k = 0; k < n; k += K_PACK * keys, V.rows += pair * (K_PACK - 1))
        ONE_BY_ONE for (int64_t i = 0; i < keys; i++, V.rows += V.step, P += QUERIES)
        {
            UNROLL_QUERIES(QUERIES, LOAD_P, 0)
            struct code_group groups[VECTORS];
            if (is_codes(V.dtype)) {
                UNROLL_ROWS(VECTORS, GROUP, 0)
            }
            UNROLL_ROWS(VECTORS, DOT_COLUMN, QUERIES)
            if (is_codes(V.dtype)) {
                V.scales += V.scale_step;
                prefetch_codes(&cursor, V.dtype, VECTORS * LANES);
            } else {
                prefetch_packs(&cursor, VECTORS * LANES);
            }
        }
    UNROLL_ROWS(VECTORS, ADD_COLUMN, QUERIES)
    *next = cursor;
}

#undef TILE
#undef QUERIES
#undef VECTORS
#undef ZERO_COLUMN
#undef LOAD_P
#undef DOT
#undef DOT_COLUMN
#undef COLUMN_OF_SCALE
#undef GROUP
#undef VALUE
#undef ADD
#undef ADD_COLUMN
