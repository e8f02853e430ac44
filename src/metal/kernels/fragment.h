/* Matrix fragments. A simdgroup multiplies 8 x 8 matrices of floats; how such a matrix lies in the registers of its 32
 * lanes is known here and nowhere else:
 *
 *     a lane holds two neighbours of one row, in a float2: a fragment
 *     row    = 4 * (lane / 16) + lane / 2 % 4
 *     column = 4 * (lane / 8 % 2) + 2 * (lane % 2)     and the next
 *
 * so that the four lanes of a row differ in bits 0 and 3 of their number. Apple does not document this; it has held
 * from M1 on, and layout_test (layout_test.metal) checks it on the device at hand. */

/* An array in threadgroup memory, in the outermost scope of a kernel. Its size is a constant, so that the compiler
 * knows how much memory a threadgroup has; its alignment is that of the widest load. */
#if !defined(THREADGROUP_ARRAY)
#define THREADGROUP_ARRAY(type, name, count) alignas(16) threadgroup type name[count]
#endif
#if !defined(UNROLL) /* fragments are arrays, and stay in registers only if every index is a constant */
#define UNROLL _Pragma("clang loop unroll(full)")
#endif
#if !defined(ROLLED) /* loops that are rarely run, and whose unrolled code would take registers from others */
#define ROLLED _Pragma("clang loop unroll(disable)")
#endif

/* Which element of every fragment a lane holds: (row, column), and (row, column + 1). */
struct lane_coord {
    ushort row, column;
};

METAL_FUNC lane_coord lane_coord_of(uint lane)
{
    return lane_coord{ushort(lane / 16 * 4 + lane / 2 % 4), ushort(lane / 8 % 2 * 4 + lane % 2 * 2)};
}

/* The sum and the maximum of x over the lanes of a row: each lane of it gets the result. */
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

template <int FRAGMENTS> METAL_FUNC void clear(thread float2 *x)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        x[n] = float2{0.0f, 0.0f};
}

/* Stores a lane's elements x * factor of a row in device memory whose columns lie `step` apart: two from `column` on,
 * and two of every 8 columns after it, up to the end of the row. REST: what rounding x * factor takes off it. */
template <int FRAGMENTS, bool REST = false>
METAL_FUNC void store_row(device out_storage *row, long step, int column, int columns, thread const float2 *x,
                          float factor)
{
    device out_storage *to = row + column * step;
    UNROLL
    for (int d = 0; d < FRAGMENTS; d++, column += 8, to += 8 * step) {
        if (column < columns)
            *to = REST ? narrow_rest(x[d][0] * factor) : narrow_out(x[d][0] * factor);
        if (column + 1 < columns)
            to[step] = REST ? narrow_rest(x[d][1] * factor) : narrow_out(x[d][1] * factor);
    }
}
