/* All reads of K and V, and of Q and dO, which are read the same way: where row n of a head lies, its type, and how
 * rows become tiles in threadgroup memory or fragments in registers. What concerns codes and their scales only stands
 * within CODES. */

/* A walk along blocks goes on from a new base after so many of them, so that 32 bits hold every offset from a base: a
 * block has at most 64 rows. */
#if !defined(STRETCH_BLOCKS)
#define STRETCH_BLOCKS 128
#endif
#define STRETCH_ROWS (STRETCH_BLOCKS * 64)
#define FAR_STRIDE ((1l << 31) / STRETCH_ROWS)

/* The rows of one head of an operand. */
template <int TYPE> struct row_source {
    typename row_type<TYPE>::place base; /* row 0, column 0 */
    long row_stride, column_stride;      /* in units */
    int rows, columns;
    bool regular; /* runs are aligned neighbours, and rows so near that 32 bits hold offsets within a stretch */
    typename row_type<TYPE>::scales scales;
};

template <int TYPE>
METAL_FUNC row_source<TYPE> row_source_of(typename row_type<TYPE>::place base, typename row_type<TYPE>::scales scales,
                                          constant mfa_metal_call &call, constant mfa_strides &s, int rows,
                                          mfa_int columns, int buffer)
{
    bool regular = (call.vec4 >> buffer & 1) && (columns & 3) == 0 && s.row < FAR_STRIDE && s.row > -FAR_STRIDE;
    return row_source<TYPE>{base, s.row, s.column, rows, int(columns), regular && are_regular(scales), scales};
}

#if defined(PAGED)
#define PIECE_ROWS (BLOCK_KV < 16 ? BLOCK_KV : 16) /* most pages have a multiple of them */

/* The rows of one head of K or V that lie in pages. */
template <int TYPE> struct kv_source {
    row_source<TYPE> page; /* row 0 of page 0; `rows` is the number of keys */
    long page_stride;
    device const int *table; /* the entry's pages */
    long table_stride;
    int first, pages; /* the row of key 0, counted from the first page; pages that there are */
    uint page_size, multiplier, shift;
    bool in_pieces; /* PIECE_ROWS rows from a multiple of that on are in one page */
};

/* Where the head's rows begin, in units. */
METAL_FUNC long kv_begin(thread const sequence &, constant mfa_strides &s, int kv_head)
{
    return kv_head * s.head;
}

