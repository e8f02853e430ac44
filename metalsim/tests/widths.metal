/* Accesses of every width: each kernel reads elements of one type, and writes them. */
#include <metal_stdlib>
using namespace metal;

#define WIDTH(type)                                                                               \
    kernel void copy_##type(device const type *from [[buffer(0)]], device type *to [[buffer(1)]], \
                            uint i [[thread_position_in_grid]])                                   \
    {                                                                                             \
        to[i] = from[i];                                                                          \
    }

WIDTH(uchar)
WIDTH(half)
WIDTH(bfloat)
WIDTH(float)
WIDTH(ulong)
WIDTH(uchar4)
WIDTH(half2)
WIDTH(half4)
WIDTH(float2)
WIDTH(float3)
WIDTH(float4)
WIDTH(ulong2)
WIDTH(ushort)
WIDTH(uint4)
WIDTH(short4)
WIDTH(char2)
WIDTH(packed_float4)
WIDTH(packed_half4)
