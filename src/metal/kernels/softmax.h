/* The online softmax of a row: its start, a step, its end, and the merge of parts. m is the maximum in units of log 2,
 * l the sum of P = exp2(S - m), O the sum of P V. */

#define ROW_MAX_INIT (-0.95e38f) /* m of a row before its first key: below any score that is not masked (score.h) */
#define LSE_EMPTY_ROW 1.0e38f    /* L of a row without keys, for the backward pass: exp(S - L) is 0 for all its S */

struct softmax_state {
    float m, l;
};

METAL_FUNC softmax_state softmax_init()
{
    return softmax_state{ROW_MAX_INIT, 0.0f};
}

/* What sums relative to the maximum m are multiplied by to become relative to new_m. */
METAL_FUNC float softmax_rescale(float m, float new_m)
{
    return fast::exp2(m - new_m);
}

/* Updates m, l and O for the scores S of a tile, and replaces S by P. l stays a sum of the lane's own columns. */
template <int FRAGMENTS, int COLUMNS>
METAL_FUNC void softmax_step(thread softmax_state &s, thread float2 *O, thread float2 *S)
{
    float top = s.m;
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        top = max(top, max(S[n][0], S[n][1]));
    top = row_max(top);
    float alpha = softmax_rescale(s.m, top);
    s.m = top;
    s.l *= alpha;
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        S[n] = float2{fast::exp2(S[n][0] - top), fast::exp2(S[n][1] - top)};
        s.l += S[n][0] + S[n][1];
    }
    UNROLL
    for (int d = 0; d < COLUMNS; d++)
        O[d] *= alpha;
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
