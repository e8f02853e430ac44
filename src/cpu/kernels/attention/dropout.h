/* Dropout: which P of a panel are kept, by Philox4x32-10 of the counter (key / 8, query, query head, batch entry), as
 * core/philox.h has it for one; here a lane is a query. P is dropped after the softmax has summed it up; what is kept
 * is divided by 1 - dropout (`kept` of the call) where O and the gradients are written. */

/* Words of 32 bits in the low halves of 64, where products of two have room. The queries of a vector of f32 take two
 * such vectors, those of even lanes and those of odd ones. */
enum { DROPOUT_WIDES = sizeof(real) == 8 ? 1 : 2, DROPOUT_KEYS = MFA_PHILOX_KEYS };

/* As many bits as a real, one a lane. */
typedef word word_vec __attribute__((vector_size(sizeof(vec))));
typedef __typeof__(_Generic((real)0, double: (int64_t)0, float: (int32_t)0)) signed_vec
    __attribute__((vector_size(sizeof(vec))));

/* What two rounds leave of a counter without its key / 8, which they mix in but do not multiply with the rest. */
struct dropout_lanes {
    wide_vec x0[DROPOUT_WIDES], x2[DROPOUT_WIDES], x3[DROPOUT_WIDES];
};

/* Of a panel. */
struct dropout {
    struct dropout_lanes lanes[PANEL_VECTORS];
    uint64_t batch, keys[2][MFA_PHILOX_ROUNDS]; /* of Philox: the seed's words, round by round */
    int32_t below;                              /* 16 bits below it drop a P */
};

static inline uint64_t low_word(uint64_t x)
{
    return x & 0xffffffff;
}

/* Whether P may be dropped: a probability below 2^-17 drops none. */
static inline int has_dropout(const struct mfa_cpu_call *call)
{
    return (call->features & CPU_DROPOUT) && call->args.drop_below > 0;
}

static void dropout_start(struct dropout *d, const struct mfa_cpu_call *call, const struct panel *panel)
{
    const struct mfa_cpu_sequence *seq = panel->seq;
    const uint64_t seed =
        *(const uint64_t *)(const void *)score_row_of(seq, call->seed, sizeof seed, &call->args.seed, 0, 0);
    d->batch = (uint64_t)seq->batch;
    d->below = (int32_t)call->args.drop_below;
    for (uint32_t r = 0; r < MFA_PHILOX_ROUNDS; r++) {
        d->keys[0][r] = low_word(seed + r * MFA_PHILOX_W0);
        d->keys[1][r] = low_word((seed >> 32) + r * (uint64_t)MFA_PHILOX_W1);
    }
    for (int64_t lane = 0; lane < panel->vectors * LANES; lane++) {
        struct dropout_lanes *lanes = &d->lanes[lane / LANES];
        const int64_t at = lane % LANES, n = at % DROPOUT_WIDES, i = at / DROPOUT_WIDES;
        const uint64_t p1 = (uint64_t)MFA_PHILOX_M1 * low_word((uint64_t)panel->head[lane]);
        const uint64_t x0 = p1 >> 32 ^ (uint64_t)panel->row[lane] ^ d->keys[0][0];
        const uint64_t p0 = (uint64_t)MFA_PHILOX_M0 * low_word(x0);
        lanes->x0[n][i] = p1 ^ d->keys[0][1];
        lanes->x2[n][i] = p0 >> 32 ^ d->keys[1][1];
        lanes->x3[n][i] = p0;
    }
}

