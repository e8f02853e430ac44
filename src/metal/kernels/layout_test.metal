/* The self-test: whether simdgroup matrices lie in this device's lanes as fragment.h says. The host runs one simdgroup
 * of it before it uses the other kernels. Each lane stores 0 if all is well, else a bit for each failure:
 *     1 elements lie elsewhere   2 a product   4 a sum or a maximum over a row   8 a sum over a column
 * All numbers are small integers, so that results are exact. */
#include <metal_stdlib>
using namespace metal;
#include "metal/kernels/element.h"
#include "metal/kernels/fragment.h"

kernel void layout_test(device uint *wrong [[buffer(2)]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(float, numbers, 64);
    lane_coord at = lane_coord_of(lane);
    int row = at.row, column = at.column;
    numbers[lane] = float(lane);
    numbers[lane + 32] = float(lane + 32);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 loaded;
    simdgroup_load(loaded, numbers, 8);
    float2 A = fragment_of(loaded);
    uint bits = A[0] != float(row * 8 + column) || A[1] != float(row * 8 + column + 1) ? 1u : 0u;

    A = float2{float(row * 8 + column), float(row * 8 + column + 1)};
    float2 B = float2{float(row + 2 * column), float(row + 2 * column + 2)}, C = float2{1.0f, -1.0f};
    multiply_add(C, A, B);
    for (int e = 0; e < 2; e++) {
        float sum = e == 0 ? 1.0f : -1.0f;
        for (int k = 0; k < 8; k++)
            sum += float((row * 8 + k) * (k + 2 * (column + e)));
        bits |= C[e] != sum ? 2u : 0u;
    }
    float all = row_sum(A[0] + A[1]), top = row_max(A[1]), down = column_sum(A[0]);
    bits |= all != float(row * 64 + 28) || top != float(row * 8 + 7) ? 4u : 0u;
    bits |= down != float(224 + 8 * column) ? 8u : 0u;
    wrong[lane] = bits;
}
