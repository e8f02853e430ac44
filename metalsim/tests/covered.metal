/* For test_tools.py: two helpers with a region each that runs only if X is above 1 or above 2. */
#include <metal_stdlib>
using namespace metal;

template <int N> METAL_FUNC float more(float x)
{
    if (x > float(N))
        return x + 1.0f;
    return x;
}

kernel void covered(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]])
{
    a[i] = more<1>(a[i]);
#if defined(TWICE)
    a[i] = more<2>(a[i]) > 100.0f ? 0.0f : a[i];
#endif
}