template <int TYPE>
METAL_FUNC kv_source<TYPE> kv_source_of(typename row_type<TYPE>::place base, typename row_type<TYPE>::scales scales,
                                        constant mfa_metal_call &call, constant mfa_strides &s,
                                        thread const sequence &seq, mfa_int columns, int buffer)
{
    constant mfa_args &args = call.args;
    return kv_source<TYPE>{row_source_of<TYPE>(base, scales, call, s, seq.kv_len, columns, buffer),
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
template <int TYPE> using kv_source = row_source<TYPE>;

METAL_FUNC long kv_begin(thread const sequence &seq, constant mfa_strides &s, int kv_head)
{
    return kv_offset(seq, s, kv_head, 0);
}

template <int TYPE>
METAL_FUNC kv_source<TYPE> kv_source_of(typename row_type<TYPE>::place base, typename row_type<TYPE>::scales scales,
                                        constant mfa_metal_call &call, constant mfa_strides &s,
                                        thread const sequence &seq, mfa_int columns, int buffer)
{
    return row_source_of<TYPE>(base, scales, call, s, seq.kv_len, columns, buffer);
}
#endif

/* K and V, and the scales of codes. */
typedef row_type<K_TYPE>::unit k_unit;
typedef row_type<V_TYPE>::unit v_unit;
#if defined(CODES)
#define KV_BUFFERS                                                                \
    , device const k_unit *K [[buffer(7)]], device const v_unit *V [[buffer(8)]], \
        device const float *K_scale [[buffer(15)]], device const float *V_scale [[buffer(16)]]
#define KV_OPERANDS            \
    kv_operands                \
    {                          \
        K, V, K_scale, V_scale \
    }
#else
#define KV_BUFFERS , device const k_unit *K [[buffer(7)]], device const v_unit *V [[buffer(8)]]
#define KV_OPERANDS \
    kv_operands     \
    {               \
        K, V        \
    }
#endif

struct kv_operands {
    device const k_unit *K;
    device const v_unit *V;
#if defined(CODES)
    device const float *K_scale, *V_scale;
#endif
};

#if defined(CODES)
METAL_FUNC code_scales scales_of(constant mfa_metal_call &call, constant mfa_strides &s, mfa_int group, int buffer)
{
    constexpr long NEAR_STRIDE = FAR_STRIDE / 2; /* for an offset is a sum of two */
    bool regular = (group & 3) == 0 && s.row < NEAR_STRIDE && s.row > -NEAR_STRIDE && s.column < NEAR_STRIDE &&
                   s.column > -NEAR_STRIDE;
    uint columns = uint(min(group, mfa_int(1 << DIVISOR_BITS)));
    return code_scales{s.row,
                       s.column,
                       s.batch,
                       columns > 0 ? (1u << DIVISOR_BITS) / columns + 1 : 0,
                       (call.present >> buffer & 1) != 0,
                       regular};
}
#endif

METAL_FUNC kv_source<K_TYPE> k_source(thread const kv_operands &in, constant mfa_metal_call &call,
                                      thread const sequence &seq, int kv_head)
{
    constant mfa_args &args = call.args;
    device const k_unit *K = in.K + kv_begin(seq, args.k, kv_head);
#if K_TYPE == KV_SAME
    return kv_source_of<KV_SAME>(K, no_scales{}, call, args.k, seq, args.head_dim, MFA_METAL_BUFFER_K);
#else
    return kv_source_of<K_TYPE>(code_place{K, in.K_scale + kv_begin(seq, args.k_scale, kv_head)},
                                scales_of(call, args.k_scale, args.k_group, MFA_METAL_BUFFER_K_SCALE), call, args.k,
                                seq, args.head_dim, MFA_METAL_BUFFER_K);
#endif
}

METAL_FUNC kv_source<V_TYPE> v_source(thread const kv_operands &in, constant mfa_metal_call &call,
                                      thread const sequence &seq, int kv_head)
{
    constant mfa_args &args = call.args;
    device const v_unit *V = in.V + kv_begin(seq, args.v, kv_head);
#if V_TYPE == KV_SAME
    return kv_source_of<KV_SAME>(V, no_scales{}, call, args.v, seq, args.value_dim, MFA_METAL_BUFFER_V);
#else
    return kv_source_of<V_TYPE>(code_place{V, in.V_scale + kv_begin(seq, args.v_scale, kv_head)},
                                scales_of(call, args.v_scale, args.v_group, MFA_METAL_BUFFER_V_SCALE), call, args.v,
                                seq, args.value_dim, MFA_METAL_BUFFER_V);
#endif
}

METAL_FUNC row_source<KV_SAME> q_source(device const storage *Q, constant mfa_metal_call &call,
                                        thread const sequence &seq, int head)
{
    constant mfa_strides &s = call.args.q;
    return row_source_of<KV_SAME>(Q + q_offset(seq, s, head, 0), no_scales{}, call, s, seq.q_len, call.args.head_dim,
                                  MFA_METAL_BUFFER_Q);
}

METAL_FUNC row_source<KV_SAME> do_source(device const storage *dO, constant mfa_metal_call &call,
                                         thread const sequence &seq, int head)
{
    constant mfa_strides &s = call.args.d_o;
    return row_source_of<KV_SAME>(dO + q_offset(seq, s, head, 0), no_scales{}, call, s, seq.q_len, call.args.value_dim,
                                  MFA_METAL_BUFFER_DO);
}

METAL_FUNC device const storage *row_address(thread const row_source<KV_SAME> &source, int row)
{
    return source.base + row * source.row_stride;
}

/* `n` units after a place, in the same row. */
METAL_FUNC device const storage *move_place(device const storage *place, int n)
{
    return place + n;
}

/* Loads COUNT elements of a row from `column` on. They are 0 past the end of the row, or all if it is not valid. */
template <int COUNT>
METAL_FUNC void load_elements(thread storage *x, thread const row_source<KV_SAME> &source, device const storage *row,
                              int column, bool valid)
{
    device const storage *from = row + column * source.column_stride;
    UNROLL
    for (int i = 0; i < COUNT; i++, from += source.column_stride) {
        x[i] = storage(0);
        if (valid && column + i < source.columns)
            x[i] = *from;
    }
}

/* Four elements of a tile, likewise. */
METAL_FUNC tile_element4 load_four(thread const row_source<KV_SAME> &source, device const storage *row, int column,
                                   bool valid)
{
    storage x[4];
    load_elements<4>(x, source, row, column, valid);
    return tile_run(storage4{x[0], x[1], x[2], x[3]});
}

/* Loads the run at `at` of a regular source. Of codes, it begins in column `column`, and the scales of its row are
 * those of row `row` from this place on. */
METAL_FUNC void load_regular_run(thread storage4 &run, thread const row_source<KV_SAME> &, device const storage *at,
                                 int, int)
{
    run = *(device const storage4 *)at;
}

#if defined(CODES)
template <int TYPE> METAL_FUNC code_place row_address(thread const row_source<TYPE> &source, int row)
{
    return code_place{source.base.codes + row * source.row_stride, source.base.scales + row * source.scales.row_stride};
}

METAL_FUNC code_place move_place(code_place place, int n)
{
    return code_place{place.codes + n, place.scales};
}

template <int TYPE>
METAL_FUNC tile_element4 load_four(thread const row_source<TYPE> &source, code_place row, int column, bool valid)
{
    thread const code_scales &s = source.scales;
    float4 x = float4{0.0f, 0.0f, 0.0f, 0.0f};
    ROLLED
    for (int c = column + 3; c >= column; c--) {
        float first = 0.0f;
        if (valid && c < source.columns) {
            uint code = row.codes[unit_of<TYPE>(c) * source.column_stride] >> bit_of<TYPE>(c);
            float scale = s.given ? row.scales[group_of(s, c) * s.column_stride] : 1.0f;
            first = run_numbers(code_run<TYPE>{code, scale})[0];
        }
        x = float4{first, x[0], x[1], x[2]};
    }
    return x;
}

template <int TYPE>
METAL_FUNC void load_regular_run(thread code_run<TYPE> &run, thread const row_source<TYPE> &source, code_place at,
                                 int row, int column)
{
    thread const code_scales &s = source.scales;
    float scale = 1.0f;
    if (s.given)
        scale = at.scales[row * int(s.row_stride) + group_of(s, column) * int(s.column_stride)];
    run.codes = *(device const uint *)at.codes >> bit_of<TYPE>(column);
    run.scale = scale;
}
#endif

/* Where a walk along the rows of a source is, within a stretch: at the tile of ROWS rows that begins `row` rows after
 * `base`. */
template <int TYPE> struct tile_cursor {
    typename row_type<TYPE>::place base;
    int row, rows;      /* rows: from there to the end of the source */
    int offset, stride; /* of a regular source, in units: from `base`, and to the next tile */
};

template <int ROWS, int TYPE>
METAL_FUNC tile_cursor<TYPE> tile_cursor_of(thread const row_source<TYPE> &source, int first)
{
    return tile_cursor<TYPE>{row_address(source, first), 0, source.rows - first, 0,
                             source.regular ? ROWS * int(source.row_stride) : 0};
}

template <int ROWS, int TYPE> METAL_FUNC void tile_cursor_advance(thread tile_cursor<TYPE> &cursor)
{
    cursor.row += ROWS;
    cursor.rows -= ROWS;
    cursor.offset += cursor.stride;
}

/* Row `row` of the tile at a cursor, of any source. */
METAL_FUNC device const storage *row_of_tile(thread const row_source<KV_SAME> &source,
                                             thread const tile_cursor<KV_SAME> &cursor, int row)
{
    return cursor.base + (cursor.row + row) * source.row_stride;
}

#if defined(CODES)
template <int TYPE>
METAL_FUNC code_place row_of_tile(thread const row_source<TYPE> &source, thread const tile_cursor<TYPE> &cursor,
                                  int row)
{
    return code_place{cursor.base.codes + (cursor.row + row) * source.row_stride,
                      cursor.base.scales + (cursor.row + row) * source.scales.row_stride};
}
#endif

/* Stores four columns of a pair of rows into a tile. */
METAL_FUNC void store_pair(threadgroup tile_element *to, tile_element4 a, tile_element4 b)
{
    *(threadgroup tile_element4 *)to = tile_element4{a[0], a[1], b[0], b[1]};
    *(threadgroup tile_element4 *)(to + 4) = tile_element4{a[2], a[3], b[2], b[3]};
}

/* Copies the ROWS rows at the cursor into a tile (gemm.h), all LANES lanes of the threadgroup together, `thread_index`
 * being the caller's. Rows and columns past the end are 0.
 *
 * A lane keeps its four columns, of a pair of rows, and LANES / RUNS pairs are copied at once. Of a tile that is not
 * whole or not regular, each element is checked. */
template <int ROWS, int COLUMNS, int LANES, int TYPE>
METAL_FUNC void load_tile(threadgroup tile_element *tile, thread const row_source<TYPE> &source,
                          thread const tile_cursor<TYPE> &cursor, uint thread_index)
{
    constexpr int RUNS = COLUMNS / 4, STEP = LANES / RUNS, PAIRS = ROWS / 2;
    static_assert(STEP > 0, "a row of a tile has at most as many runs of four elements as there are lanes");
    if (source.regular && cursor.rows >= ROWS) {
        int pair = int(thread_index) / RUNS, column = int(thread_index) % RUNS * 4, stride = int(source.row_stride);
        int from = 2 * pair * stride + unit_of<TYPE>(column), row = cursor.row + 2 * pair;
        threadgroup tile_element *to = tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column);
        bool inside = column < source.columns;
        UNROLL
        for (int n = 0; n * STEP < PAIRS; n++)
            if ((LANES % RUNS == 0 || pair < STEP) && (PAIRS % STEP == 0 || pair + n * STEP < PAIRS)) {
                typename row_type<TYPE>::run a, b;
                clear_run(a);
                clear_run(b);
                if (inside) {
                    int offset = cursor.offset + (from + 2 * n * STEP * stride), first = row + 2 * n * STEP;
                    load_regular_run(a, source, move_place(cursor.base, offset), first, column);
                    load_regular_run(b, source, move_place(cursor.base, offset + stride), first + 1, column);
                }
                store_pair(to + n * STEP * PAIR_STRIDE(COLUMNS), tile_run(a), tile_run(b));
            }
        return;
    }
    for (int run = int(thread_index); run < PAIRS * RUNS; run += LANES) {
        int pair = run / RUNS, column = run % RUNS * 4;
        tile_element4 x[2];
        UNROLL
        for (int r = 0; r < 2; r++)
            x[r] = load_four(source, row_of_tile(source, cursor, 2 * pair + r), column, 2 * pair + r < cursor.rows);
        store_pair(tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column), x[0], x[1]);
    }
}

