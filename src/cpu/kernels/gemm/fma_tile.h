/* Template of fma.h: TILE, one register tile of ROWS rows by VECTORS vectors of C. Where it adds, C, which may be far
 * away, is fetched while the product goes on. */

#define C_AT(r, v) (C.data + (r) * C.stride + (v) * LANES)
#define FETCH_C(r, v) __builtin_prefetch(C_AT(r, v), 1);
#define FETCH_C_ROW(r, V) UNROLL_VECTORS_##V(FETCH_C, r)
#define STORE_C(r, v)                                                   \
    if (mode == GEMM_ADD)                                               \
        acc_##r##_##v = vec_add(vec_load(C_AT(r, v)), acc_##r##_##v);   \
    else if (K_PACK > 1)                                                \
        acc_##r##_##v = vec_mul(acc_##r##_##v, vec_set1(extra.factor)); \
    vec_store(C_AT(r, v), acc_##r##_##v);
#define STORE_C_ROW(r, V) UNROLL_VECTORS_##V(STORE_C, r)

static inline __attribute__((always_inline)) void TILE(struct strided_a A, struct packed_b B, struct matrix C,
                                                       int64_t k, enum gemm_mode mode, struct gemm_extra extra)
{
    struct prefetch_cursor cursor = {.at = NULL};
    const packed *a = A.data, *b = B.data;
    const int64_t steps = k_steps(k);
    int64_t t = 0;
    if (extra.cursor)
        cursor = *extra.cursor; /* a copy, which lives in registers */
    if (mode == GEMM_ADD) {
        UNROLL_ROWS(ROWS, FETCH_C_ROW, VECTORS)
    }
    UNROLL_ROWS(SUM_ROWS(ROWS), ACC_ZERO_ROW, VECTORS)
    ACCUMULATE(TILE_UNROLL, ROWS, VECTORS, t, steps, if (extra.cursor) prefetch_next(&cursor, ROWS * K_STEP))
    SUMS_TO_ROWS(ROWS, VECTORS)
    UNROLL_ROWS(ROWS, STORE_C_ROW, VECTORS)
    if (extra.cursor)
        *extra.cursor = cursor;
}

#undef TILE
#undef ROWS
#undef VECTORS
#undef C_AT
#undef FETCH_C
#undef FETCH_C_ROW
#undef STORE_C
#undef STORE_C_ROW
