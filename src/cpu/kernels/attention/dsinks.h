/* dsink = -sum of exp(sink - L) * D over the queries of a head: a task for each element of dsinks. L is the
 * caller's, so that sink - L is exact where both are large; a query whose L is -inf has no part in it. */

static double dsink_of_head(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t head)
{
    const double sink = sink_of(call, seq, head);
    double sum = 0;
    for (int64_t block = 0; block < seq->of_head[CPU_Q_BLOCKS]; block++) {
        const struct q_block q = q_block_of(call, seq, head, block);
        const real *D = q_block_D(call, &q, 0);
        for (int64_t i = 0; i < q.rows; i++) {
            const real L = *(const real *)q_block_row(&q, call->lse, sizeof(real), &call->args.lse, i);
            const double P = L == -(real)INFINITY ? 0 : exp(sink - (double)L);
            sum -= P * ((double)D[i] / (call->kept * (OPERANDS_AS_GIVEN ? 1 : call->dS_factor)));
        }
    }
    return sum;
}

/* An element of dsinks, summed over the dimensions along which it has stride 0. */
static void dsinks(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    const int64_t batches = a->dsinks.batch ? 1 : a->batch, heads = a->dsinks.head ? 1 : a->q_heads;
    const int64_t elements = a->dsinks.head ? a->q_heads : 1; /* of a batch entry */
    const int64_t head = task % elements, batch = task / elements;
    const struct mfa_cpu_sequence first = mfa_cpu_sequence_of(call, batch);
    double sum = 0;
    (void)worker;
    for (int64_t b = batch; b < batch + batches; b++) {
        const struct mfa_cpu_sequence seq = mfa_cpu_sequence_of(call, b);
        for (int64_t h = head; h < head + heads; h++)
            sum += dsink_of_head(call, &seq, h);
    }
    *(float *)(void *)score_row_of(&first, call->dsinks, sizeof(float), &a->dsinks, head, 0) = (float)sum;
}
