/* All reads of K and V, and of Q and dO, which are read the same way: where row n of a head lies, its dtype, and how
 * rows become tiles in threadgroup memory or fragments in registers. */

/* A walk along blocks goes on from a new base after so many of them, so that 32 bits hold every offset from a base: a
 * block has at most 64 rows. */
#if !defined(STRETCH_BLOCKS)
#define STRETCH_BLOCKS 128
#endif
#define STRETCH_ROWS (STRETCH_BLOCKS * 64)

/* The rows of one head of an operand. */
struct row_source {
    device const storage *base; /* row 0, column 0 */
    long row_stride, column_stride;
    int rows, columns;
    bool regular; /* rows are aligned groups of four elements, so near that 32 bits hold offsets within a stretch */
};

METAL_FUNC row_source row_source_of(device const storage *base, constant mfa_metal_call &call, constant mfa_strides &s,
                                    int rows, mfa_int columns, int buffer)
{
    constexpr long FAR = (1l << 31) / STRETCH_ROWS;
    bool regular = (call.vec4 >> buffer & 1) && (columns & 3) == 0 && s.row < FAR && s.row > -FAR;
    return row_source{base, s.row, s.column, rows, int(columns), regular};
}

#if defined(PAGED)
#define PIECE_ROWS (BLOCK_KV < 16 ? BLOCK_KV : 16) /* most pages have a multiple of them */

/* The rows of one head of K or V that lie in pages. */
struct kv_source {
    row_source page; /* row 0 of page 0; `rows` is the number of keys */
    long page_stride;
    device const int *table; /* the entry's pages */
    long table_stride;
    int first, pages; /* the row of key 0, counted from the first page; pages that there are */
    uint page_size, multiplier, shift;
    bool in_pieces; /* PIECE_ROWS rows from a multiple of that on are in one page */
};

METAL_FUNC kv_source kv_source_of(device const storage *data, constant mfa_metal_call &call, constant mfa_strides &s,
                                  thread const sequence &seq, int kv_head, mfa_int columns, int buffer)
{
    constant mfa_args &args = call.args;
    return kv_source{row_source_of(data + kv_head * s.head, call, s, seq.kv_len, columns, buffer),
                     s.batch,
                     seq.block_table,
                     args.block_table.column,
                     seq.kv_row,
                     int(args.kv_batch),
                     uint(args.page_size),
                     uint(call.page_multiplier),
                     uint(call.page_shift),
                     (uint(args.page_size) | uint(seq.kv_row)) % PIECE_ROWS == 0};
}
#else
typedef row_source kv_source;

METAL_FUNC kv_source kv_source_of(device const storage *data, constant mfa_metal_call &call, constant mfa_strides &s,
                                  thread const sequence &seq, int kv_head, mfa_int columns, int buffer)
{
    return row_source_of(data + kv_offset(seq, s, kv_head, 0), call, s, seq.kv_len, columns, buffer);
}
#endif

METAL_FUNC kv_source k_source(device const storage *K, constant mfa_metal_call &call, thread const sequence &seq,
                              int kv_head)
{
    return kv_source_of(K, call, call.args.k, seq, kv_head, call.args.head_dim, MFA_METAL_BUFFER_K);
}

METAL_FUNC kv_source v_source(device const storage *V, constant mfa_metal_call &call, thread const sequence &seq,
                              int kv_head)
{
    return kv_source_of(V, call, call.args.v, seq, kv_head, call.args.value_dim, MFA_METAL_BUFFER_V);
}

METAL_FUNC row_source q_source(device const storage *Q, constant mfa_metal_call &call, thread const sequence &seq,
                               int head)
{
    constant mfa_strides &s = call.args.q;
    return row_source_of(Q + q_offset(seq, s, head, 0), call, s, seq.q_len, call.args.head_dim, MFA_METAL_BUFFER_Q);
}

METAL_FUNC row_source do_source(device const storage *dO, constant mfa_metal_call &call, thread const sequence &seq,
                                int head)
{
    constant mfa_strides &s = call.args.d_o;
    return row_source_of(dO + q_offset(seq, s, head, 0), call, s, seq.q_len, call.args.value_dim, MFA_METAL_BUFFER_DO);
}

METAL_FUNC device const storage *row_address(thread const row_source &source, int row)
{
    return source.base + row * source.row_stride;
}

/* Where a walk along the rows of a source is, within a stretch: at the tile of ROWS rows that begins `row` rows after
 * `base`. */
struct tile_cursor {
    device const storage *base;
    int row, rows;      /* rows: from there to the end of the source */
    int offset, stride; /* of a regular source, in elements: from `base`, and to the next tile */
};

