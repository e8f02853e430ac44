/* dS.h by multiply-adds. */

/* P of a row of S and its bias: in P and, where packs are pairs, in the place of S. */
static inline __attribute__((always_inline)) void exp_row(real *S, const real *bias, const real *L, struct packed_a P)
{
    for (int v = 0; v < PANEL_VECTORS; v++) {
        const int64_t at = v * LANES;
        vec p = probabilities(score_plus(vec_load(S + at), bias ? bias + at : NULL), 1, vec_load(L + at));
        store_a(a_from(P, 0, at).data, p);
        if (K_PACK > 1)
            vec_store(S + at, p);
    }
}

#define DS(r, v)                                                                                                \
    acc_##r##_##v = score_gradient(                                                                             \
        vec_load(K_PACK > 1 ? S + (r) * PANEL + (v) * LANES : e.to.P.data + (r) * e.to.P.stride + (v) * LANES), \
        acc_##r##_##v, vec_load(e.D + (v) * LANES), NULL);                                                      \
    if (K_PACK > 1)                                                                                             \
        store_a(a_from(e.to.dS, r, (v) * LANES).data, acc_##r##_##v);
#define DS_ROW(r, V) UNROLL_VECTORS_##V(DS, r)
#define DS_PAIR(even, odd, V)                                                       \
    store_b_pair(b_from(e.to.dS_b, 0, 0), even, acc_##even##_0, acc_##odd##_0);     \
    store_b_pair(b_from(e.to.dS_b, 0, LANES), even, acc_##even##_1, acc_##odd##_1); \
    store_b_pair(b_from(e.to.dS_b, 0, 2 * LANES), even, acc_##even##_2, acc_##odd##_2);

/* P and dS of a tile whose S is there: TILE_ROWS_3 rows of V times dO^T. */
static inline __attribute__((always_inline)) void dS_tile(struct kv_block V, struct packed_b dO, int64_t v, real *S,
                                                          struct dS_epilogue e)
{
    const struct strided_a A = a_of_packed(V.rows, V.stride);
    const struct packed_b B = {dO.data, PANEL};
    const packed *restrict a = A.data, *restrict b = B.data;
    const int64_t steps = k_steps(v);
    int64_t t = 0;
    UNROLL_ROWS(TILE_ROWS_3, ACC_ZERO_ROW, PANEL_VECTORS)
    for (int64_t key = 0; key < TILE_ROWS_3; key++) {
        exp_row(S + key * PANEL, e.bias ? e.bias + key * PANEL : NULL, e.L, a_from(e.to.P, key, 0));
        const int64_t end = steps * (key + 1) / TILE_ROWS_3;
        ACCUMULATE(TILE_UNROLL, TILE_ROWS_3, PANEL_VECTORS, t, end, )
    }
    SUMS_TO_ROWS(TILE_ROWS_3, PANEL_VECTORS)
    UNROLL_ROWS(TILE_ROWS_3, DS_ROW, PANEL_VECTORS)
    UNROLL_PAIRS(TILE_ROWS_3, DS_PAIR, PANEL_VECTORS)
}

/* How many keys are done: whole tiles. */
static __attribute__((noinline)) int64_t gemm_dS(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k,
                                                 struct kv_block V, struct packed_b dO, int64_t v, struct dS_epilogue e)
{
    enum { R = TILE_ROWS_3 };
    const struct gradients to = e.to;
    const real *bias = e.bias;
    int64_t done = 0;
    for (; done + R <= keys; done += R) {
        _Alignas(64) real S[R * PANEL];
        K.next = e.next ? &e.next[done / R % 2] : NULL;
        gemm_nn(R, PANEL_VECTORS, block_from(K, done), (struct packed_b){Q.data, PANEL}, (struct matrix){S, PANEL}, k,
                e.factor);
        e.to = gradients_from(to, done, 0);
        e.bias = bias ? bias + done * PANEL : NULL;
        dS_tile(block_from(V, done), dO, v, S, e);
    }
    return done;
}
