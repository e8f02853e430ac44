/* The lengths of one batch entry, and where its rows lie. Kernels read q_len, kv_len, the band and strides of batches
 * and heads through these functions.
 *
 * With VARLEN, lengths and places are numbers on the device, which an earlier command may have written: the host knows
 * only how long an entry may be. Grids are those of such an entry, and threadgroups beyond the end of theirs return.
 * Numbers are clamped, so that wrong ones never lead outside of a tensor.
 *
 * Lengths, and so the numbers of rows, keys and blocks of a head, are at most 2^30, as mfa_metal_tiles_supports sees
 * to: 32 bits hold them, and the sums and differences of their indices. Offsets of elements are 64-bit. */

#if defined(VARLEN)
#if defined(PAGED)
#define TABLE_BUFFER , device const int *block_table [[buffer(29)]]
#define TABLE_OPERAND , block_table
#else
#define TABLE_BUFFER
#define TABLE_OPERAND
#endif
#define INDEX_BUFFERS                                                                               \
    , device const int *cu_seqlens_q [[buffer(24)]], device const int *cu_seqlens_k [[buffer(25)]], \
        device const int *seqused_k [[buffer(26)]], device const int *leftpad_k [[buffer(27)]],     \
        device const int *cache_batch_idx [[buffer(28)]] TABLE_BUFFER
#define INDEX_OPERANDS                                                                  \
    index_operands                                                                      \
    {                                                                                   \
        cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, cache_batch_idx TABLE_OPERAND \
    }

struct index_operands {
    device const int *cu_seqlens_q, *cu_seqlens_k, *seqused_k, *leftpad_k, *cache_batch_idx;
#if defined(PAGED)
    device const int *block_table;
#endif
};
#else
#define INDEX_BUFFERS
#define INDEX_OPERANDS \
    index_operands     \
    {                  \
    }

struct index_operands {
};
#endif

struct sequence {
    int batch, q_len, kv_len;
#if defined(VARLEN)
    int q_batch, q_row;   /* where its first query lies in tensors of queries */
    int kv_batch, kv_row; /* the same of keys; with pages the row counts from the first page */
    int lower, upper;     /* the band */
#endif
#if defined(PAGED)
    device const int *block_table; /* of this entry */
#endif
};

#if defined(VARLEN)
METAL_FUNC int clamp_index(int value, int low, int high)
{
    return min(max(value, low), high);
}

/* Number n of a tensor of one number for each batch entry. */
METAL_FUNC int index_of(device const int *values, constant mfa_strides &s, int n)
{
    return values[n * s.batch];
}

/* Rows [first, first + count) of a packed tensor of `total` rows: those of a batch entry, which has `most` or fewer. */
struct packed_rows {
    int first, count;
};

METAL_FUNC packed_rows packed_rows_of(device const int *cu_seqlens, constant mfa_strides &s, int batch, int total,
                                      int most)
{
    int first = clamp_index(index_of(cu_seqlens, s, batch), 0, total);
    int end = clamp_index(index_of(cu_seqlens, s, batch + 1), first, total);
    return packed_rows{first, min(end - first, most)};
}

/* A side of the band, `shift` further on. Of most bands it does not fit into 32 bits before it is clamped. */
METAL_FUNC int band_side(mfa_int side, int shift, thread const sequence &seq)
{
    mfa_int moved = side + shift, low = -seq.q_len, high = seq.kv_len;
    return int(moved < low ? low : moved > high ? high : moved);
}

/* A batch entry with all keys that lie in K and V for it, whether they count or not. */
METAL_FUNC sequence all_keys_of(constant mfa_metal_call &call, thread const index_operands &in, int batch)
{
    constant mfa_args &args = call.args;
    sequence seq;
    seq.batch = seq.q_batch = seq.kv_batch = batch;
    seq.q_row = seq.kv_row = 0;
    seq.q_len = int(args.q_len), seq.kv_len = int(args.kv_len);
    if (args.varlen_kv) {
        packed_rows rows = packed_rows_of(in.cu_seqlens_k, args.cu_seqlens_k, batch, int(args.total_kv), seq.kv_len);
        seq.kv_batch = 0, seq.kv_row = rows.first, seq.kv_len = rows.count;
    }
    if (args.has_cache_batch_idx)
        seq.kv_batch =
            clamp_index(index_of(in.cache_batch_idx, args.cache_batch_idx, batch), 0, int(args.kv_batch) - 1);
    return seq;
}

METAL_FUNC sequence sequence_of(constant mfa_metal_call &call, thread const index_operands &in, int batch)
{
    constant mfa_args &args = call.args;
    sequence seq = all_keys_of(call, in, batch);
    if (args.varlen_q) {
        packed_rows rows = packed_rows_of(in.cu_seqlens_q, args.cu_seqlens_q, batch, int(args.total_q), seq.q_len);
        seq.q_batch = 0, seq.q_row = rows.first, seq.q_len = rows.count;
    }
    if (args.has_seqused_k)
        seq.kv_len = clamp_index(index_of(in.seqused_k, args.seqused_k, batch), 0, seq.kv_len);
    if (args.has_leftpad_k) {
        int padding = clamp_index(index_of(in.leftpad_k, args.leftpad_k, batch), 0, seq.kv_len);
        seq.kv_row += padding, seq.kv_len -= padding;
    }
    int shift = args.bottom_right ? seq.kv_len - seq.q_len : 0;
    seq.lower = band_side(args.lower, shift, seq), seq.upper = band_side(args.upper, shift, seq);
    if (args.lower > args.upper) /* no query attends to any key, nor does a block of them */
        seq.lower = seq.kv_len, seq.upper = -seq.q_len;
#if defined(PAGED)
    seq.block_table = in.block_table + batch * args.block_table.batch;
#endif
    return seq;
}

