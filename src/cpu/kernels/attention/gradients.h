/* P = exp(S - L) and dS = P * (dP - D) of a panel; with dropout, of dP and then of P those that are kept.
 *
 * S is what forward rounded. Its error, which grows with |S|, is then in L as well, and cancels where it would show, in
 * the P of keys that outweigh others. L is in the unit of S (gemm/layout.h), but no log2(e) is left in results: dS is
 * the gradient of the scores in base e, and dK = scale * dS^T Q and dQ = scale * dS K have Q and K as the caller gave
 * them. */

/* Where P and dS of a panel go: as left operands, and dS as a right one. */
struct gradients {
    struct packed_a P, dS;
    struct packed_b dS_b;
};

/* Of lanes from `lane` on, and keys from `key` on. */
static inline struct gradients gradients_from(struct gradients to, int64_t key, int64_t lane)
{
    return (struct gradients){a_from(to.P, key, lane), a_from(to.dS, key, lane), b_from(to.dS_b, key, lane)};
}

/* S and dP as products have left them, rows `stride` apart; dtanh, rows PANEL apart, may be NULL. */
struct scores {
    const real *S, *dP;
    int64_t stride;
    const real *dtanh;
    real factor;                   /* S is still to be multiplied by it */
    const struct dropout *dropout; /* or NULL; then of the vector and the key where S begins */
    int vector;
    int64_t key;
};

/* Of n keys and some vectors of lanes. */
static inline __attribute__((always_inline)) void panel_dS_of(int drops, int vectors, int64_t n, struct scores from,
                                                              const real *L, const real *D, struct gradients to)
{
    const struct dropout *d = from.dropout;
    for (int v = 0; v < vectors; v++) {
        word_vec words[4];
        const int64_t at = v * LANES, stride = from.stride;
        const struct gradients lanes = gradients_from(to, 0, at);
        vec l = vec_load(L + at), delta = vec_load(D + at);
        for (int64_t k = 0; k < n; k += 2) {
            const real *Sk = from.S + k * stride + at, *dPk = from.dP + k * stride + at;
            const real *t = from.dtanh ? from.dtanh + k * PANEL + at : NULL;
            const int64_t kept = (from.key + k) % DROPOUT_KEYS / 2;
            if (drops && (k == 0 || kept == 0))
                dropout_words(d, from.vector + v, (from.key + k) / DROPOUT_KEYS, words);
            vec P0 = probabilities(vec_load(Sk), from.factor, l), dP0 = vec_load(dPk);
            vec dS0 = score_gradient(P0, drops ? keep_even(d, words[kept], dP0) : dP0, delta, t);
            P0 = drops ? keep_even(d, words[kept], P0) : P0;
            store_a(a_from(lanes.P, k, 0).data, P0);
            if (!GRADIENTS_IN_PLACE)
                store_a(a_from(lanes.dS, k, 0).data, dS0);
            if (k + 1 == n) {
                store_b_last(lanes.dS_b, k, dS0);
                break;
            }
            vec P1 = probabilities(vec_load(Sk + stride), from.factor, l), dP1 = vec_load(dPk + stride);
            vec dS1 = score_gradient(P1, drops ? keep_odd(d, words[kept], dP1) : dP1, delta, t ? t + PANEL : NULL);
            P1 = drops ? keep_odd(d, words[kept], P1) : P1;
            store_a(a_from(lanes.P, k + 1, 0).data, P1);
            if (!GRADIENTS_IN_PLACE)
                store_a(a_from(lanes.dS, k + 1, 0).data, dS1);
            store_b_pair(lanes.dS_b, k, dS0, dS1);
        }
    }
    pad_b(to.dS_b, n, vectors * LANES);
}

static void panel_dS(int vectors, int64_t n, struct scores from, const real *L, const real *D, struct gradients to)
{
    if (from.dropout)
        panel_dS_of(1, vectors, n, from, L, D, to);
    else
        panel_dS_of(0, vectors, n, from, L, D, to);
}
