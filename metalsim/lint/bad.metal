/* One error a line, each of which the lint must find: lint.py --expect. What Apple's compiler rejects, and
 * what the dialect of our kernels forbids (metalsim/README.md). */
#include <metal_stdlib>
using namespace metal;

// --- Address spaces
struct operands {
    float *q; // EXPECT-ERROR: no address space
    device float *k;
    thread float *v;
};
METAL_FUNC float first(float *x) { return x[0]; } // EXPECT-ERROR: no address space
METAL_FUNC float second(float2 &x) { return x.y; } // EXPECT-ERROR: no address space
METAL_FUNC float third(thread float *x) { return x[2]; }
METAL_FUNC float *fourth(device float *x); // EXPECT-ERROR: no address space
template <class X> METAL_FUNC X fifth(X *x) { return x[0]; } // EXPECT-ERROR: no address space
METAL_FUNC float sixth(device float *device *x) { return x[0][0]; }
METAL_FUNC float seventh(device float **x) { return x[0][0]; } // EXPECT-ERROR: no address space

// --- Variables
float global_number; // EXPECT-ERROR: must be constant
static float static_number = 1.0f; // EXPECT-ERROR: must be constant
constant float good_number = 1.0f;
constant float no_value; // EXPECT-ERROR: needs its value
extern constant float elsewhere; // EXPECT-ERROR: needs its value

// --- Types
METAL_FUNC float wide(double x) { return float(x); } // EXPECT-ERROR: no double
METAL_FUNC float widest(long long x) { return float(x); } // EXPECT-ERROR: long long
METAL_FUNC bfloat narrow(float x) { return x; } // EXPECT-ERROR: bfloat
METAL_FUNC bfloat narrow_too(bool c, bfloat x) { return c ? x : 0.5f; } // EXPECT-ERROR: bfloat
METAL_FUNC bfloat narrow_well(float x) { return bfloat(x); }
METAL_FUNC float unsuffixed(float x) { return x * 1.5; } // EXPECT-ERROR: without f
union both { float x; uint u; }; // EXPECT-ERROR: no unions
struct base { float x; };
struct derived : base { float y; }; // EXPECT-ERROR: no derived classes
struct dynamic { virtual void f(); float x; }; // EXPECT-ERROR: no virtual

// --- Functions
float helper(float x) { return x; } // EXPECT-ERROR: METAL_FUNC
METAL_FUNC int down(int x) { return x > 0 ? down(x - 1) : 0; } // EXPECT-ERROR: recursion
METAL_FUNC int ping(int x); // EXPECT-ERROR: recursion
METAL_FUNC int pong(int x) { return ping(x - 1); } // EXPECT-ERROR: recursion
METAL_FUNC int ping(int x) { return x > 0 ? pong(x) : 0; } // EXPECT-ERROR: recursion
METAL_FUNC float many(int n, ...) { return float(n); } // EXPECT-ERROR: variadic
METAL_FUNC float careful(float x) noexcept { return x; } // EXPECT-ERROR: noexcept
METAL_FUNC float caller(float (*f)(float)) { return f(1.0f); } // EXPECT-ERROR: function pointers
METAL_FUNC float imageblock(float x) { return x; } // EXPECT-ERROR: another name
METAL_FUNC float2 keyword(float2 fragment) { return fragment; } // EXPECT-ERROR: keyword
METAL_FUNC float __reserved(float x) { return x; } // EXPECT-ERROR: the compiler's

// --- Statements
METAL_FUNC float statements(float x, device float *p, constant float *c, threadgroup float *t)
{
    static float kept = 0.0f; // EXPECT-ERROR: static
    thread_local float own = 0.0f; // EXPECT-ERROR: thread_local
    threadgroup float shared[32]; // EXPECT-ERROR: address space
    device float *q = t; // EXPECT-ERROR: __local
    auto f = [](float y) { return y; }; // EXPECT-ERROR: lambdas
    if (x > 1.0f)
        goto end; // EXPECT-ERROR: goto
    c[0] = x; // EXPECT-ERROR: read-only
    x = x > 3.0f ? INFINITY : x; // EXPECT-ERROR: fast math
    x = isnan(x) ? 0.0f : x; // EXPECT-ERROR: fast math
    if constexpr (sizeof(x) == 4) // EXPECT-ERROR: C++17
        x += 1.0f;
    const float2 *bare = 0; // EXPECT-ERROR: no address space
    operands o = {.q = 0, .k = q, .v = 0}; // EXPECT-ERROR: designated
    ushort small = ushort{int(x)}; // EXPECT-ERROR: narrowed
    x += float(small) + o.k[0] + bare[0].x + own + kept + f(x) + shared[0];
    float *made = new float; // EXPECT-ERROR: no heap
    threadgroup_barrier(mem_flags::none); // EXPECT-ERROR: none
end:
    return x;
}

// --- Kernels
kernel float returning(device float *a [[buffer(0)]]) { return a[0]; } // EXPECT-ERROR: returns void
kernel void early(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    if (i > 3)
        return; // EXPECT-ERROR: no early return
    a[i] = simd_sum(1.0f);
}
kernel void late(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    float x = simd_sum(1.0f);
    if (i > 3)
        return;
    a[i] = x;
}
kernel void early_in_a_loop(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    for (uint j = 0; j < 4; j++) {
        a[i] = simd_sum(a[i]);
        if (j > i)
            return; // EXPECT-ERROR: no early return
    }
}
kernel void early_but_alone(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    if (i > 3)
        return;
    a[i] = 0.0f;
}
kernel void mixed(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]], // EXPECT-ERROR: Metal wants one
                  uint3 j [[threads_per_grid]])
{
    a[i] = float(j.x);
}
kernel void signed_index(device float *a [[buffer(0)]], int i [[thread_index_in_simdgroup]]) // EXPECT-ERROR: not int
{
    a[i] = 0.0f;
}
kernel void written_out(threadgroup float *a [[threadgroup(0)]]) { a[0] = 0.0f; } // EXPECT-ERROR: THREADGROUP_ARRAY
kernel void by_length(threadgroup float *a TG_ARG(0)) { a[0] = 0.0f; } // EXPECT-ERROR: THREADGROUP_ARRAY
METAL_FUNC float array_in_helper(float x)
{
    THREADGROUP_ARRAY(float, shared, 32); // EXPECT-ERROR: in kernels only
    return shared[0] + x;
}
kernel void array_in_a_block(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    for (uint j = 0; j < 4; j++) {
        THREADGROUP_ARRAY(float, shared, 32); // EXPECT-ERROR: outermost scope
        a[i] = shared[j];
    }
}
kernel void good(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    THREADGROUP_ARRAY(float, t, 4);
    t[0] = third(&t[0] == nullptr ? nullptr : nullptr) + good_number;
    a[i] = t[0];
}

// The end, since nothing is read after a file that is not there.
#include <math.h> // EXPECT-ERROR: file not found
