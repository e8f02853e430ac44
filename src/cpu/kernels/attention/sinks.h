/* Attention sinks: one more logit of each query head in the softmax, which has no key and no value. Nothing is
 * different while keys are visited; the sink enters at the end (softmax_end), and its gradient
 * (dsinks.h) needs D and L alone. */

/* The sink of a query head. */
static inline double sink_of(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t head)
{
    const void *sink = score_row_of(seq, call->sinks, sizeof(float), &call->args.sinks, head, 0);
    return (double)*(const float *)sink;
}

/* m and l with a sink, in the unit of S as m is, and what O is multiplied by, to be relative to the new m. */
struct sink_sum {
    double m, l, alpha;
};

static inline struct sink_sum add_sink(double m, double l, double sink)
{
    const double top = sink > m ? sink : m, alpha = exp((m - top) / S_UNIT);
    return (struct sink_sum){top, l * alpha + exp((sink - top) / S_UNIT), alpha};
}
