/* The lengths of one batch entry, and where its rows lie. Kernels read q_len, kv_len and strides of batches and heads
 * through these functions.
 *
 * Lengths, and so the numbers of rows, keys and blocks of a head, are at most 2^30, as mfa_metal_tiles_supports sees
 * to: 32 bits hold them, and the sums and differences of their indices. Offsets of elements are 64-bit. */

struct sequence {
    int batch, q_len, kv_len;
};

METAL_FUNC sequence sequence_of(constant mfa_metal_call &call, int batch)
{
    return sequence{batch, int(call.args.q_len), int(call.args.kv_len)};
}

/* Offsets, in elements, of row i of a query head and of row j of a KV head in an operand with these strides. */
METAL_FUNC long q_offset(thread const sequence &seq, constant mfa_strides &s, int head, int i)
{
    return seq.batch * s.batch + head * s.head + i * s.row;
}

METAL_FUNC long kv_offset(thread const sequence &seq, constant mfa_strides &s, int kv_head, int j)
{
    return seq.batch * s.batch + kv_head * s.head + j * s.row;
}

/* The offset of the mask, or dbias, of query i and key j. */
METAL_FUNC long mask_offset(thread const sequence &seq, constant mfa_strides &s, int head, int i, int j)
{
    return seq.batch * s.batch + head * s.head + i * s.row + j * s.column;
}

/* The index of a query in D and L of the workspace, [batch][q_heads][q_len]. */
METAL_FUNC long row_stats_index(thread const sequence &seq, constant mfa_args &args, int head, int i)
{
    return (seq.batch * args.q_heads + head) * seq.q_len + i;
}

/* A query; one that is not valid lies past the last row, and has i = 0. */
struct query {
    int head, i;
    bool valid;
};

/* Row r of a KV head is query r / pack_gqa of the head r % pack_gqa of its group: so few queries of many heads fill a
 * block together, and the queries of a block are neighbours. */
METAL_FUNC query query_of(constant mfa_metal_call &call, thread const sequence &seq, int kv_head, int row)
{
    query q;
    int pack = int(call.pack_gqa);
    q.valid = row < seq.q_len * pack;
    q.i = q.valid ? row / pack : 0;
    q.head = kv_head * pack + (q.valid ? row % pack : 0);
    return q;
}

/* The query with this number among the rows of all batch entries and of `heads` groups of `pack` query heads. */
struct numbered_query {
    sequence seq;
    query q;
};

METAL_FUNC numbered_query query_of_number(constant mfa_metal_call &call, uint number, uint heads, uint pack)
{
    numbered_query n;
    uint rows = uint(call.args.q_len) * pack, group = number / rows, batch = group / heads;
    n.q.valid = batch < uint(call.args.batch);
    uint row = n.q.valid ? number % rows : 0;
    n.seq = sequence_of(call, n.q.valid ? int(batch) : 0);
    n.q.head = int((n.q.valid ? group % heads : 0) * pack + row % pack);
    n.q.i = int(row / pack);
    return n;
}
