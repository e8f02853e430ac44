/* What the kernels of the backward pass share. */

struct backward_operands {
    device const storage *Q, *dO;
    kv_operands kv;
    score_operands score;
    device const float *D, *L; /* [batch][q_heads][q_len] */
};