#if defined(PAGED)
/* Where a walk along keys is: at the tile that begins with number `key`. */
template <int TYPE> struct kv_cursor {
    int key;
};

template <int ROWS, int TYPE> METAL_FUNC kv_cursor<TYPE> tile_cursor_of(thread const kv_source<TYPE> &, int first)
{
    return kv_cursor<TYPE>{first};
}

template <int ROWS, int TYPE> METAL_FUNC void tile_cursor_advance(thread kv_cursor<TYPE> &cursor)
{
    cursor.key += ROWS;
}

/* Row n of an entry's pages: in which of the table, and which row of it. */
struct paged_row {
    int page, row;
};

template <int TYPE> METAL_FUNC paged_row paged_row_of(thread const kv_source<TYPE> &source, int key)
{
    uint n = uint(source.first + key), number = mulhi(2 * n, source.multiplier) >> source.shift;
    int page = source.table[int(number) * source.table_stride];
    return paged_row{clamp_index(page, 0, source.pages - 1), int(n - number * source.page_size)};
}

template <int TYPE> METAL_FUNC long paged_offset(thread const kv_source<TYPE> &source, paged_row at)
{
    return at.page * source.page_stride + at.row * source.page.row_stride;
}

METAL_FUNC device const storage *paged_place(thread const kv_source<KV_SAME> &source, paged_row at)
{
    return source.page.base + paged_offset(source, at);
}

