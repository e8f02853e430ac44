/* Template of decode.h: TILE, the products of QUERIES queries and KEYS keys, lane by lane, into sums[key][query]. */

#define ZERO_KEY(k, R) ROWS_##R(ACC_ZERO, k)
#define LOAD_Q(r, k) const vec q_##r = vec_load(Q + (r) * LANES);
#define DOT(r, k) acc_##r##_##k = vec_dots(key_##k, q_##r, acc_##r##_##k);
#define DOT_KEY(k, R)                                                 \
    const vec key_##k = load_widened(K.rows + (k) * K.step, K.dtype); \
    ROWS_##R(DOT, k)
#define GROUP_OF_KEY(k, n) const struct code_group group_##k = code_group_at(K, k, (n) * K.scale_column);
#define DOT_CODES(k, R)                                                                  \
    const vec key_##k = codes_at(K, K.rows + (k) * K.step, t + i * LANES, i, group_##k); \
    ROWS_##R(DOT, k)
#define STORE(r, k) sums[(k) * QUERIES + (r)] = acc_##r##_##k;
#define STORE_KEY(k, R) ROWS_##R(STORE, k)

static inline __attribute__((always_inline)) void TILE(const packed *Q, struct kv_rows K, int64_t columns, vec *sums,
                                                       struct prefetch_cursor *next)
{
    const int64_t step = codes_step(K.dtype), bytes = LANES * (is_half(K.dtype) ? 2 * K_PACK : (int64_t)sizeof(packed));
    struct prefetch_cursor cursor = *next;
    UNROLL_ROWS(KEYS, ZERO_KEY, QUERIES)
    for (int64_t t = 0, g = 0; t < columns && is_codes(K.dtype); g++) {
        const int64_t end = !K.scaled_by_row && K.group < columns - t ? t + K.group : columns;
        UNROLL_ROWS(KEYS, GROUP_OF_KEY, g)
        for (; t < end; t += step)
            _Pragma("GCC unroll 4") for (int i = 0; i < step / LANES; i++, Q += QUERIES * LANES)
            {
                UNROLL_QUERIES(QUERIES, LOAD_Q, 0)
                UNROLL_ROWS(KEYS, DOT_CODES, QUERIES)
                prefetch_codes(&cursor, K.dtype, KEYS * LANES);
            }
    }
    ONE_BY_ONE for (int64_t t = 0; t < columns && !is_codes(K.dtype); t += LANES, Q += QUERIES * LANES, K.rows += bytes)
    {
        UNROLL_QUERIES(QUERIES, LOAD_Q, 0)
        UNROLL_ROWS(KEYS, DOT_KEY, QUERIES)
        prefetch_packs(&cursor, KEYS * LANES);
    }
    UNROLL_ROWS(KEYS, STORE_KEY, QUERIES)
    *next = cursor;
}

#undef TILE
#undef QUERIES
#undef KEYS
#undef ZERO_KEY
#undef LOAD_Q
#undef DOT
#undef DOT_KEY
#undef GROUP_OF_KEY
#undef DOT_CODES
#undef STORE
#undef STORE_KEY
