/* Products of tiles. A simdgroup multiplies 8 x 8 matrices of floats; how such a matrix lies in the
 * registers of its 32 lanes is known here and nowhere else:
 *
 *     a lane holds two neighbours of one row, in a float2: a fragment
 *     row    = 4 * (lane / 16) + lane / 2 % 4
 *     column = 4 * (lane / 8 % 2) + 2 * (lane % 2)     and the next
 *
 * so that the four lanes of a row differ in bits 0 and 3 of their number. Apple does not document this; it has
 * held from M1 on, and layout_test (layout_test.metal) finds out whether it does on the device at hand.
 *
 * Tiles in threadgroup memory have padded rows: 16 bytes more than the columns, against bank conflicts. */

#if !defined(TG_ARG)
#define TG_ARG(n) [[threadgroup(n)]]
#endif
#if !defined(UNROLL) /* fragments are arrays, and stay in registers only if every index is a constant */
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

#define PADDED(columns) ((columns) + 16 / int(sizeof(storage))) /* a row's elements in threadgroup memory */

/* A lane's place in every fragment. */
struct place {
    ushort row, column;
};

METAL_FUNC place place_of(uint lane)
{
    return place{ushort(lane / 16 * 4 + lane / 2 % 4), ushort(lane / 8 % 2 * 4 + lane % 2 * 2)};
}

/* The sum and the largest of x over the lanes of a row: each lane of it gets the result. */
METAL_FUNC float row_sum(float x)
{
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(8));
}

METAL_FUNC float row_max(float x)
{
    x = max(x, simd_shuffle_xor(x, ushort(1)));
    return max(x, simd_shuffle_xor(x, ushort(8)));
}

/* The sum of x over the lanes of a column. */
METAL_FUNC float column_sum(float x)
{
    x += simd_shuffle_xor(x, ushort(2));
    x += simd_shuffle_xor(x, ushort(4));
    return x + simd_shuffle_xor(x, ushort(16));
}

/* A matrix as a fragment, and back. */
METAL_FUNC float2 fragment_of(thread simdgroup_float8x8 &matrix)
{
    return float2{matrix.thread_elements()[0], matrix.thread_elements()[1]};
}

METAL_FUNC void set_matrix(thread simdgroup_float8x8 &matrix, float2 x)
{
    matrix.thread_elements()[0] = x[0];
    matrix.thread_elements()[1] = x[1];
}

/* C += A B */
METAL_FUNC void multiply_add(thread float2 &C, float2 A, float2 B)
{
    simdgroup_float8x8 a, b, c;
    set_matrix(a, A);
    set_matrix(b, B);
    set_matrix(c, C);
    simdgroup_multiply_accumulate(c, a, b, c);
    C = fragment_of(c);
}

/* S += A B^T. A: 8 rows in registers; B: 8 * FRAGMENTS rows of a tile, of which only the COLUMNS * 8 columns from
 * `tile` on take part. */
template <int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void multiply_rows(thread float2 *S, thread const storage2 *A, threadgroup const storage *tile, place at)
{
    threadgroup const storage *own = tile + at.column * STRIDE + at.row;
    UNROLL
    for (int d = 0; d < COLUMNS; d++) {
        float2 a = widen(A[d]);
        UNROLL
        for (int n = 0; n < FRAGMENTS; n++) {
            threadgroup const storage *b = own + n * 8 * STRIDE + d * 8;
            multiply_add(S[n], a, float2{widen(b[0]), widen(b[STRIDE])});
        }
    }
}

/* O += P B. P: 8 rows in registers, as many columns as B has rows, 8 * FRAGMENTS. */
template <int FRAGMENTS, int COLUMNS, int STRIDE>
METAL_FUNC void multiply_columns(thread float2 *O, thread const float2 *P, threadgroup const storage *tile, place at)
{
    threadgroup const storage *own = tile + at.row * STRIDE + at.column;
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        UNROLL
        for (int d = 0; d < COLUMNS; d++) {
            threadgroup const storage *b = own + n * 8 * STRIDE + d * 8;
            multiply_add(O[d], P[n], widen(*(threadgroup const storage2 *)b));
        }
    }
}

/* A lane's elements of a row in device memory, whose columns lie `step` apart: two from `column` on, and so on every 8
 * columns. 0 beyond the row's end, or all if the row is not there. */
template <int FRAGMENTS>
METAL_FUNC void load_row(thread storage2 *x, device const storage *row, long step, long column, long columns,
                         bool there)
{
    UNROLL
    for (int d = 0; d < FRAGMENTS; d++, column += 8) {
        x[d] = storage2{0, 0};
        if (there && column < columns)
            x[d][0] = row[column * step];
        if (there && column + 1 < columns)
            x[d][1] = row[(column + 1) * step];
    }
}

template <int FRAGMENTS, bool REST = false>
METAL_FUNC void store_row(device storage *row, long step, long column, long columns, thread const float2 *x,
                          float factor)
{
    UNROLL
    for (int d = 0; d < FRAGMENTS; d++, column += 8) {
        if (column < columns)
            row[column * step] = REST ? narrow_rest(x[d][0] * factor) : narrow(x[d][0] * factor);
        if (column + 1 < columns)
            row[(column + 1) * step] = REST ? narrow_rest(x[d][1] * factor) : narrow(x[d][1] * factor);
    }
}

template <int FRAGMENTS> METAL_FUNC void clear(thread float2 *x)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        x[n] = float2{0.0f, 0.0f};
}

/* Copies ROWS x COLUMNS elements into a tile, all LANES lanes of the threadgroup together. Rows and columns that are
 * not there are 0. `wide`: four neighbours are one aligned load. */
template <int ROWS, int COLUMNS, int LANES>
METAL_FUNC void stage(threadgroup storage *tile, device const storage *from, long row_step, long column_step, long rows,
                      long columns, bool wide, uint index)
{
    for (int run = int(index); run < ROWS * COLUMNS / 4; run += LANES) {
        int row = run / (COLUMNS / 4), column = run % (COLUMNS / 4) * 4;
        storage4 x = storage4{0, 0, 0, 0};
        if (row < rows) {
            device const storage *at = from + row * row_step + column * column_step;
            if (wide && column + 4 <= columns) {
                x = *(device const storage4 *)at;
            } else {
                UNROLL
                for (int i = 0; i < 4; i++)
                    if (column + i < columns)
                        x[i] = at[i * column_step];
            }
        }
        *(threadgroup storage4 *)(tile + row * PADDED(COLUMNS) + column) = x;
    }
}
