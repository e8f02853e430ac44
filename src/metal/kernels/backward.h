/* What the kernels of the backward pass share. */

struct backward_operands {
    device const storage *Q, *K, *V, *dO;
    device const mask_storage *mask;
    device const uchar *classes;
    device const float *D, *L; /* [batch][q_heads][q_len] */
};

/* P = exp(S - L) */
METAL_FUNC float probability(float S, float L)
{
    return fast::exp2((S - L) * LOG2E);
}