/* Where each of ROWS keys of a block lies: they are looked up together, a key by each lane, and the lanes exchange
 * offsets, in two halves. */
template <int ROWS> struct paged_offsets {
    uint low[(ROWS + 31) / 32], high[(ROWS + 31) / 32];
};

template <int ROWS> METAL_FUNC void set_offset(thread paged_offsets<ROWS> &offsets, int n, long offset)
{
    offsets.low[n] = uint(offset), offsets.high[n] = uint(ulong(offset) >> 32);
}

/* The offset of row `row` of the block. All lanes of the simdgroup must call this together. */
template <int ROWS> METAL_FUNC long offset_of_row(thread const paged_offsets<ROWS> &rows, int row)
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

template <int TYPE, int ROWS> struct paged_rows;

template <int ROWS> struct paged_rows<KV_SAME, ROWS> {
    paged_offsets<ROWS> offsets;
};

template <int ROWS>
METAL_FUNC void set_row(thread paged_rows<KV_SAME, ROWS> &rows, thread const kv_source<KV_SAME> &source, int n,
                        paged_row at)
{
    set_offset(rows.offsets, n, paged_offset(source, at));
}

template <int ROWS>
METAL_FUNC device const storage *place_of_row(thread const paged_rows<KV_SAME, ROWS> &rows,
                                              thread const kv_source<KV_SAME> &source, int row)
{
    return source.page.base + offset_of_row(rows.offsets, row);
}