template <int ROWS> METAL_FUNC tile_cursor tile_cursor_of(thread const row_source &source, int first)
{
    return tile_cursor{row_address(source, first), 0, source.rows - first, 0,
                       source.regular ? ROWS * int(source.row_stride) : 0};
}

template <int ROWS> METAL_FUNC void tile_cursor_advance(thread tile_cursor &cursor)
{
    cursor.row += ROWS;
    cursor.rows -= ROWS;
    cursor.offset += cursor.stride;
}

/* Stores four columns of a pair of rows into a tile. */
METAL_FUNC void store_pair(threadgroup storage *to, storage4 a, storage4 b)
{
    *(threadgroup storage4 *)to = storage4{a[0], a[1], b[0], b[1]};
    *(threadgroup storage4 *)(to + 4) = storage4{a[2], a[3], b[2], b[3]};
}

/* Copies the ROWS rows at the cursor into a tile (gemm.h), all LANES lanes of the threadgroup together, `thread_index`
 * being the caller's. Rows and columns past the end are 0.
 *
 * A lane keeps its four columns, of a pair of rows, and LANES / RUNS pairs are copied at once. Of a tile that is not
 * whole or not regular, each element is checked. */
template <int ROWS, int COLUMNS, int LANES>
METAL_FUNC void load_tile(threadgroup storage *tile, thread const row_source &source, thread const tile_cursor &cursor,
                          uint thread_index)
{
    constexpr int RUNS = COLUMNS / 4, STEP = LANES / RUNS, PAIRS = ROWS / 2;
    static_assert(STEP > 0, "a row of a tile has at most as many runs of four elements as there are lanes");
    if (source.regular && cursor.rows >= ROWS) {
        int pair = int(thread_index) / RUNS, column = int(thread_index) % RUNS * 4, stride = int(source.row_stride);
        int from = 2 * pair * stride + column;
        threadgroup storage *to = tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column);
        bool inside = column < source.columns;
        UNROLL
        for (int n = 0; n * STEP < PAIRS; n++)
            if ((LANES % RUNS == 0 || pair < STEP) && (PAIRS % STEP == 0 || pair + n * STEP < PAIRS)) {
                storage4 a = storage4{0, 0, 0, 0}, b = a;
                if (inside) {
                    int offset = cursor.offset + (from + 2 * n * STEP * stride);
                    a = *(device const storage4 *)(cursor.base + offset);
                    b = *(device const storage4 *)(cursor.base + (offset + stride));
                }
                store_pair(to + n * STEP * PAIR_STRIDE(COLUMNS), a, b);
            }
        return;
    }
    for (int run = int(thread_index); run < PAIRS * RUNS; run += LANES) {
        int pair = run / RUNS, column = run % RUNS * 4;
        storage4 x[2];
        UNROLL
        for (int r = 0; r < 2; r++) {
            int row = 2 * pair + r;
            x[r] = storage4{0, 0, 0, 0};
            if (row < cursor.rows) {
                device const storage *at =
                    cursor.base + (cursor.row + row) * source.row_stride + column * source.column_stride;
                UNROLL
                for (int i = 0; i < 4; i++)
                    if (column + i < source.columns)
                        x[r][i] = at[i * source.column_stride];
            }
        }
        store_pair(tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column), x[0], x[1]);
    }
}

/* Loads COUNT elements of a row from `column` on. They are 0 past the end of the row, or all if it is not valid. */
template <int COUNT>
METAL_FUNC void load_run(thread storage *x, thread const row_source &source, device const storage *row, int column,
                         bool valid)
{
    device const storage *from = row + column * source.column_stride;
    UNROLL
    for (int i = 0; i < COUNT; i++, from += source.column_stride) {
        x[i] = storage(0);
        if (valid && column + i < source.columns)
            x[i] = *from;
    }
}

#if defined(PAGED)
/* Where a walk along keys is: at the tile that begins with number `key`. */
struct kv_cursor {
    int key;
};

template <int ROWS> METAL_FUNC kv_cursor tile_cursor_of(thread const kv_source &, int first)
{
    return kv_cursor{first};
}

template <int ROWS> METAL_FUNC void tile_cursor_advance(thread kv_cursor &cursor)
{
    cursor.key += ROWS;
}

/* Row n of an entry's pages: in which of the table, and which row of it. */
struct paged_row {
    int page, row;
};

METAL_FUNC paged_row paged_row_of(thread const kv_source &source, int key)
{
    uint n = uint(source.first + key), number = mulhi(2 * n, source.multiplier) >> source.shift;
    int page = source.table[int(number) * source.table_stride];
    return paged_row{clamp_index(page, 0, source.pages - 1), int(n - number * source.page_size)};
}

METAL_FUNC long paged_offset(thread const kv_source &source, paged_row at)
{
    return at.page * source.page_stride + at.row * source.page.row_stride;
}

