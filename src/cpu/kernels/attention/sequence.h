/* Where the rows of a sequence lie in the tensors. Drivers take lengths and addresses from here. */

/* A row of a tensor of queries: of q, o, lse and their gradients. Elements have `bytes` bytes. */
static inline const char *q_row_of(const struct mfa_cpu_sequence *seq, const void *data, int64_t bytes,
                                   const struct mfa_strides *s, int64_t head, int64_t row)
{
    return (const char *)data + bytes * (seq->q_batch * s->batch + head * s->head + (seq->q_row + row) * s->row);
}

/* A row of a tensor of keys that has no pages: of dk and dv. */
static inline const char *kv_row_of(const struct mfa_cpu_sequence *seq, const void *data, int64_t bytes,
                                    const struct mfa_strides *s, int64_t kv_head, int64_t row)
{
    return (const char *)data + bytes * (seq->kv_batch * s->batch + kv_head * s->head + (seq->kv_row + row) * s->row);
}

/* A row of a tensor that has the batch entries, heads and rows of the scores: of the mask, the block map, dbias. Of
 * slopes, sinks and seed it is row 0. */
static inline const char *score_row_of(const struct mfa_cpu_sequence *seq, const void *data, int64_t bytes,
                                       const struct mfa_strides *s, int64_t head, int64_t row)
{
    return (const char *)data + bytes * (seq->batch * s->batch + head * s->head + row * s->row);
}
