/* One fault for each value of FAULT: the kernel is right without it, and the checker must find it. A number for
 * every lane of a threadgroup of 64 goes through an array in threadgroup memory, to be read in the opposite order. */
#include <metal_stdlib>
using namespace metal;

struct fault_args {
    uint count;
    float scale;
};

kernel void turn_round(device const float *from [[buffer(0)]], device float *to [[buffer(1)]],
                       constant fault_args &args [[buffer(2)]], device atomic_uint *counter [[buffer(3)]],
                       uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]])
{
    THREADGROUP_ARRAY(float, shared, 64);
    THREADGROUP_ARRAY(ushort, narrow, 64);
    uint i = group * 64 + index;
    float sum = 0.0f;
#if FAULT == 1 /* a thread leaves before a barrier */
    if (index == 63)
        return;
#endif
    for (int round = 0; round < 3; round++) {
        float x = i < args.count ? from[i] : 0.0f;
#if FAULT == 2 /* reads beyond a buffer */
        x = from[i];
#endif
#if FAULT == 3 /* writes beyond its threadgroup memory */
        (shared + 1)[index] = x;
#elif FAULT == 26 /* the same, by an index */
        shared[index + 1] = x;
#elif FAULT == 4  /* leaves an element unwritten */
        if (index != 5)
            shared[index] = x;
#elif FAULT == 5  /* several write one element */
        shared[index & ~1u] = x;
        shared[index] = x;
#else
        shared[index] = x;
#endif
#if FAULT == 6    /* no barrier between write and read */
#elif FAULT == 7  /* a barrier of the simdgroup alone */
        simdgroup_barrier(mem_flags::mem_threadgroup);
#elif FAULT == 8  /* a barrier for other memory */
        threadgroup_barrier(mem_flags::mem_device);
#elif FAULT == 9  /* a barrier for no memory */
        threadgroup_barrier(mem_flags::mem_none);
#elif FAULT == 10 /* two barriers where one was meant */
        if (simdgroup == 0)
            threadgroup_barrier(mem_flags::mem_threadgroup);
        else
            threadgroup_barrier(mem_flags::mem_threadgroup);
#else
        threadgroup_barrier(mem_flags::mem_threadgroup); /* as it should be */
#endif
        sum += shared[63 - index] * args.scale;
#if FAULT != 11 /* the next round overwrites what others still read */
        threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
    }

    narrow[index] = ushort(index); /* within a simdgroup, its own barrier is enough */
#if FAULT == 12                    /* for the wrong memory */
    simdgroup_barrier(mem_flags::mem_device);
#elif FAULT != 13 /* a simdgroup does not order memory by itself */
    simdgroup_barrier(mem_flags::mem_threadgroup);
#endif
    sum += float(narrow[index ^ 1]) - float(index ^ 1);

#if FAULT == 14 /* some lanes do not take part */
    if (lane < 16)
        sum = simd_shuffle_xor(sum, 1);
#elif FAULT == 15 /* lanes differ in what they take part in */
    sum = lane & 2 ? simd_shuffle_xor(sum, 1) : simd_shuffle(sum, ushort(lane ^ 1));
    sum = simd_shuffle_xor(sum, 1);
#elif FAULT == 16 /* lanes differ in the matrix that they load */
    simdgroup_float8x8 m;
    simdgroup_load(m, from + lane, 0);
#elif FAULT == 17 /* overflow */
    sum += float(int(args.count) * 0x10000000 * 16) * 0.0f;
#elif FAULT == 18 /* not aligned */
    float2 two = *(device const float2 *)(from + 1);
    sum += two.x * 0.0f;
#elif FAULT == 19 /* a float that no int holds */
    sum += float(int(1e20f * args.scale)) * 0.0f;
#elif FAULT == 20 /* by a null pointer */
    device const float *nowhere = args.count ? (device const float *)0 : from;
    sum += nowhere[0];
#elif FAULT == 25 /* far away */
    sum += from[ulong(args.count) << 40];
#endif
#if FAULT == 21 /* an output is read before it was written */
    sum += to[i < args.count ? i : 0] * 0.0f;
#endif

#if FAULT == 22 /* threadgroups write one element */
    to[index < args.count ? index : 0] = sum;
#elif FAULT == 23 /* a threadgroup reads what another writes */
    if (i < args.count)
        to[i] = sum;
    if (index == 0)
        to[64 * group] += i >= 64 ? to[i - 64] * 0.0f : 0.0f;
#else
    if (i < args.count)
        to[i] = sum;
#endif
#if FAULT == 24 /* an atomic and a plain access */
    if (index == 0)
        *(device uint *)counter = 1;
#endif
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* No mistake, but an invitation to the optimiser: all that depends on `first` could be put together, and the barrier
 * between would then be there twice, for threads that must meet at one. */
kernel void split_in_two(device float *to [[buffer(0)]], uint index [[thread_index_in_threadgroup]])
{
    THREADGROUP_ARRAY(float, shared, 128);
    bool first = index < 32;
    float x[4];
    // clang-format off
    _Pragma("clang loop unroll(full)")
    for (int d = 0; d < 4; d++) {
        x[d] = float(index * 4 + uint(d));
        if (!first)
            shared[(index - 32) * 4 + uint(d)] = x[d];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (first) {
        _Pragma("clang loop unroll(full)")
        for (int d = 0; d < 4; d++)
            x[d] += shared[index * 4 + uint(d)];
    }
    // clang-format on
    to[index] = x[0] + x[1] + x[2] + x[3];
}

#if FAULT == 27 /* each half of the threads ends with a barrier of its own */
kernel void end_apart(device uint *to [[buffer(0)]], uint index [[thread_index_in_threadgroup]])
{
    if (index & 1) {
        to[index] = 1;
        threadgroup_barrier(mem_flags::mem_device);
    } else {
        to[index + 1] = 2;
        threadgroup_barrier(mem_flags::mem_device);
    }
}
#endif
