/* All reads of K and V, and of Q and dO, which are read the same way: where row n of a head lies, its dtype, and how
 * rows become tiles in threadgroup memory or fragments in registers. */

/* The rows of one head of an operand. */
struct row_source {
    device const storage *base; /* row 0, column 0 */
    long row_stride, column_stride, rows, columns;
    bool vec4; /* four neighbours of a row are one aligned load */
};

METAL_FUNC row_source k_source(device const storage *K, constant mfa_metal_call &call, thread const sequence &seq,
                               long kv_head)
{
    constant mfa_args &args = call.args;
    return row_source{K + kv_offset(seq, args.k, kv_head, 0),   args.k.row, args.k.column, seq.kv_len, args.head_dim,
                      bool(call.vec4 >> MFA_METAL_BUFFER_K & 1)};
}

METAL_FUNC row_source v_source(device const storage *V, constant mfa_metal_call &call, thread const sequence &seq,
                               long kv_head)
{
    constant mfa_args &args = call.args;
    return row_source{V + kv_offset(seq, args.v, kv_head, 0),   args.v.row, args.v.column, seq.kv_len, args.value_dim,
                      bool(call.vec4 >> MFA_METAL_BUFFER_V & 1)};
}

METAL_FUNC row_source q_source(device const storage *Q, constant mfa_metal_call &call, thread const sequence &seq,
                               long head)
{
    constant mfa_args &args = call.args;
    return row_source{Q + q_offset(seq, args.q, head, 0),       args.q.row, args.q.column, seq.q_len, args.head_dim,
                      bool(call.vec4 >> MFA_METAL_BUFFER_Q & 1)};
}

METAL_FUNC row_source do_source(device const storage *dO, constant mfa_metal_call &call, thread const sequence &seq,
                                long head)
{
    constant mfa_args &args = call.args;
    return row_source{
        dO + q_offset(seq, args.d_o, head, 0),     args.d_o.row, args.d_o.column, seq.q_len, args.value_dim,
        bool(call.vec4 >> MFA_METAL_BUFFER_DO & 1)};
}

METAL_FUNC device const storage *row_address(thread const row_source &source, long row)
{
    return source.base + row * source.row_stride;
}

/* Copies rows `first` to `first` + ROWS into a tile, all LANES lanes of the threadgroup together, `thread_index` being
 * the caller's. Rows and columns past the end are 0. */
template <int ROWS, int COLUMNS, int LANES>
METAL_FUNC void load_tile(threadgroup storage *tile, thread const row_source &source, long first, uint thread_index)
{
    device const storage *from = row_address(source, first);
    long rows = source.rows - first;
    for (int run = int(thread_index); run < ROWS * COLUMNS / 4; run += LANES) {
        int row = run / (COLUMNS / 4), column = run % (COLUMNS / 4) * 4;
        storage4 x = storage4{0, 0, 0, 0};
        if (row < rows) {
            device const storage *at = from + row * source.row_stride + column * source.column_stride;
            if (source.vec4 && column + 4 <= source.columns) {
                x = *(device const storage4 *)at;
            } else {
                UNROLL
                for (int i = 0; i < 4; i++)
                    if (column + i < source.columns)
                        x[i] = at[i * source.column_stride];
            }
        }
        *(threadgroup storage4 *)(tile + row * PADDED(COLUMNS) + column) = x;
    }
}

/* Loads a lane's elements of a row: two from `column` on, and two of every 8 columns after it. They are 0 past the end
 * of the row, or all if the row is not valid. */
template <int FRAGMENTS>
METAL_FUNC void load_row(thread storage2 *x, thread const row_source &source, long row, long column, bool valid)
{
    device const storage *from = row_address(source, row);
    UNROLL
    for (int d = 0; d < FRAGMENTS; d++, column += 8) {
        x[d] = storage2{0, 0};
        if (valid && column < source.columns)
            x[d][0] = from[column * source.column_stride];
        if (valid && column + 1 < source.columns)
            x[d][1] = from[(column + 1) * source.column_stride];
    }
}
