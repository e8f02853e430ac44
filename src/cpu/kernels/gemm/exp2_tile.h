/* Template of exp2_fma.h: TILE, P of a tile of S and the next tile of S; TILES, many of them; GEMM_EXP2, the same for
 * each kind of epilogue. Tiles have ROWS rows of K; PART rows of a vector of exponentials come before each part of the
 * multiply-adds. Memory is prefetched in the products (PREFETCH_IN_PRODUCT) or, where these are short, before them. */

#define MINUS_M(r, v) const vec minus_m_##v = vec_sub(vec_set1(0), vec_load(e.m + (v) * LANES));
#define STORE_S(r, v)                        \
    vec_store(S + (r) * PANEL + (v) * LANES, \
              K_PACK > 1 ? vec_fma(acc_##r##_##v, vec_set1(e.factor), minus_m_##v) : acc_##r##_##v);
#define STORE_S_ROW(r, V) UNROLL_VECTORS_##V(STORE_S, r)

/* P and its sums of the tile S, in whose place the next one is then stored: ROWS rows of A, k packs of them. */
static inline __attribute__((always_inline)) void TILE(struct kv_block K, struct packed_b Q, int64_t k,
                                                       real *restrict S, struct exp2_epilogue e,
                                                       struct prefetch_cursor *next)
{
    const struct strided_a A = a_of_packed(K.rows, K.stride);
    const struct packed_b B = {Q.data, PANEL};
    const packed *restrict a = A.data, *restrict b = B.data;
    packed *restrict p = e.P.data;
    const struct packed_b P = {p, PANEL};
    real *restrict l = e.l;
    const int64_t steps = k_steps(k);
    struct prefetch_cursor cursor = {.at = NULL};
    int64_t t = 0;
    if (next)
        cursor = *next;
    UNROLL_ROWS(ROWS, ACC_ZERO_ROW, PANEL_VECTORS)
    ALL_PARTS
    for (int64_t i = 0; i < ROWS * PANEL_VECTORS / PART; i++) {
        const int64_t lane = i / (ROWS / PART) * LANES, key = i % (ROWS / PART) * PART, at = key * PANEL + lane;
        exp_part(PART, S + at, e.bias ? e.bias + at : NULL, e.m + lane, l + lane, b_from(P, key, lane));
        const int64_t end = steps * (i + 1) / (ROWS * PANEL_VECTORS / PART);
        ACCUMULATE(PART_UNROLL, ROWS, PANEL_VECTORS, t, end, if (next) prefetch_next(&cursor, ROWS * K_STEP))
    }
    SUMS_TO_ROWS(ROWS, PANEL_VECTORS)
    UNROLL_VECTORS(PANEL_VECTORS, MINUS_M, 0)
    UNROLL_ROWS(ROWS, STORE_S_ROW, PANEL_VECTORS)
    if (K_PACK == 1 && e.factor != 1)
        scale_vectors(S, ROWS * PANEL, (double)e.factor);
    if (next)
        *next = cursor;
}

static inline __attribute__((always_inline)) int64_t TILES(int64_t keys, struct kv_block K, struct packed_b Q,
                                                           int64_t k, struct exp2_epilogue e)
{
    _Alignas(64) real S[ROWS * PANEL];
    int64_t done = 0;
    if (keys < ROWS)
        return 0;
    gemm_minus_m(ROWS, K, Q, k, e.factor, e.m, S);
    for (; done + ROWS <= keys; done += ROWS) {
        _Alignas(64) real sum[PANEL] = {0};
        const int64_t next_k = done + 2 * ROWS <= keys ? k : 0;
        struct exp2_epilogue tile = exp2_from(e, done);
        tile.l = sum;
        if (K.next && !PREFETCH_IN_PRODUCT)
            prefetch_all(K.next, ROWS * next_k);
        TILE(block_from(K, next_k ? done + ROWS : 0), Q, next_k, S, tile, PREFETCH_IN_PRODUCT ? K.next : NULL);
        if (!add_sums(e.l, sum))
            break;
    }
    return done;
}

/* Not inline, where the pointers of the loop would lie in memory. */
static __attribute__((noinline)) int64_t GEMM_EXP2(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k,
                                                   struct exp2_epilogue e)
{
    const struct kv_block quiet = {K.rows, K.stride, NULL};
    if (K.next)
        return TILES(keys, K, Q, k, e);
    if (e.bias)
        return TILES(keys, quiet, Q, k, e);
    e.bias = NULL;
    return TILES(keys, quiet, Q, k, e);
}

#undef TILE
#undef TILES
#undef GEMM_EXP2
#undef ROWS
#undef PART
#undef PREFETCH_IN_PRODUCT
#undef MINUS_M
#undef STORE_S
#undef STORE_S_ROW
