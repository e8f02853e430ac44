/* One batch entry: its lengths, its band, and where its rows lie. Drivers take lengths and addresses from here. */
struct sequence {
    int64_t batch, q_len, kv_len;
    int64_t lower, upper; /* query i sees keys i + lower to i + upper */
};

static inline struct sequence sequence_of(const struct mfa_cpu_call *call, int64_t batch)
{
    const struct mfa_args *a = &call->args;
    return (struct sequence){batch, a->q_len, a->kv_len, a->lower, a->upper};
}

/* Where a row of one of its tensors begins; elements have `bytes` bytes. */
static inline const char *sequence_row(const struct sequence *seq, const void *data, int64_t bytes,
                                       const struct mfa_strides *s, int64_t head, int64_t row)
{
    return (const char *)data + bytes * (seq->batch * s->batch + head * s->head + row * s->row);
}
