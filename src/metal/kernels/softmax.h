/* The online softmax of a row: its start, a step, its end, and the merge of parts. m is the maximum in units of log 2,
 * l the sum of P = exp2(S - m), O the sum of P V. */

#define ROW_MAX_INIT (-0.95e38f) /* m of a row before its first key: below any score that is not masked (score.h) */
#define SINK_MIN (-1.0e38f)      /* below ROW_MAX_INIT: exp2(SINK_MIN - m) is 0 */
#define LSE_EMPTY_ROW 1.0e38f    /* L of a row without keys, for the backward pass: exp(S - L) is 0 for all its S */

struct softmax_state {
    float m, l;
};

METAL_FUNC softmax_state softmax_init()
{
    return softmax_state{ROW_MAX_INIT, 0.0f};
}

/* m stays as it is until some row's maximum exceeds it by more than this, in units of log 2: P is below 2^8 then, which
 * costs no accuracy, and most tiles rescale nothing (FlashAttention-4's conditional rescaling). */
#define RESCALE_ABOVE 8.0f

METAL_FUNC bool softmax_rescales(thread const softmax_state &s, float top)
{
    return top > s.m + RESCALE_ABOVE;
}

/* What sums relative to the maximum m are multiplied by to become relative to new_m. */
METAL_FUNC float softmax_rescale(float m, float new_m)
{
    return fast::exp2(m - new_m);
}

/* Updates m, l and O of a simdgroup's ROWS for the scores S of a tile, and replaces S by P. l stays a sum of the lane's
 * own columns. */
template <int ROWS, int FRAGMENTS, int COLUMNS>
METAL_FUNC void softmax_step(thread softmax_state *s, thread float2 *O, thread float2 *S)
{
    float top[ROWS];
    bool rescales = false;
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        top[r] = s[r].m;
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++)
            top[r] = max(top[r], max(S[r * FRAGMENTS + n][0], S[r * FRAGMENTS + n][1]));
        top[r] = row_max(top[r]);
        rescales = rescales || softmax_rescales(s[r], top[r]);
    }
    if (simd_any(rescales)) {
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            float alpha = softmax_rescale(s[r].m, top[r]);
            s[r].m = top[r];
            s[r].l *= alpha;
            UNROLL
            for (int d = 0; d < COLUMNS; d++)
                O[r * COLUMNS + d] *= alpha;
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            thread float2 &P = S[r * FRAGMENTS + n];
            P = float2{fast::exp2(P[0] - s[r].m), fast::exp2(P[1] - s[r].m)};
            s[r].l += P[0] + P[1];
        }
    }
}

/* What O is multiplied by at the end: 0 for a row without keys. */
METAL_FUNC float softmax_inverse(float l)
{
    return l != 0.0f ? 1.0f / l : 0.0f;
}

/* L of a row, as bits, -inf for a row without keys. m may be large and L is to be right to the last bit, so ln(2) is
 * in two parts. */
METAL_FUNC uint log_sum_exp(float m, float l)
{
    float L = fma(m, 0.693147182f, fma(m, -1.90465421e-9f, precise::log(l)));
    return l != 0.0f ? as_type<uint>(L) : NEGATIVE_INFINITY;
}

/* L as the backward pass needs it, from its bits. */
METAL_FUNC float finite_lse(uint bits)
{
    return bits == NEGATIVE_INFINITY ? LSE_EMPTY_ROW : as_type<float>(bits);
}

/* P = exp(S - L), for scores of the backward pass. */
METAL_FUNC float2 softmax_probability(float2 S, float2 L)
{
    return float2{fast::exp2((S[0] - L[0]) * LOG2E), fast::exp2((S[1] - L[1]) * LOG2E)};
}
