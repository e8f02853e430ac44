/* The lengths of one batch entry, and where its rows lie. Kernels read q_len, kv_len and strides of batches and heads
 * through these functions. */

struct sequence {
    long batch, q_len, kv_len;
};

METAL_FUNC sequence sequence_of(constant mfa_metal_call &call, long batch)
{
    return sequence{batch, call.args.q_len, call.args.kv_len};
}

/* Offsets, in elements, of row i of a query head and of row j of a KV head in an operand with these strides. */
METAL_FUNC long q_offset(thread const sequence &seq, constant mfa_strides &s, long head, long i)
{
    return seq.batch * s.batch + head * s.head + i * s.row;
}

METAL_FUNC long kv_offset(thread const sequence &seq, constant mfa_strides &s, long kv_head, long j)
{
    return seq.batch * s.batch + kv_head * s.head + j * s.row;
}

/* The offset of the mask, or dbias, of query i and key j. */
METAL_FUNC long mask_offset(thread const sequence &seq, constant mfa_strides &s, long head, long i, long j)
{
    return seq.batch * s.batch + head * s.head + i * s.row + j * s.column;
}

/* The index of a query in D and L of the workspace, [batch][q_heads][q_len]. */
METAL_FUNC long row_stats_index(thread const sequence &seq, constant mfa_args &args, long head, long i)
{
    return (seq.batch * args.q_heads + head) * args.q_len + i;
}

/* A query; one that is not valid lies past the last row, and has i = 0. */
struct query {
    long head, i;
    bool valid;
};

/* Row r of a KV head is query r / pack_gqa of the head r % pack_gqa of its group: so few queries of many heads fill a
 * block together, and the queries of a block are neighbours. */
METAL_FUNC query query_of(constant mfa_metal_call &call, thread const sequence &seq, long kv_head, long row)
{
    query q;
    q.valid = row < seq.q_len * call.pack_gqa;
    q.i = q.valid ? row / call.pack_gqa : 0;
    q.head = kv_head * call.pack_gqa + (q.valid ? row % call.pack_gqa : 0);
    return q;
}

/* The query with this number among the rows of all batch entries and of `heads` groups of `pack` query heads. */
struct numbered_query {
    sequence seq;
    query q;
};

METAL_FUNC numbered_query query_of_number(constant mfa_metal_call &call, long number, long heads, long pack)
{
    numbered_query n;
    long rows = call.args.q_len * pack;
    n.q.valid = number < call.args.batch * heads * rows;
    long row = n.q.valid ? number % rows : 0, group = n.q.valid ? number / rows % heads : 0;
    n.seq = sequence_of(call, n.q.valid ? number / rows / heads : 0);
    n.q.head = group * pack + row % pack;
    n.q.i = row / pack;
    return n;
}
