/* Attention sinks: one more logit of each query head in the softmax, which has no key and no value. Nothing is
 * different while keys are visited; the sink enters at the end, and its gradient (attention_dsinks) needs D and L
 * alone. */

/* The sink of a query head, in units of log 2; finite, so that no difference is NaN unless it is itself. */
METAL_FUNC float sink_of(device const float *sinks, constant mfa_args &args, thread const sequence &seq, int head)
{
    float sink = sinks[head_offset(seq, args.sinks, head)] * LOG2E;
    return sink < SINK_MIN ? SINK_MIN : sink;
}

/* Brings m and l of a row to their end; returns what its O is multiplied by, 0 for a row without keys. */
METAL_FUNC float softmax_end(thread softmax_state &s, device const float *sinks, constant mfa_args &args,
                             thread const sequence &seq, int head)
{
#if defined(SINKS)
    float sink = sink_of(sinks, args, seq, head), m = sink > s.m ? sink : s.m, alpha = softmax_rescale(s.m, m);
    s = softmax_state{m, s.l * alpha + softmax_rescale(sink, m)};
    float inverse = softmax_inverse(s.l) * alpha;
#else
    float inverse = softmax_inverse(s.l);
#endif
#if defined(DROPOUT)
    inverse *= args.keep_scale;
#endif
    return inverse;
}

/* exp(sink - L), for a sink and L as they are given: their difference is exact where both are large. */
METAL_FUNC float sink_probability(float sink, float L)
{
    float distance = sink - L;
    return fast::exp2((distance < SINK_MIN ? SINK_MIN : distance) * LOG2E); /* -inf counts as SINK_MIN */
}