/* Where each of ROWS keys of a block lies: they are looked up together, a key by each lane, and the lanes exchange
 * offsets, in two halves. */
template <int ROWS> struct paged_rows {
    uint low[(ROWS + 31) / 32], high[(ROWS + 31) / 32];
};

template <int ROWS>
METAL_FUNC void look_up_rows(thread paged_rows<ROWS> &rows, thread const kv_source &source, int first, int lane)
{
    UNROLL
    for (int n = 0; n < (ROWS + 31) / 32; n++) {
        long offset = paged_offset(source, paged_row_of(source, min(first + 32 * n + lane, source.page.rows - 1)));
        rows.low[n] = uint(offset), rows.high[n] = uint(ulong(offset) >> 32);
    }
}

/* The offset of row `row` of the block. All lanes of the simdgroup must call this together. */
template <int ROWS> METAL_FUNC long offset_of_row(thread const paged_rows<ROWS> &rows, int row)
{
    uint low = simd_shuffle(rows.low[0], ushort(row % 32)), high = simd_shuffle(rows.high[0], ushort(row % 32));
    UNROLL
    for (int n = 1; n < (ROWS + 31) / 32; n++) {
        uint other_low = simd_shuffle(rows.low[n], ushort(row % 32));
        uint other_high = simd_shuffle(rows.high[n], ushort(row % 32));
        low = row / 32 == n ? other_low : low;
        high = row / 32 == n ? other_high : high;
    }
    return long(ulong(high) << 32 | ulong(low));
}

/* The same as above, of rows that lie in pages: in pieces that are loaded like any other tile, or row by row. */
template <int ROWS, int COLUMNS, int LANES>
METAL_FUNC void load_tile(threadgroup storage *tile, thread const kv_source &source, thread const kv_cursor &cursor,
                          uint thread_index)
{
    constexpr int RUNS = COLUMNS / 4, PAIRS = ROWS / 2;
    thread const row_source &page = source.page;
    int rows = page.rows - cursor.key;
    if (source.in_pieces) {
        UNROLL
        for (int n = 0; n < ROWS; n += PIECE_ROWS) {
            paged_row at = paged_row_of(source, min(cursor.key + n, page.rows - 1));
            tile_cursor piece = tile_cursor{page.base + paged_offset(source, at), 0, rows - n, 0, 0};
            load_tile<PIECE_ROWS, COLUMNS, LANES>(tile + TILE_ROW(n, COLUMNS), page, piece, thread_index);
        }
        return;
    }
    paged_rows<ROWS> places;
    look_up_rows(places, source, cursor.key, int(thread_index % 32));
    /* Unrolled, this would take registers that the other pages have to spare. */
    for (int n = 0; n < (PAIRS * RUNS + LANES - 1) / LANES; n++) {
        int run = n * LANES + int(thread_index), pair = run / RUNS, column = run % RUNS * 4;
        storage4 x[2];
        UNROLL
        for (int r = 0; r < 2; r++) {
            int row = 2 * pair + r;
            device const storage *from = page.base + offset_of_row(places, row);
            x[r] = storage4{0, 0, 0, 0};
            if (page.regular) {
                if (row < rows && column < page.columns)
                    x[r] = *(device const storage4 *)(from + column);
            } else {
                storage elements[4];
                load_run<4>(elements, page, from, column, row < rows);
                x[r] = storage4{elements[0], elements[1], elements[2], elements[3]};
            }
        }
        if (PAIRS * RUNS % LANES == 0 || run < PAIRS * RUNS)
            store_pair(tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column), x[0], x[1]);
    }
}
#else
typedef tile_cursor kv_cursor;
#endif

/* Loads a lane's elements of a row's 8 * FRAGMENTS columns from `first` on, in gemm_nt's order: of 16 columns,
 * 0 2 4 ... are a fragment and 1 3 5 ... the next, and so a lane has four neighbours. An odd last fragment has 8
 * neighbours. */
template <int FRAGMENTS>
METAL_FUNC void load_row_paired(thread storage2 *x, thread const row_source &source, int row, int first, bool valid,
                                lane_coord at)
{
    device const storage *from = row_address(source, row);
    UNROLL
    for (int d = 0; d + 1 < FRAGMENTS; d += 2) {
        storage run[4];
        load_run<4>(run, source, from, first + d * 8 + at.column * 2, valid);
        x[d] = storage2{run[0], run[2]};
        x[d + 1] = storage2{run[1], run[3]};
    }
    if (FRAGMENTS % 2 == 1) {
        storage run[2];
        load_run<2>(run, source, from, first + (FRAGMENTS - 1) * 8 + at.column, valid);
        x[FRAGMENTS - 1] = storage2{run[0], run[1]};
    }
}