/* The batch entry to which row `row` of packed queries belongs; -1: to none. */
METAL_FUNC int entry_of_query(constant mfa_metal_call &call, thread const index_operands &in, int row)
{
    constant mfa_args &args = call.args;
    int first = 0, end = int(args.batch); /* the last entry that begins at or before the row is among these */
    while (end - first > 1) {
        int middle = (first + end) / 2;
        if (index_of(in.cu_seqlens_q, args.cu_seqlens_q, middle) <= row)
            first = middle;
        else
            end = middle;
    }
    packed_rows rows = packed_rows_of(in.cu_seqlens_q, args.cu_seqlens_q, first, int(args.total_q), int(args.q_len));
    return row >= rows.first && row < rows.first + rows.count ? first : -1;
}
#else
METAL_FUNC sequence sequence_of(constant mfa_metal_call &call, thread const index_operands &, int batch)
{
    return sequence{batch, int(call.args.q_len), int(call.args.kv_len)};
}
#endif

/* The band: query i attends to keys i + lower to i + upper. */
METAL_FUNC int band_lower(constant mfa_metal_call &call, thread const sequence &seq)
{
#if defined(VARLEN)
    return seq.lower;
#else
    return int(call.args.lower);
#endif
}

METAL_FUNC int band_upper(constant mfa_metal_call &call, thread const sequence &seq)
{
#if defined(VARLEN)
    return seq.upper;
#else
    return int(call.args.upper);
#endif
}

/* Rows of a batch entry of queries, as tensors have them. */
METAL_FUNC long q_rows_of(constant mfa_args &args)
{
#if defined(VARLEN)
    return args.varlen_q ? args.total_q : args.q_len;
#else
    return args.q_len;
#endif
}

/* Offsets, in elements, of row i of a query head and of row j of a KV head in an operand with these strides. */
METAL_FUNC long q_offset(thread const sequence &seq, constant mfa_strides &s, int head, int i)
{
#if defined(VARLEN)
    return seq.q_batch * s.batch + head * s.head + (seq.q_row + i) * s.row;
#else
    return seq.batch * s.batch + head * s.head + i * s.row;
#endif
}

METAL_FUNC long kv_offset(thread const sequence &seq, constant mfa_strides &s, int kv_head, int j)
{
#if defined(VARLEN)
    return seq.kv_batch * s.batch + kv_head * s.head + (seq.kv_row + j) * s.row;
#else
    return seq.batch * s.batch + kv_head * s.head + j * s.row;
#endif
}

/* The offset of the mask, or dbias, of query i and key j. */
METAL_FUNC long mask_offset(thread const sequence &seq, constant mfa_strides &s, int head, int i, int j)
{
    return seq.batch * s.batch + head * s.head + i * s.row + j * s.column;
}

/* The offset of the number that a query head of the batch entry has: its slope, its sink. */
METAL_FUNC long head_offset(thread const sequence &seq, constant mfa_strides &s, int head)
{
    return seq.batch * s.batch + head * s.head;
}

/* The index of a query in D and L of the workspace, [batch][q_heads][q_len]; of packed queries [q_heads][total_q]. */
METAL_FUNC long row_stats_index(thread const sequence &seq, constant mfa_args &args, int head, int i)
{
#if defined(VARLEN)
    return (seq.q_batch * args.q_heads + head) * q_rows_of(args) + seq.q_row + i;
#else
    return (seq.batch * args.q_heads + head) * seq.q_len + i;
#endif
}

/* The index of row `row` of a KV head among all rows: of their parts in the workspace. */
METAL_FUNC long packed_row_index(constant mfa_metal_call &call, thread const sequence &seq, int kv_head, int row)
{
#if defined(VARLEN)
    return ((seq.q_batch * call.args.kv_heads + kv_head) * q_rows_of(call.args) + seq.q_row) * call.pack_gqa + row;
#else
    return (seq.batch * call.args.kv_heads + kv_head) * (seq.q_len * call.pack_gqa) + row;
#endif
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

/* The query with this number among the rows of all batch entries and of `heads` groups of `pack` query heads. Packed
 * queries are taken as those of one entry, of which `batch` is the number. */
struct numbered_query {
    sequence seq;
    query q;
};

METAL_FUNC numbered_query query_of_number(constant mfa_metal_call &call, uint number, uint heads, uint pack)
{
    numbered_query n;
    uint rows = uint(q_rows_of(call.args)) * pack, group = number / rows, batch = group / heads;
#if defined(VARLEN)
    n.q.valid = batch < (call.args.varlen_q ? 1 : uint(call.args.batch));
#else
    n.q.valid = batch < uint(call.args.batch);
#endif
    uint row = n.q.valid ? number % rows : 0;
    n.seq.batch = n.q.valid ? int(batch) : 0; /* its lengths are not known here */
#if defined(VARLEN)
    n.seq.q_batch = n.seq.batch, n.seq.q_row = 0;
#endif
    n.q.head = int((n.q.valid ? group % heads : 0) * pack + row % pack);
    n.q.i = int(row / pack);
    return n;
}
