/* All reads of K and V, and of Q and dO, which are read the same way: where row n of a head lies, its dtype, and how
 * rows become tiles in threadgroup memory or fragments in registers. */

/* Walks along blocks are cut into stretches of so many blocks, so that within one 32 bits hold every distance: a block
 * has at most 64 rows. */
#if !defined(STRETCH_BLOCKS)
#define STRETCH_BLOCKS (1 << 24)
#endif
#define STRETCH_ROWS (STRETCH_BLOCKS * 64)

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

/* Where a walk along the rows of a source is: at the tile of ROWS rows that begins at `at`. */
struct tile_cursor {
    device const storage *at;
    long tile_stride; /* from one tile to the next, in elements */
    int rows;         /* from there to the end of the stretch, or of the source */
    bool regular;     /* rows are aligned groups of four elements, so near that 32 bits hold what lies between them */
};

template <int ROWS> METAL_FUNC tile_cursor tile_cursor_of(thread const row_source &source, long first)
{
    constexpr long FAR = (1l << 31) / ROWS;
    tile_cursor cursor;
    cursor.at = row_address(source, first);
    cursor.tile_stride = source.row_stride * ROWS;
    cursor.rows = int(min(source.rows - first, long(STRETCH_ROWS)));
    cursor.regular = source.vec4 && (source.columns & 3) == 0 && source.row_stride < FAR && source.row_stride > -FAR;
    return cursor;
}

template <int ROWS> METAL_FUNC void tile_cursor_advance(thread tile_cursor &cursor)
{
    cursor.at += cursor.tile_stride;
    cursor.rows -= ROWS;
}

/* Copies the ROWS rows at the cursor into a tile, all LANES lanes of the threadgroup together, `thread_index` being the
 * caller's. Rows and columns past the end are 0.
 *
 * A lane keeps its four columns, and LANES / RUNS rows are copied at once. Of a tile that is not whole or not regular,
 * each element is checked. */
template <int ROWS, int COLUMNS, int LANES>
METAL_FUNC void load_tile(threadgroup storage *tile, thread const row_source &source, thread const tile_cursor &cursor,
                          uint thread_index)
{
    constexpr int RUNS = COLUMNS / 4, STEP = LANES / RUNS;
    static_assert(STEP > 0, "a row of a tile has at most as many runs of four elements as there are lanes");
    if (cursor.regular && cursor.rows >= ROWS) {
        int row = int(thread_index) / RUNS, column = int(thread_index) % RUNS * 4, stride = int(source.row_stride);
        device const storage *from = cursor.at + (row * stride + column);
        threadgroup storage *to = tile + row * PADDED(COLUMNS) + column;
        bool inside = column < int(source.columns);
        UNROLL
        for (int n = 0; n * STEP < ROWS; n++)
            if ((LANES % RUNS == 0 || row < STEP) && (ROWS % STEP == 0 || row + n * STEP < ROWS)) {
                threadgroup storage4 *run = (threadgroup storage4 *)(to + n * STEP * PADDED(COLUMNS));
                if (inside)
                    *run = *(device const storage4 *)(from + n * STEP * stride);
                else
                    *run = storage4{0, 0, 0, 0};
            }
        return;
    }
    for (int run = int(thread_index); run < ROWS * RUNS; run += LANES) {
        int row = run / RUNS, column = run % RUNS * 4;
        storage4 x = storage4{0, 0, 0, 0};
        if (row < cursor.rows) {
            device const storage *at = cursor.at + row * source.row_stride + column * source.column_stride;
            UNROLL
            for (int i = 0; i < 4; i++)
                if (column + i < source.columns)
                    x[i] = at[i * source.column_stride];
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
