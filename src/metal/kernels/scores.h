/* From Q K^T to scores: softcap, mask, band. Forward they are in units of log 2, so that P = exp2(S - m).
 *
 * Kernels walk along tiles: of keys, for a lane that has a query; of queries, for a lane that has a key. Either
 * way the lane meets the elements t = 0, 1, ... of a tile, and what it sees of them is a `sight`. A hidden score is
 * finite, so that no difference of two is NaN:
 *
 *     HIDDEN < NOTHING < LOWEST        exp2(HIDDEN - m) is 0 for any m from NOTHING on
 *
 * NOTHING is the m of a row that has seen no key yet. A score itself is LOWEST or more: an additive mask often has
 * -FLT_MAX where it means "as good as hidden", which in units of log 2 would not be finite. It is cut to a power of
 * two, which comes through L and back as it was, and so a row of nothing else has P that are finite, too. */

#define HIDDEN (-1.0e38f)
#define NOTHING (-0.95e38f)
#define LOWEST (-0.9e38f)
#define LOWEST_BIAS (-4.2535296e37f) /* -2^125 */
#define UNSEEN 1.0e38f /* L of a row without keys, for the backward pass: exp(S - L) is 0 for all its S */

/* L of a row, as bits: m is in units of log 2, ln(2) in two parts, for m may be large and L is to be right to the last
 * bit. */
METAL_FUNC uint log_sum_exp(float m, float l)
{
    float L = fma(m, 0.693147182f, fma(m, -1.90465421e-9f, precise::log(l)));
    return l != 0.0f ? as_type<uint>(L) : NEGATIVE_INFINITY;
}

struct sight {
    int low, high; /* elements outside are hidden */
#if defined(MASKED)
    device const mask_storage *mask; /* of element 0 */
    long step;
    bool mixed; /* the mask must be looked at */
#endif
};

/* Elements [low, high] as the lane counts them, cut to a tile of `length` that begins at `first`. */
METAL_FUNC void sight_cut(thread sight &s, long low, long high, long first, int length)
{
    s.low = int(clamp(low - first, long(0), long(length)));
    s.high = int(clamp(high - first, long(-1), long(length - 1)));
}

#if defined(MASKED)
/* Adds the mask, of which element 0 of the tile is `mask`; 0 if it hides the tile. */
METAL_FUNC bool sight_of_mask(thread sight &s, device const mask_storage *mask, long step, uchar tile_class)
{
    s.mask = mask;
    s.step = step;
    s.mixed = tile_class == MFA_METAL_TILE_MIXED;
    return tile_class != MFA_METAL_TILE_HIDDEN;
}
#endif

/* The score of element t; `slope` is its derivative to what the softcap was given. */
METAL_FUNC float score(float product, int t, thread const sight &s, constant mfa_metal_call &call, thread float &slope)
{
    float x = product * call.score_factor;
    slope = 1.0f;
#if defined(SOFTCAP)
    float bent = precise::tanh(x);
    x = bent * call.cap_factor;
    slope = 1.0f - bent * bent;
#endif
    bool shown = t >= s.low && t <= s.high;
#if defined(MASKED)
    if (shown && s.mixed) {
        mask_storage bits = s.mask[t * s.step];
        shown = !mask_hides(bits);
#if defined(MASK_ADDITIVE)
        float bias = mask_value(bits);
        if (shown)
            x += (bias < LOWEST_BIAS ? LOWEST_BIAS : bias) * call.bias_factor;
#endif
    }
#endif
    x = x < LOWEST ? LOWEST : x; /* so that a NaN stays one */
    return shown ? x : HIDDEN;
}

/* The scores S of a tile's elements from `first` on, in place, and their slopes. */
template <int FRAGMENTS>
METAL_FUNC void score_tile(thread float2 *S, thread float2 *slope, int first, thread const sight &s, place at,
                           constant mfa_metal_call &call)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            float bent;
            S[n][e] = score(S[n][e], first + n * 8 + at.column + e, s, call, bent);
            slope[n][e] = bent;
        }
    }
}
