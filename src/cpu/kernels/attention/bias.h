/* The bias tile: what a mask, ALiBi and a block map that hides keys from some of the panel add to the scores of a panel
 * and a block of keys, transposed like the scores, [key][PANEL]. A new additive term of the score, one that is known
 * for each query and key, enters here (has_bias, panel_bias), and reaches every kernel.
 *
 * A bool mask is transposed before it is widened: as many keys as a real has bytes move together. */

/* Finite masks are often the lowest number of their type: beside a score that, or log2(e) times it, would be -inf, and
 * hide. A power of two survives the way into L and back. */
#define LOWEST_BIAS (sizeof(real) == 8 ? -(real)0x1p1023 : -(real)0x1p127)

/* As many bits as a real. */
typedef __typeof__(_Generic((real)0, double: (uint64_t)0, float: (uint32_t)0)) word;

static inline int has_mask(const struct mfa_cpu_call *call)
{
    return (call->features & (CPU_MASK_BOOL | CPU_MASK_ADDITIVE)) != 0;
}

/* Whether scores may need a bias tile, and so the scratch memory for it. */
static inline int has_bias(const struct mfa_cpu_call *call)
{
    return has_mask(call) || (call->features & (CPU_ALIBI | CPU_BLOCK_MAP));
}

/* Reals that a row of the mask takes up for n keys. */
static inline int64_t mask_stride(const struct mfa_cpu_call *call, int64_t n)
{
    return padded(call->features & CPU_MASK_BOOL ? mfa_cpu_ceil(n, sizeof(real)) : n);
}

/* Rows of keys [key, key + n) as they are, mask_stride apart and each filled up with its last element. Those that lanes
 * beyond the panel's repeat are not read again. */
static void load_mask_rows(const struct panel *panel, const struct mfa_cpu_call *call, int64_t key, int64_t n,
                           real *rows)
{
    const struct mfa_strides *s = &call->args.mask;
    int is_bool = (call->features & CPU_MASK_BOOL) != 0;
    int64_t stride = mask_stride(call, n), bytes = is_bool ? 1 : bytes_of(call->mask_dtype);
    for (int64_t i = 0; i < panel->vectors * LANES; i++) {
        real *to = rows + i * stride;
        if (i > 0 && panel->row[i] == panel->row[i - 1] && panel->head[i] == panel->head[i - 1]) {
            memcpy(to, to - stride, (size_t)stride * sizeof(real));
            continue;
        }
        const char *from =
            score_row_of(panel->seq, call->mask, bytes, s, panel->head[i], panel->row[i]) + key * s->column * bytes;
        if (is_bool) {
            char *at = (char *)to;
            if (s->column == 1)
                memcpy(at, from, (size_t)n);
            else
                for (int64_t k = 0; k < n; k++)
                    at[k] = from[k * s->column];
            memset(at + n, at[n - 1], (size_t)(stride * (int64_t)sizeof(real) - n));
        } else {
            load_row(to, from, call->mask_dtype, s->column, n);
            fill(to + n, stride - n, to[n - 1]);
            quiet_nans(to, stride);
        }
    }
}

/* BLOCK_FULL or BLOCK_EMPTY if all of n words of bools say so. */
static enum block_mask classify_bools(const real *rows, int64_t n)
{
    const word ones = (word)-1 / 255, high = ones << 7;
    word shown = 0, hidden = 0;
    for (int64_t i = 0; i < n; i++) {
        word x;
        memcpy(&x, rows + i, sizeof x);
        shown |= x;
        hidden |= (x - ones) & ~x & high; /* not 0 if a byte of x is */
    }
    return !shown ? BLOCK_EMPTY : hidden ? BLOCK_PARTIAL_BIAS : BLOCK_FULL;
}

/* The same of n reals, in whole vectors, which are brought to the unit of S. */
static enum block_mask classify_biases(real *rows, int64_t n)
{
    vec top = vec_set1(-(real)INFINITY), size = vec_set1(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = vec_load(rows + i);
        top = vec_max(x, top);
        size = vec_add(size, vec_max(x, vec_sub(vec_set1(0), x)));
        vec bias = vec_max(vec_set1(LOWEST_BIAS), x);
        bias = S_UNIT != 1 ? vec_mul(bias, vec_set1((real)S_UNIT)) : bias;
        vec_store(rows + i, vec_select_less(x, vec_set1(-REAL_MAX), x, bias));
    }
    real all = horizontal_sum(size); /* NaN if one is */
    return all == 0                                               ? BLOCK_FULL
           : horizontal_max(top) == -(real)INFINITY && all == all ? BLOCK_EMPTY
                                                                  : BLOCK_PARTIAL_BIAS;
}

/* What bools add, from words of them: to[byte * step + i] for each byte of word i, n words. */
static void widen_bools(const real *restrict words, int64_t n, real *restrict to, int64_t step)
{
    static const uint8_t bytes[8][8] = {{255},
                                        {0, 255},
                                        {0, 0, 255},
                                        {0, 0, 0, 255},
                                        {0, 0, 0, 0, 255},
                                        {0, 0, 0, 0, 0, 255},
                                        {0, 0, 0, 0, 0, 0, 255},
                                        {0, 0, 0, 0, 0, 0, 0, 255}};
    for (int byte = 0; byte < (int)sizeof(real); byte++, to += step) {
        word kept;
        memcpy(&kept, bytes[byte], sizeof kept);
        for (int64_t i = 0; i < n; i++) {
            word x;
            memcpy(&x, words + i, sizeof x);
            to[i] = x & kept ? (real)0 : -(real)INFINITY;
        }
    }
}

