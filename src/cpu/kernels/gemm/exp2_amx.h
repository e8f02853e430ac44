/* exp2.h by tile registers: exponentials of one tile stand between the instructions of the next one's product. */

/* A product of two by two blocks, an instruction at a time, so that other work can stand between. */
struct gemm_steps {
    struct amx_a A; /* of the next step, as B */
    struct packed_b B;
    int64_t each, done, due; /* products of registers: of a part, times `parts`; done; to be done, likewise */
};

static inline void gemm_steps_begin(struct gemm_steps *s, struct amx_a A, struct packed_b B, int64_t k)
{
    *s = (struct gemm_steps){A, B, 4 * padded(k) / LANES, 0, 0};
    amx_load_c(2, 2, (struct matrix){NULL, 0}, GEMM_STORE);
}

/* The next of `parts` parts. */
static inline void gemm_step(struct gemm_steps *s, int parts)
{
    const size_t a_bytes = (size_t)s->A.row * sizeof(packed), b_bytes = LANES * sizeof(packed);
    for (s->due += s->each; s->done * parts < s->due; s->done++)
        switch (s->done % 4) {
        case 0:
            _tile_loadd(4, s->A.data, a_bytes);
            _tile_loadd(6, s->B.data, b_bytes);
            _tile_dpbf16ps(0, 4, 6);
            break;
        case 1:
            _tile_loadd(7, s->B.data + s->B.stride, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
            break;
        case 2:
            _tile_loadd(5, s->A.data + LANES * s->A.row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            break;
        default: _tile_dpbf16ps(3, 5, 7); s->A.data += s->A.step, s->B.data += LANES * LANES;
        }
}

/* factor * S - m; with a bias, factor * S + bias - m. */
static inline vec minus_m(const real *S, real factor, const real *bias, vec m)
{
    if (!bias)
        return vec_fma(vec_load(S), vec_set1(factor), vec_sub(vec_set1(0), m));
    return vec_sub(score_plus(vec_mul(vec_load(S), vec_set1(factor)), bias), m);
}

/* P of KEY_UNIT keys of S, and its sums. Between the exponentials stands the product S_next = K Q^T, unless k is 0. */
static inline __attribute__((always_inline)) void exp2_tile(const real *S, struct exp2_epilogue e, struct kv_block K,
                                                            struct packed_b Q, int64_t k, real *S_next,
                                                            struct prefetch_cursor *next)
{
    enum { ROWS = 4, PARTS = KEY_UNIT / ROWS };
    for (int pair = 0; pair < PANEL_VECTORS; pair += 2) {
        struct gemm_steps product;
        gemm_steps_begin(&product, amx_a_of_rows(K), b_from(Q, 0, pair * LANES), k);
        for (int64_t at = pair * LANES; at < (pair + 2) * LANES; at += LANES) {
            vec l[2] = {vec_set1(0), vec_set1(0)}, reference = vec_load(e.m + at);
            for (int part = 0; part < PARTS; part++) {
                for (int64_t j = part * ROWS; j < (part + 1) * ROWS; j += 2) {
                    const real *bias = e.bias ? e.bias + j * PANEL + at : NULL, *Sj = S + j * PANEL + at;
                    vec even = vec_exp2(minus_m(Sj, e.factor, bias, reference));
                    vec odd = vec_exp2(minus_m(Sj + PANEL, e.factor, bias ? bias + PANEL : NULL, reference));
                    l[0] = vec_add(l[0], even);
                    l[1] = vec_add(l[1], odd);
                    store_b_pair(b_from(e.P, 0, at), j, even, odd);
                }
                if (next)
                    prefetch_next(next, 1);
                gemm_step(&product, 2 * PARTS);
            }
            vec_store(e.l + at, vec_add(l[0], l[1]));
        }
        if (k)
            amx_store_c(2, 2, (struct matrix){S_next + pair * LANES, PANEL});
    }
}

static inline __attribute__((always_inline)) int64_t exp2_tiles(int64_t keys, struct kv_block K, struct packed_b Q,
                                                                int64_t k, struct exp2_epilogue e)
{
    enum { R = KEY_UNIT };
    _Alignas(64) real S[2][R * PANEL], sum[PANEL];
    Q.stride = packed_b_stride(padded(k), PANEL);
    gemm_nn(keys < R ? 0 : R, PANEL_VECTORS, K, Q, (struct matrix){S[0], PANEL}, k, 1);
    int64_t done = 0;
    for (int turn = 0; done + R <= keys; done += R, turn = !turn) {
        struct exp2_epilogue tile = exp2_from(e, done);
        tile.l = sum;
        exp2_tile(S[turn], tile, block_from(K, done + R), Q, done + 2 * R <= keys ? k : 0, S[!turn], K.next);
        if (!add_sums(e.l, sum))
            break;
    }
    return done;
}

/* How many keys are done: whole tiles, up to one in which a score exceeds m + RESCALE_THRESHOLD. Not inline, where the
 * pointers of the loop would lie in memory. With a bias nothing is prefetched. */
static __attribute__((noinline)) int64_t gemm_exp2(int64_t keys, struct kv_block K, struct packed_b Q, int64_t k,
                                                   struct exp2_epilogue e)
{
    const struct kv_block quiet = {K.rows, K.stride, NULL};
    if (K.next && !e.bias)
        return exp2_tiles(keys, K, Q, k, e);
    if (e.bias)
        return exp2_tiles(keys, quiet, Q, k, e);
    e.bias = NULL; /* as in exp2_tile.h: the compiler knows that there is none */
    return exp2_tiles(keys, quiet, Q, k, e);
}
