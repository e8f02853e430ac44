/* From Q K^T to scores: scale, softcap, additive mask, ALiBi, band, masks and block map, and the softcap's derivative.
 * In the forward pass scores are in units of log 2, so that P = exp2(S - m).
 *
 * Kernels walk along blocks of keys, for a lane that has a query, or along blocks of queries, for a lane that has a
 * key. Either way the lane computes the elements t = 0, 1, ... of a block, and a `mask_range` says which of them are
 * masked out. A masked score is finite, so that no difference of two is NaN:
 *
 *     SCORE_MASKED < ROW_MAX_INIT < SCORE_MIN        exp2(SCORE_MASKED - m) is 0 for any m from ROW_MAX_INIT on
 *
 * ROW_MAX_INIT (softmax.h) is the m of a row before its first key. A score that is not masked is at least SCORE_MIN: an
 * additive mask often has -FLT_MAX where it means "almost masked", which in units of log 2 would not be finite. Such a
 * bias is clamped to a power of two, which L keeps exactly, so a row of nothing else has finite P, too. */

#define SCORE_MASKED (-1.0e38f)
#define SCORE_MIN (-0.9e38f)
#define BIAS_MIN (-4.2535296e37f) /* -2^125 */

/* What P is made of beside Q and K, as arguments of a kernel and as one struct: the mask, and what is known of its
 * blocks, which only MASKED kernels read; ALiBi's slopes; the seed of dropout, in words; the block map. */
#if defined(ALIBI)
#define SLOPES_BUFFER , device const float *slopes [[buffer(19)]]
#define SLOPES_OPERAND , slopes
#else
#define SLOPES_BUFFER
#define SLOPES_OPERAND
#endif
#if defined(DROPOUT)
#define SEED_BUFFER , device const uint *seed [[buffer(22)]]
#define SEED_OPERAND , seed
#else
#define SEED_BUFFER
#define SEED_OPERAND
#endif
#if defined(BLOCK_MAP)
#define MAP_BUFFER , device const uchar *block_map [[buffer(23)]]
#define MAP_OPERAND , block_map
#else
#define MAP_BUFFER
#define MAP_OPERAND
#endif
#define SCORE_BUFFERS                              \
    device const mask_storage *mask [[buffer(9)]], \
        device const uchar *block_mask [[buffer(1)]] SLOPES_BUFFER SEED_BUFFER MAP_BUFFER
#define SCORE_OPERANDS                                           \
    score_operands                                               \
    {                                                            \
        mask, block_mask SLOPES_OPERAND SEED_OPERAND MAP_OPERAND \
    }

struct score_operands {
    device const mask_storage *mask;
    device const uchar *block_mask;
#if defined(ALIBI)
    device const float *slopes;
#endif
#if defined(DROPOUT)
    device const uint *seed;
#endif
#if defined(BLOCK_MAP)
    device const uchar *block_map;
#endif
};

struct mask_range {
    int low, high; /* elements outside [low, high] are masked out */
#if defined(BLOCK_MAP)
    device const uchar *map; /* its row with the query, or its column with the key */
    uint shown;              /* bit n: elements 16 n to 16 n + 15 are in a visible block of the map */
#endif
#if defined(MASKED)
    device const mask_storage *mask; /* of element 0 */
    long step;
    bool partial; /* the mask must be applied to each element */
#endif
#if defined(ALIBI)
    float slope, distance, direction; /* element t lies |distance + direction * t| from its query's place */
#endif
};

#if defined(ALIBI)
/* For elements that begin with query i and key j of a head: they go on along queries (direction 1) or keys (-1). The
 * distance of element 0 is rounded to a float's 24 bits, which is as exact as its product with the slope. */
METAL_FUNC void mask_range_add_alibi(thread mask_range &r, thread const score_operands &in,
                                     constant mfa_metal_call &call, thread const sequence &seq, int head, int i, int j,
                                     float direction)
{
    r.slope = in.slopes[head_offset(seq, call.args.slopes, head)] * call.bias_factor;
    r.distance = float(i + seq.kv_len - seq.q_len - j);
    r.direction = direction;
}
#endif

/* The same range, relative to `offset` elements after its own first. */
METAL_FUNC void mask_range_move(thread mask_range &r, thread const mask_range &from, int offset)
{
    r.low = from.low - offset;
    r.high = from.high - offset;
}

/* Whether the first `length` elements all count, and nothing but their own score does. */
METAL_FUNC bool mask_range_is_full(thread const mask_range &r, int length)
{
#if defined(BLOCK_MAP)
    if (r.shown != (2u << (length - 1) / 16) - 1)
        return false;
#endif
#if defined(MASKED)
    if (r.partial)
        return false;
#endif
    return r.low <= 0 && r.high >= length - 1;
}

/* The keys in the band of a query. */
METAL_FUNC void mask_range_of_query(thread mask_range &r, thread const score_operands &in,
                                    constant mfa_metal_call &call, thread const sequence &seq, thread const query &q)
{
#if defined(BLOCK_MAP)
    r.map =
        in.block_map + mask_offset(seq, call.args.block_map, q.head, int(uint(q.i) / uint(call.args.block_map_q)), 0);
#endif
    r.low = 0, r.high = q.valid ? seq.kv_len - 1 : -1;
#if defined(BAND)
    r.low = q.i + band_lower(call, seq);
    r.high = min(r.high, q.i + band_upper(call, seq));
#endif
}

