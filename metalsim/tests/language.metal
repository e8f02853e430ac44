/* Types, conversions, functions and positions of MSL, for test_language.c. */
#include <metal_stdlib>
using namespace metal;

/* Every bit pattern of 16 bits to float, and every float given to 16 bits. */
kernel void convert(device const uint *floats [[buffer(0)]], device ushort *halves [[buffer(1)]],
                    device ushort *bfloats [[buffer(2)]], device uint *from_half [[buffer(3)]],
                    device uint *from_bfloat [[buffer(4)]], uint i [[thread_position_in_grid]])
{
    float x = as_type<float>(floats[i]);
    halves[i] = as_type<ushort>(half(x));
    bfloats[i] = as_type<ushort>(bfloat(x));
    from_half[i] = as_type<uint>(float(as_type<half>(ushort(i))));
    from_bfloat[i] = as_type<uint>(float(as_type<bfloat>(ushort(i))));
}

struct place {
    uint3 in_grid, in_group, group, threads, groups, grid;
    uint index, lane, simdgroup, width, simdgroups;
};

/* Where each thread is, by every attribute, in differing types. */
kernel void places(device uint *to [[buffer(0)]], uint3 in_grid [[thread_position_in_grid]],
                   ushort3 in_group [[thread_position_in_threadgroup]], uint3 group [[threadgroup_position_in_grid]],
                   uint3 threads [[threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
                   uint3 grid [[threads_per_grid]], ushort index [[thread_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint width [[threads_per_simdgroup]], uint simdgroups [[simdgroups_per_threadgroup]])
{
    device uint *own = to + 23 * (in_grid.x + grid.x * (in_grid.y + grid.y * in_grid.z));
    uint3 three[6] = {in_grid, uint3{in_group.x, in_group.y, in_group.z}, group, threads, groups, grid};
    for (int n = 0; n < 6; n++)
        for (int c = 0; c < 3; c++)
            own[3 * n + c] = three[n][c];
    own[18] = index;
    own[19] = lane;
    own[20] = simdgroup;
    own[21] = width;
    own[22] = simdgroups;
}

constant float table[3] = {0.5f, 0.25f, 0.125f};

/* A number for each thing that ought to be as in MSL: 1. */
kernel void facts(device uint *to [[buffer(0)]], device const packed_float4 *unaligned [[buffer(1)]],
                  threadgroup float *fresh TG_ARG(0), threadgroup half *fresh_half TG_ARG(3))
{
    THREADGROUP_ARRAY(half4, array, 5 + 1);
    THREADGROUP_ARRAY(uchar, small, 3);
    THREADGROUP_ARRAY(float2, last, 1);
    float4 v = float4{1.0f, 2.0f, 3.0f, 4.0f};
    float uninitialised;
    to[0] = isnan(fresh[0]) && isnan(fresh[63]);
    to[1] = isnan(float(fresh_half[0]));
    to[2] = all(float4(half4(v)) == v);
    to[3] = all(float4(2.0f) == float4(float2(2.0f), 2.0f, 2.0f));
    to[4] = float4(v.xy, v.zw).w == 4.0f;
    to[5] = any(v > float4(3.5f)) && !all(v > float4(3.5f));
    to[6] = dot(v, v) == 30.0f;
    to[7] = max(v, float4(2.5f)).x == 2.5f && min(1.0f, 2.0f) == 1.0f && clamp(5.0f, 0.0f, 1.0f) == 1.0f;
    to[8] = exp2(3.0f) == 8.0f && precise::exp2(-1.0f) == 0.5f && fast::log2(8.0f) == 3.0f;
    to[9] = abs(precise::tanh(0.5f) - 0.46211716f) < 1e-7f;
    to[10] = fma(2.0f, 3.0f, 4.0f) == 10.0f && rsqrt(4.0f) == 0.5f && sqrt(half(4.0f)) == half(2.0f);
    to[11] = select(1.0f, 2.0f, true) == 2.0f && sizeof(1.0) == 4;
    to[12] = sizeof(half) == 2 && sizeof(long) == 8 && sizeof(float3) == 16 && sizeof(bfloat) == 2;
    to[13] = table[1] == 0.25f;
    to[14] = unaligned[0].y == 7.0f;
    to[15] = isinf(INFINITY) && !isfinite(NAN) && isnan(NAN) && !isnan(INFINITY);
    to[16] = isnan(uninitialised);
    to[17] = as_type<uint>(1.0f) == 0x3f800000u && clz(1u) == 31u && popcount(7u) == 3u;
    to[18] = max(-3, 2) == 2 && abs(-3) == 3 && min(3u, 2u) == 2u;
    to[19] = isnan(float(array[0].x)) && isnan(float(array[5].w)) && small[2] == 255 && isnan(last[0].y);
    to[20] = sizeof(array) == 48 && sizeof(small) == 3 && (ulong)&array[0] % 16 == 0 && (ulong)&last[0] % 16 == 0;
}
