/* Template of decode_int16.h: TILE, O += units * P V for n keys, QUERIES queries and VECTORS vectors of columns from c
 * on, two or four. */

#define ZERO(r, v) int_vec acc_##r##_##v = int_set1(0);
#define ZERO_COLUMN(v, R) ROWS_##R(ZERO, v)
#define LOAD_P(r, v) const int_vec p_##r = int_set1(P[r]);
#define DOT(r, v) acc_##r##_##v = int_add(acc_##r##_##v, int_pairs(p_##r, line_##v));
#define DOT_COLUMNS(v, w, R)                                                       \
    int_vec line_##v, line_##w;                                                    \
    int_zip_int8(at + (v) * LANES, at + (v) * LANES + pair, &line_##v, &line_##w); \
    ROWS_##R(DOT, v) ROWS_##R(DOT, w)
#define ADD(r, v)                              \
    vec_store(O + (r) * columns + (v) * LANES, \
              vec_fma(sum_##v, vec_set1(units[r]), vec_load(O + (r) * columns + (v) * LANES)));
#define ADD_BOTH(r, v, w)                                                               \
    {                                                                                   \
        vec sum_##v = vec_of_ints(acc_##r##_##v), sum_##w = vec_of_ints(acc_##r##_##w); \
        vec_unzip_columns(&sum_##v, &sum_##w);                                          \
        ADD(r, v) ADD(r, w)                                                             \
    }
#define ADD_0(r, v) ADD_BOTH(r, 0, 1)
#define ADD_2(r, v) ADD_BOTH(r, 2, 3)

static inline __attribute__((always_inline)) void TILE(const int R, const int32_t *P, const real *units,
                                                       struct kv_rows V, int64_t n, real *O, int64_t columns, int64_t c,
                                                       struct prefetch_cursor *next)
{
    const int64_t keys = LANES / R, pair = keys * V.step;
    const uint8_t *at = (const uint8_t *)V.rows + c;
    struct prefetch_cursor cursor = *next;
    O += c;
    UNROLL_ROWS(VECTORS, ZERO_COLUMN, QUERIES)
    for (int64_t k = 0; k < n; k += 2 * keys, at += pair)
        ONE_BY_ONE for (int64_t i = 0; i < keys; i++, at += V.step, P += R)
        {
            UNROLL_QUERIES(QUERIES, LOAD_P, 0)
            UNROLL_PAIRS(VECTORS, DOT_COLUMNS, QUERIES)
            prefetch_lines(&cursor, 2 * VECTORS * LANES);
        }
    UNROLL_QUERIES(QUERIES, ADD_0, 0)
#if VECTORS == 4
    UNROLL_QUERIES(QUERIES, ADD_2, 0)
#endif
    *next = cursor;
}

#undef TILE
#undef QUERIES
#undef VECTORS
#undef ZERO
#undef ZERO_COLUMN
#undef LOAD_P
#undef DOT
#undef DOT_COLUMNS
#undef ADD
#undef ADD_BOTH
#undef ADD_0
#undef ADD_2