/* The queries of a head in whose band a key is. */
METAL_FUNC void mask_range_of_key(thread mask_range &r, thread const score_operands &in, constant mfa_metal_call &call,
                                  thread const sequence &seq, int head, int key)
{
#if defined(BLOCK_MAP)
    int column = int(uint(min(key, seq.kv_len - 1)) / uint(call.args.block_map_kv));
    r.map = in.block_map + mask_offset(seq, call.args.block_map, head, 0, column);
#endif
    r.low = 0, r.high = key < seq.kv_len ? seq.q_len - 1 : -1;
#if defined(BAND)
    r.low = key - band_upper(call, seq);
    r.high = min(r.high, key - band_lower(call, seq));
#endif
}

#if defined(MASKED)
/* Adds the mask, whose value for element 0 of the block is at `mask`; `state` is one of MFA_METAL_BLOCK_*. */
METAL_FUNC void mask_range_add_mask(thread mask_range &r, device const mask_storage *mask, long step, uchar state)
{
    r.mask = mask;
    r.step = step;
    r.partial = state == MFA_METAL_BLOCK_PARTIAL;
}
#endif

#if defined(BLOCK_MAP)
/* Adds the map for the LENGTH elements of a block from query or key number `first` on, of which `last` is the last:
 * `size` of them are a block of the map, whose own elements lie `step` apart. A block of 16 is in one of the map. */
template <int LENGTH>
METAL_FUNC void mask_range_add_map(thread mask_range &r, device const uchar *map, mfa_int size, mfa_int step, int first,
                                   int last)
{
    r.shown = 0;
    UNROLL
    for (int n = 0; n < (LENGTH + 15) / 16; n++)
        r.shown |= map[int(uint(min(first + 16 * n, last)) / uint(size)) * step] != 0 ? 1u << n : 0u;
}
#endif

/* The score of element t, as if it counted and had no mask; `dtanh` is the derivative of the softcap's tanh, 1 without
 * a softcap. */
METAL_FUNC float score(float product, int t, thread const mask_range &r, constant mfa_metal_call &call,
                       thread float &dtanh)
{
    float x = product * call.score_factor;
    dtanh = 1.0f;
#if defined(SOFTCAP)
    float tanh_x = precise::tanh(x);
    x = tanh_x * call.cap_factor;
    dtanh = 1.0f - tanh_x * tanh_x;
#endif
#if defined(ALIBI)
    x -= r.slope * fabs(r.distance + r.direction * float(t));
#endif
    return x;
}

/* The same after the mask and the range are applied to it. */
METAL_FUNC float masked_score(float x, int t, thread const mask_range &r, constant mfa_metal_call &call)
{
    bool shown = t >= r.low && t <= r.high;
#if defined(BLOCK_MAP)
    shown = shown && (r.shown >> (uint(t) / 16) & 1u) != 0;
#endif
#if defined(MASKED)
    if (shown && r.partial) {
        mask_storage bits = r.mask[t * r.step];
        shown = !masks_out(bits);
#if defined(MASK_ADDITIVE)
        float bias = mask_value(bits);
        if (shown)
            x += (bias < BIAS_MIN ? BIAS_MIN : bias) * call.bias_factor;
#endif
    }
#endif
    x = x < SCORE_MIN ? SCORE_MIN : x; /* unlike max(), keeps a NaN */
    return shown ? x : SCORE_MASKED;
}

/* The same of ROWS rows. */
template <int ROWS> METAL_FUNC bool mask_ranges_are_full(thread const mask_range *ranges, int length)
{
    bool full = true;
    UNROLL
    for (int r = 0; r < ROWS; r++)
        full = full && mask_range_is_full(ranges[r], length);
    return full;
}

/* The scores S of a block's elements from `first` on, in place, and their dtanh, for ROWS rows of FRAGMENTS fragments.
 * A block of `length` elements all of whose scores count skips what hides them: then a score may be -inf, which exp2
 * makes 0. */
template <int ROWS, int FRAGMENTS>
METAL_FUNC void score_tile(thread float2 *S, thread float2 *dtanh, int first, int length,
                           thread const mask_range *ranges, lane_coord at, constant mfa_metal_call &call)
{
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                float derivative;
                thread float2 &x = S[r * FRAGMENTS + n];
                x[e] = score(x[e], first + n * 8 + at.column + e, ranges[r], call, derivative);
                dtanh[r * FRAGMENTS + n][e] = derivative;
            }
        }
    }
    if (mask_ranges_are_full<ROWS>(ranges, length))
        return;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                thread float2 &x = S[r * FRAGMENTS + n];
                x[e] = masked_score(x[e], first + n * 8 + at.column + e, ranges[r], call);
            }
        }
    }
}

/* dZ, the gradient of Q K^T but for the scale, from that of P. */
METAL_FUNC float2 score_gradient(float2 P, float2 dP, float2 D, float2 dtanh)
{
    return P * (dP - D) * dtanh;
}
