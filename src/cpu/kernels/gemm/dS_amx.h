/* dS.h by tile registers: both products of a tile of keys go through memory. */

static __attribute__((noinline)) int64_t gemm_dS(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k,
                                                 struct kv_block V, struct packed_b dO, int64_t v, struct dS_epilogue e)
{
    enum { R = KEY_UNIT };
    _Alignas(64) real S[R * PANEL], dP[R * PANEL];
    int64_t done = 0;
    Q.stride = packed_b_stride(padded(k), PANEL), dO.stride = packed_b_stride(padded(v), PANEL);
    for (; done + R <= keys; done += R) {
        gemm_nn(R, PANEL_VECTORS, block_from(K, done), Q, (struct matrix){S, PANEL}, k, 1);
        gemm_nn(R, PANEL_VECTORS, block_from(V, done), dO, (struct matrix){dP, PANEL}, v, 1);
        for (int64_t i = 0; e.bias && i < R * PANEL; i += LANES)
            vec_store(S + i, score_plus(vec_mul(vec_load(S + i), vec_set1(e.factor)), e.bias + done * PANEL + i));
        panel_dS(PANEL_VECTORS, R, (struct scores){.S = S, .dP = dP, .stride = PANEL, .factor = e.bias ? 1 : e.factor},
                 e.L, e.D, gradients_from(e.to, done, 0));
    }
    return done;
}