/* The numbers of the eight keys from 8 * group on: those of keys 2 r and 2 r + 1 are the halves of words[r]. */
static inline void dropout_words(const struct dropout *d, int v, int64_t group, word_vec words[4])
{
    const struct dropout_lanes *lanes = &d->lanes[v];
    const uint64_t first0 = (uint64_t)MFA_PHILOX_M0 * low_word((uint64_t)group);
    const uint64_t first1 = (uint64_t)MFA_PHILOX_M1 * low_word(first0 >> 32 ^ d->batch ^ d->keys[1][0]);
    wide_vec x[DROPOUT_WIDES][4];
    for (int n = 0; n < DROPOUT_WIDES; n++) {
        wide_vec x0 = lanes->x0[n] ^ first1 >> 32, x1 = (wide_vec){0} + first1, x2 = lanes->x2[n] ^ first0,
                 x3 = lanes->x3[n];
#pragma GCC unroll 8
        for (int r = 2; r < MFA_PHILOX_ROUNDS; r++) {
            const wide_vec p0 = wide_mul(x0, MFA_PHILOX_M0), p1 = wide_mul(x2, MFA_PHILOX_M1);
            x0 = p1 >> 32 ^ x1 ^ d->keys[0][r];
            x1 = p1;
            x2 = p0 >> 32 ^ x3 ^ d->keys[1][r];
            x3 = p0;
        }
        x[n][0] = x0, x[n][1] = x1, x[n][2] = x2, x[n][3] = x3;
    }
    for (int w = 0; w < 4; w++) {
        wide_vec even = x[0][w] & 0xffffffff;
        if (DROPOUT_WIDES > 1)
            even |= x[DROPOUT_WIDES - 1][w] << 32;
        words[w] = (word_vec)even;
    }
}

/* x of the even or the odd key of a word, or 0. */
static inline vec keep_even(const struct dropout *d, word_vec numbers, vec x)
{
    return (vec)((signed_vec)x & ((signed_vec)(numbers & 0xffff) >= d->below));
}

static inline vec keep_odd(const struct dropout *d, word_vec numbers, vec x)
{
    return (vec)((signed_vec)x & ((signed_vec)(numbers >> 16 & 0xffff) >= d->below));
}

/* Zeros where numbers of n keys from `key` on are dropped, of vector v; key is even. */
static void drop_rows(const struct dropout *d, int v, int64_t key, int64_t n, struct matrix C)
{
    word_vec words[4];
    for (int64_t k = 0; k < n; k += 2) {
        const int64_t at = (key + k) % DROPOUT_KEYS;
        real *row = C.data + k * C.stride;
        if (k == 0 || at == 0)
            dropout_words(d, v, (key + k) / DROPOUT_KEYS, words);
        vec_store(row, keep_even(d, words[at / 2], vec_load(row)));
        if (k + 1 < n)
            vec_store(row + C.stride, keep_odd(d, words[at / 2], vec_load(row + C.stride)));
    }
}

/* The same of P as a right operand. */
static void drop_b(const struct dropout *d, int v, int64_t key, int64_t n, struct packed_b P)
{
#if K_PACK == 1
    drop_rows(d, v, key, n, (struct matrix){P.data, P.stride});
#else
    const half_vec most = (half_vec){0} + (uint16_t)(d->below - 1);
    word_vec words[4];
    for (int64_t k = 0; k < n; k += 2) {
        const int64_t at = (key + k) % DROPOUT_KEYS;
        if (k == 0 || at == 0)
            dropout_words(d, v, (key + k) / DROPOUT_KEYS, words);
        mask_b_packs(P, k, (half_vec)((half_vec)words[at / 2] > most));
    }
#endif
}

#if INT8_PRODUCTS
/* The same of packs of four bytes, P[key / 4][PANEL]; key and n are multiples of 4. */
static void drop_bytes(const struct dropout *d, int v, int64_t key, int64_t n, packed *P)
{
    const half_vec most = (half_vec){0} + (uint16_t)(d->below - 1);
    word_vec words[4];
    for (int64_t k = 0; k < n; k += 4, P += PANEL) {
        const int64_t at = (key + k) % DROPOUT_KEYS;
        if (k == 0 || at == 0)
            dropout_words(d, v, (key + k) / DROPOUT_KEYS, words);
        const word_vec first = (word_vec)((half_vec)words[at / 2] > most);
        const word_vec second = (word_vec)((half_vec)words[at / 2 + 1] > most);
        const word_vec kept =
            (first & 0xff) | (first >> 8 & 0xff00) | (second << 16 & 0xff0000) | (second & 0xff000000);
        vec_store(P, (vec)((word_vec)vec_load(P) & kept));
    }
}
#endif
