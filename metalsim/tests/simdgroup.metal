/* What the lanes of a simdgroup do together, each thing by itself, for test_simdgroup.c to compare with
 * plain loops. RESULT, LEFT, RIGHT and ADDED are element types; LEFT is that of all but `product`. */
#include <metal_stdlib>
using namespace metal;

struct copy_args {
    ulong from_row, from_x, from_y, to_row, to_x, to_y;
    uint from_transposed, to_transposed;
};

/* to = from, by way of a matrix; in threadgroup memory, both. */
kernel void copy(device const LEFT *from [[buffer(0)]], device LEFT *to [[buffer(1)]],
                 constant copy_args &a [[buffer(2)]], threadgroup LEFT *memory TG_ARG(0),
                 uint lane [[thread_index_in_simdgroup]])
{
    simdgroup_matrix<LEFT, 8, 8> m;
    ulong2 from_origin = ulong2{a.from_x, a.from_y}, to_origin = ulong2{a.to_x, a.to_y};
#if defined(LOCAL)
    for (uint i = lane; i < SIZE; i += 32)
        memory[i] = from[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(m, memory, a.from_row, from_origin, a.from_transposed != 0);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < SIZE; i += 32)
        memory[i] = to[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(m, memory, a.to_row, to_origin, a.to_transposed != 0);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < SIZE; i += 32)
        to[i] = memory[i];
#else
    simdgroup_load(m, from, a.from_row, from_origin, a.from_transposed != 0);
    simdgroup_store(m, to, a.to_row, to_origin, a.to_transposed != 0);
#endif
}

/* D = A B + C, and in `alone` A B. */
kernel void product(device const LEFT *A [[buffer(0)]], device const RIGHT *B [[buffer(1)]],
                    device const ADDED *C [[buffer(2)]], device RESULT *D [[buffer(3)]],
                    device RESULT *alone [[buffer(4)]])
{
    simdgroup_matrix<LEFT, 8, 8> a;
    simdgroup_matrix<RIGHT, 8, 8> b;
    simdgroup_matrix<ADDED, 8, 8> c;
    simdgroup_matrix<RESULT, 8, 8> d;
    simdgroup_load(a, A);
    simdgroup_load(b, B);
    simdgroup_load(c, C);
    simdgroup_multiply_accumulate(d, a, b, c);
    simdgroup_store(d, D);
    simdgroup_multiply(d, a, b);
    simdgroup_store(d, alone);
}

/* Two elements a lane: of a loaded matrix, a diagonal, a filled and an unwritten one; and back. */
kernel void elements(device const float *from [[buffer(0)]], device float *to [[buffer(1)]],
                     device float *back [[buffer(2)]], uint lane [[thread_index_in_simdgroup]])
{
    simdgroup_float8x8 loaded, unwritten, own;
    simdgroup_float8x8 diagonal(3.0f), filled = make_filled_simdgroup_matrix<float, 8, 8>(5.0f);
    simdgroup_load(loaded, from);
    for (int e = 0; e < 2; e++) {
        to[lane * 2 + e] = loaded.thread_elements()[e];
        to[64 + lane * 2 + e] = diagonal.thread_elements()[e];
        to[128 + lane * 2 + e] = filled.thread_elements()[e];
        to[192 + lane * 2 + e] = unwritten.thread_elements()[e];
        own.thread_elements()[e] = float(lane * 2 + e);
    }
    simdgroup_store(own, back);
}

#define GIVE(value)                   \
    to[at * 32 + lane] = LEFT(value); \
    at++;

/* Every function of a simdgroup on x, a row of results each. */
kernel void functions(device const LEFT *from [[buffer(0)]], device LEFT *to [[buffer(1)]],
                      uint lane [[thread_index_in_simdgroup]])
{
    LEFT x = from[lane];
    uint at = 0;
    GIVE(simd_shuffle(x, ushort(lane * 7 % 32)))
    GIVE(simd_shuffle_xor(x, 1))
    GIVE(simd_shuffle_xor(x, 8))
    GIVE(simd_shuffle_xor(x, 31))
    GIVE(simd_shuffle_up(x, 3))
    GIVE(simd_shuffle_down(x, 5))
    GIVE(simd_shuffle_rotate_up(x, 3))
    GIVE(simd_shuffle_rotate_down(x, 5))
    GIVE(simd_broadcast(x, 17))
    GIVE(simd_broadcast_first(x))
    GIVE(simd_sum(x))
    GIVE(simd_max(x))
    GIVE(simd_min(x))
    GIVE(simd_prefix_inclusive_sum(x))
    GIVE(simd_prefix_exclusive_sum(x))
    GIVE(simd_all(x > LEFT(0)))
    GIVE(simd_any(x > LEFT(0)))
    GIVE(simd_all(x > LEFT(-100)))
    GIVE(simd_any(x > LEFT(100)))
    GIVE(simd_product(lane < 3 ? x : LEFT(1)))
    GIVE(simd_shuffle_xor(metal::vec<LEFT, 2>{x, LEFT(lane)}, 2)[1])
    GIVE(simd_is_first())
}

kernel void bits(device const uint *from [[buffer(0)]], device uint *to [[buffer(1)]],
                 uint lane [[thread_index_in_simdgroup]])
{
    to[lane] = simd_and(from[lane]);
    to[32 + lane] = simd_or(from[lane]);
    to[64 + lane] = simd_xor(from[lane]);
}