#if defined(CODES)
template <int TYPE> METAL_FUNC long paged_scale_offset(thread const kv_source<TYPE> &source, paged_row at)
{
    return at.page * source.page.scales.page_stride + at.row * source.page.scales.row_stride;
}

template <int TYPE> METAL_FUNC code_place paged_place(thread const kv_source<TYPE> &source, paged_row at)
{
    return code_place{source.page.base.codes + paged_offset(source, at),
                      source.page.base.scales + paged_scale_offset(source, at)};
}

template <int TYPE, int ROWS> struct paged_rows {
    paged_offsets<ROWS> offsets, scales;
};

template <int TYPE, int ROWS>
METAL_FUNC void set_row(thread paged_rows<TYPE, ROWS> &rows, thread const kv_source<TYPE> &source, int n, paged_row at)
{
    set_offset(rows.offsets, n, paged_offset(source, at));
    set_offset(rows.scales, n, paged_scale_offset(source, at));
}

template <int TYPE, int ROWS>
METAL_FUNC code_place place_of_row(thread const paged_rows<TYPE, ROWS> &rows, thread const kv_source<TYPE> &source,
                                   int row)
{
    return code_place{source.page.base.codes + offset_of_row(rows.offsets, row),
                      source.page.base.scales + offset_of_row(rows.scales, row)};
}
#endif

