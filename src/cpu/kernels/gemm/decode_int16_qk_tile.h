/* Template of decode_int16.h: TILE, sums of Q K^T for KEYS keys, QUERIES queries; sums [key][R], lane by lane. */

#define ZERO(r, k) int_vec acc_##r##_##k = int_set1(0);
#define ZERO_KEY(k, R) ROWS_##R(ZERO, k)
#define LOAD_Q(r, k) const int_vec q_##r = int_load(Q + (r) * stride + t / 2);
#define DOT(r, k) acc_##r##_##k = int_add(acc_##r##_##k, int_pairs(q_##r, key_##k));
#define DOT_KEY(k, R)                                                                  \
    const int_vec key_##k = int_load_int8((const uint8_t *)K.rows + (k) * K.step + t); \
    ROWS_##R(DOT, k)
#define STORE(r, k) sums[(k) * R + (r)] = vec_of_ints(acc_##r##_##k);
#define STORE_KEY(k, R) ROWS_##R(STORE, k)

static inline __attribute__((always_inline)) void TILE(const int R, const int32_t *Q, int64_t stride, struct kv_rows K,
                                                       int64_t columns, vec *sums, struct prefetch_cursor *next)
{
    struct prefetch_cursor cursor = *next;
    UNROLL_ROWS(KEYS, ZERO_KEY, QUERIES)
    ONE_BY_ONE for (int64_t t = 0; t < columns; t += INT16_COLUMNS)
    {
        UNROLL_QUERIES(QUERIES, LOAD_Q, 0)
        UNROLL_ROWS(KEYS, DOT_KEY, QUERIES)
        prefetch_lines(&cursor, KEYS * INT16_COLUMNS);
    }
    UNROLL_ROWS(KEYS, STORE_KEY, QUERIES)
    *next = cursor;
}

#undef TILE
#undef QUERIES
#undef KEYS
#undef ZERO
#undef ZERO_KEY
#undef LOAD_Q
#undef DOT
#undef DOT_KEY
#undef STORE
#undef STORE_KEY
