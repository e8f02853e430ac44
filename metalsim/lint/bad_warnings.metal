/* What clang only warns of is an error to the lint. */
#include <metal_stdlib>
using namespace metal;

METAL_FUNC float warned(float x)
{
    int unused = 3; // EXPECT-ERROR: unused
    uint count = 4u;
    for (int i = 0; i < count; i++) // EXPECT-ERROR: different signs
        x += 1.0f;
    return x;
}
kernel void good(device float *a [[buffer(0)]], uint i [[thread_position_in_grid]]) { a[i] = warned(0.0f); }