/* How the panel sees keys [key, key + n). If BLOCK_PARTIAL_BIAS, rows are as load_mask_rows leaves them, biases in the
 * unit of S. */
static enum block_mask mask_block_mask(const struct panel *panel, const struct mfa_cpu_call *call, int64_t key,
                                       int64_t n, real *rows)
{
    enum block_mask band = band_block_mask(panel, key, n), seen;
    if (!has_mask(call) || band == BLOCK_EMPTY)
        return band;
    int64_t size = panel->vectors * LANES * mask_stride(call, n);
    load_mask_rows(panel, call, key, n, rows);
    if (call->features & CPU_MASK_BOOL)
        seen = classify_bools(rows, size);
    else
        seen = classify_biases(rows, size);
    return seen == BLOCK_FULL ? band : seen;
}

/* The same; if BLOCK_PARTIAL_BIAS, tile[k][lane] is what the mask adds. */
static enum block_mask panel_mask_bias(const struct panel *panel, const struct mfa_cpu_call *call, int64_t key,
                                       int64_t n, real *rows, real *tile)
{
    enum block_mask seen = mask_block_mask(panel, call, key, n, rows);
    if (seen != BLOCK_PARTIAL_BIAS)
        return seen;
    int64_t stride = mask_stride(call, n), lanes = panel->vectors * LANES;
    if (call->features & CPU_MASK_ADDITIVE) {
        transpose(rows, stride, tile, PANEL, lanes, stride);
        return seen;
    }
    real *words = rows + stride * PANEL;
    transpose(rows, stride, words, PANEL, lanes, stride);
    for (int64_t i = 0; i * (int64_t)sizeof(real) < n; i++)
        widen_bools(words + i * PANEL, lanes, tile + i * (int64_t)sizeof(real) * PANEL, PANEL);
    return seen;
}

/* ALiBi: -slope * |i + kv_len - q_len - j| in the unit of S, bounded so that its sum with the lowest mask is finite. If
 * `adds`, it is added to what is in the tile. Inlined into forward's loop it would take registers of problems without
 * ALiBi, which then took 3 % more time in bf16. */
static __attribute__((noinline)) void panel_alibi(const struct panel *panel, const struct mfa_cpu_call *call,
                                                  int64_t key, int64_t n, int adds, real *tile)
{
    const struct mfa_cpu_sequence *seq = panel->seq;
    for (int v = 0; v < panel->vectors; v++) {
        real slopes[LANES], distances[LANES]; /* of the first key */
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t lane = v * LANES + i;
            const float *slope = (const float *)(const void *)score_row_of(seq, call->slopes, sizeof(float),
                                                                           &call->args.slopes, panel->head[lane], 0);
            slopes[i] = (real)(-(double)*slope * S_UNIT);
            distances[i] = (real)(panel->row[lane] + seq->kv_len - seq->q_len - key);
        }
        const vec slope = vec_load(slopes), first = vec_load(distances);
        const vec lowest = vec_set1((real)(LOWEST_BIAS / 4 * S_UNIT));
        for (int64_t k = 0; k < n; k++) {
            real *at = tile + k * PANEL + v * LANES;
            const vec distance = vec_sub(first, vec_set1((real)k));
            const vec size = vec_max(distance, vec_sub(vec_set1(0), distance));
            const vec bias = vec_max(lowest, vec_mul(slope, size));
            vec_store(at, adds ? vec_add(vec_load(at), bias) : bias);
        }
    }
}

/* -inf in the tile where the map hides keys, which are otherwise seen as `seen` says. Keys that all lanes see, as where
 * the panel lies in one row of the map, need no tile. */
static __attribute__((noinline)) enum block_mask panel_block_map(const struct panel *panel,
                                                                 const struct mfa_cpu_call *call, int64_t key,
                                                                 int64_t n, enum block_mask seen, real *tile)
{
    const int64_t size = call->args.block_map_kv, lanes = panel->vectors * LANES;
    int64_t rows;
    for (struct queries q = panel_queries(panel); q.count > 0; q = queries_after(q, rows)) {
        rows = map_rows(call, q);
        const int64_t lane = panel->lanes - q.count, end = rows == q.count ? lanes : lane + rows;
        for (int64_t k = 0, next; k < n; k = next) {
            const int64_t column = (key + k) / size;
            next = (column + 1) * size - key < n ? (column + 1) * size - key : n;
            if (map_shows(call, q, column))
                continue;
            for (int64_t i = 0; i < n && seen != BLOCK_PARTIAL_BIAS; i++)
                fill(tile + i * PANEL, lanes, 0);
            seen = BLOCK_PARTIAL_BIAS;
            for (; k < next; k++)
                fill(tile + k * PANEL + lane, end - lane, -(real)INFINITY);
        }
    }
    return seen;
}

/* How the panel sees keys [key, key + n); if BLOCK_PARTIAL_BIAS, tile[k][lane] is what must be added to the scores.
 * rows and tile are room for PANEL x padded(n). */
static enum block_mask panel_bias(const struct panel *panel, const struct mfa_cpu_call *call, int64_t key, int64_t n,
                                  real *rows, real *tile)
{
    enum block_mask seen = panel_mask_bias(panel, call, key, n, rows, tile);
    if (seen == BLOCK_EMPTY)
        return seen;
    if (call->features & CPU_ALIBI) {
        panel_alibi(panel, call, key, n, seen == BLOCK_PARTIAL_BIAS, tile);
        seen = BLOCK_PARTIAL_BIAS;
    }
    return has_block_map(call) ? panel_block_map(panel, call, key, n, seen, tile) : seen;
}