template <int TYPE, int ROWS>
METAL_FUNC void look_up_rows(thread paged_rows<TYPE, ROWS> &rows, thread const kv_source<TYPE> &source, int first,
                             int lane)
{
    UNROLL
    for (int n = 0; n < (ROWS + 31) / 32; n++)
        set_row(rows, source, n, paged_row_of(source, min(first + 32 * n + lane, source.page.rows - 1)));
}

/* The same as above, of rows that lie in pages: in pieces that are loaded like any other tile, or row by row. */
template <int ROWS, int COLUMNS, int LANES, int TYPE>
METAL_FUNC void load_tile(threadgroup tile_element *tile, thread const kv_source<TYPE> &source,
                          thread const kv_cursor<TYPE> &cursor, uint thread_index)
{
    constexpr int RUNS = COLUMNS / 4, PAIRS = ROWS / 2;
    thread const row_source<TYPE> &page = source.page;
    int rows = page.rows - cursor.key;
    if (source.in_pieces) {
        UNROLL
        for (int n = 0; n < ROWS; n += PIECE_ROWS) {
            paged_row at = paged_row_of(source, min(cursor.key + n, page.rows - 1));
            tile_cursor<TYPE> piece = tile_cursor<TYPE>{paged_place(source, at), 0, rows - n, 0, 0};
            load_tile<PIECE_ROWS, COLUMNS, LANES>(tile + TILE_ROW(n, COLUMNS), page, piece, thread_index);
        }
        return;
    }
    paged_rows<TYPE, ROWS> places;
    look_up_rows(places, source, cursor.key, int(thread_index % 32));
    /* Unrolled, this would take registers that the other pages have to spare. */
    for (int n = 0; n < (PAIRS * RUNS + LANES - 1) / LANES; n++) {
        int run = n * LANES + int(thread_index), pair = run / RUNS, column = run % RUNS * 4;
        tile_element4 x[2];
        UNROLL
        for (int r = 0; r < 2; r++) {
            int row = 2 * pair + r;
            typename row_type<TYPE>::place from = place_of_row(places, source, row);
            if (page.regular) {
                typename row_type<TYPE>::run own;
                clear_run(own);
                if (row < rows && column < page.columns)
                    load_regular_run(own, page, move_place(from, unit_of<TYPE>(column)), 0, column);
                x[r] = tile_run(own);
            } else {
                x[r] = load_four(page, from, column, row < rows);
            }
        }
        if (PAIRS * RUNS % LANES == 0 || run < PAIRS * RUNS)
            store_pair(tile + pair * PAIR_STRIDE(COLUMNS) + TILE_COLUMN(column), x[0], x[1]);
    }
}
#else
template <int TYPE> using kv_cursor = tile_cursor<TYPE>;
#endif

/* Loads a lane's elements of a row's 8 * FRAGMENTS columns from `first` on, in gemm_nt's order: of 16 columns,
 * 0 2 4 ... are a fragment and 1 3 5 ... the next, and so a lane has four neighbours. An odd last fragment has 8
 * neighbours. */
template <int FRAGMENTS>
METAL_FUNC void load_row_paired(thread storage2 *x, thread const row_source<KV_SAME> &source, int row, int first,
                                bool valid, lane_coord at)
{
    device const storage *from = row_address(source, row);
    UNROLL
    for (int d = 0; d + 1 < FRAGMENTS; d += 2) {
        storage run[4];
        load_elements<4>(run, source, from, first + d * 8 + at.column * 2, valid);
        x[d] = storage2{run[0], run[2]};
        x[d + 1] = storage2{run[1], run[3]};
    }
    if (FRAGMENTS % 2 == 1) {
        storage run[2];
        load_elements<2>(run, source, from, first + (FRAGMENTS - 1) * 8 + at.column, valid);
        x[FRAGMENTS - 1] = storage2{run[0], run[1]};
    }
}
