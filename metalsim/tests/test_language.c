/* The language: numbers round as IEEE says, positions are what Metal says, what Metal's type system
 * rejects is rejected here, and the compiler's messages name the lines of the text. */
#include "support.h"

#include <math.h>
#include <string.h>

#define PATTERNS 65536

static uint32_t bits_of(double x)
{
    float rounded = (float)x;
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

/* The value of 16 bits with so many of exponent: 5 for half, 8 for bfloat. */
static double value_of(uint16_t bits, int exponent_bits)
{
    int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << fraction_bits) - 1);
    double x = exponent ? ldexp(1 + ldexp(fraction, -fraction_bits), exponent - bias)
                        : ldexp(fraction, 1 - bias - fraction_bits);
    if (exponent == (1 << exponent_bits) - 1)
        x = fraction ? (double)NAN : (double)INFINITY;
    return bits >> 15 ? -x : x;
}

/* The 16 bits nearest to x; of two, the even ones. A search: values grow with their bits. */
static uint16_t nearest(double x, int exponent_bits)
{
    uint16_t low = 0, high = (uint16_t)(((1 << exponent_bits) - 1) << (15 - exponent_bits)),
             sign = signbit(x) ? 0x8000 : 0;
    double size = fabs(x), last = value_of((uint16_t)(high - 1), exponent_bits);
    double beyond = last + (last - value_of((uint16_t)(high - 2), exponent_bits)) / 2;
    if (size >= beyond)
        return sign | high;
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        *(value_of(middle, exponent_bits) <= size ? &low : &high) = middle;
    }
    double down = size - value_of(low, exponent_bits), up = value_of(high, exponent_bits) - size;
    if (isinf(up))
        return sign | low;
    return sign | (up < down || (up == down && (high & 1) == 0) ? high : low);
}

static void test_conversions(void **state)
{
    static uint32_t floats[PATTERNS], from_half[PATTERNS], from_bfloat[PATTERNS];
    static uint16_t halves[PATTERNS], bfloats[PATTERNS];
    (void)state;
    for (uint32_t i = 0; i < PATTERNS; i++) /* near halves, near bfloats, and anywhere */
        floats[i] = i % 4 == 0 ? bits_of(value_of((uint16_t)(i & 0xfbff), 5) * (1 + ldexp((int)(i >> 2 & 3) - 1, -12)))
                    : i % 4 == 1 ? bits_of(value_of((uint16_t)(i & 0xfbff), 5)) + (i >> 2 & 0x3fff)
                    : i % 4 == 2 ? i << 16 | (i >> 3 & 1 ? 0x8000 : 0x7fff + (i >> 4 & 3))
                                 : i * 2654435761u;
    const struct metalsim_dispatch dispatch = {
        .threadgroups = {PATTERNS / 1024, 1, 1},
        .threads = {1024, 1, 1},
        .buffers = {support_buffer(floats, sizeof floats), support_output(halves, sizeof halves),
                    support_output(bfloats, sizeof bfloats), support_output(from_half, sizeof from_half),
                    support_output(from_bfloat, sizeof from_bfloat)},
    };
    metalsim_library *library = support_load("language.metal", NULL, 0);
    assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "convert"), &dispatch), METALSIM_OK);
    for (uint32_t i = 0; i < PATTERNS; i++) {
        float x;
        memcpy(&x, &floats[i], sizeof x);
        if (isnan(x)) {
            assert_true(isnan(value_of(halves[i], 5)) && isnan(value_of(bfloats[i], 8)));
        } else {
            assert_int_equal(halves[i], nearest(x, 5));
            assert_int_equal(bfloats[i], nearest(x, 8));
        }
        if (!isnan(value_of((uint16_t)i, 5)))
            assert_int_equal(from_half[i], bits_of(value_of((uint16_t)i, 5)));
        if (!isnan(value_of((uint16_t)i, 8)))
            assert_int_equal(from_bfloat[i], bits_of(value_of((uint16_t)i, 8)));
    }
    metalsim_library_destroy(library);
}

static void test_places(void **state)
{
    enum { GROUPS_X = 3, GROUPS_Y = 2, GROUPS_Z = 2, X = 8, Y = 4, Z = 3, THREADS = X * Y * Z, EACH = 23 };
    static uint32_t to[EACH * THREADS * GROUPS_X * GROUPS_Y * GROUPS_Z];
    const struct metalsim_dispatch dispatch = {
        .threadgroups = {GROUPS_X, GROUPS_Y, GROUPS_Z},
        .threads = {X, Y, Z},
        .buffers = {support_output(to, sizeof to)},
    };
    metalsim_library *library = support_load("language.metal", NULL, METALSIM_CHECKED);
    (void)state;
    if (metalsim_dispatch_run(metalsim_library_find(library, "places"), &dispatch) != METALSIM_OK)
        fail_msg("%s", metalsim_last_error());
    const uint32_t *own = to;
    for (uint32_t z = 0; z < Z * GROUPS_Z; z++)
        for (uint32_t y = 0; y < Y * GROUPS_Y; y++)
            for (uint32_t x = 0; x < X * GROUPS_X; x++, own += EACH) {
                uint32_t index = x % X + X * (y % Y + Y * (z % Z));
                const uint32_t expected[EACH] = {
                    x,
                    y,
                    z,
                    x % X,
                    y % Y,
                    z % Z,
                    x / X,
                    y / Y,
                    z / Z,
                    X,
                    Y,
                    Z,
                    GROUPS_X,
                    GROUPS_Y,
                    GROUPS_Z,
                    X * GROUPS_X,
                    Y * GROUPS_Y,
                    Z * GROUPS_Z,
                    index,
                    index % 32,
                    index / 32,
                    32,
                    THREADS / 32,
                };
                assert_memory_equal(own, expected, sizeof expected);
            }
    metalsim_library_destroy(library);
}

static void test_facts(void **state)
{
    enum { FACTS = 21 };
    const float unaligned[5] = {0, 0, 7, 0, 0};
    uint32_t to[FACTS];
    struct metalsim_dispatch dispatch = {
        .threadgroups = {1, 1, 1},
        .threads = {1, 1, 1},
        .buffers = {support_output(to, sizeof to), support_buffer(unaligned, sizeof unaligned)},
        .threadgroup_lengths = {[0] = 256, [3] = 16},
    };
    dispatch.buffers[1].offset = 4;
    (void)state;
    metalsim_library *library = support_load("language.metal", NULL, 0);
    if (metalsim_dispatch_run(metalsim_library_find(library, "facts"), &dispatch) != METALSIM_OK)
        fail_msg("%s", metalsim_last_error());
    for (int i = 0; i < FACTS; i++)
        if (to[i] != 1)
            fail_msg("fact %d does not hold", i);
    metalsim_library_destroy(library);
}

/* -- What does not compile -- */

#define HEAD "#include <metal_stdlib>\nusing namespace metal;\n"
#define KERNEL(body)                                                                      \
    HEAD "kernel void k(device float *a [[buffer(0)]], threadgroup float *t TG_ARG(0),\n" \
         "constant float *c [[buffer(1)]], uint i [[thread_position_in_grid]]) {\n" body "\n}\n"

static void test_rejections(void **state)
{
    const struct {
        const char *text, *reason;
    } cases[] = {
        {KERNEL("a[0] = b;"), "text.metal:5:8: error: use of undeclared identifier 'b'"},
        {HEAD "#line 70 \"core/args.h\"\nint f() { return x; }\n", "core/args.h:70:"},
        {KERNEL("device float *p = t;"), "__local"},
        {KERNEL("threadgroup float *p = a;"), "__global"},
        {KERNEL("float *p = a;"), "__global"},
        {KERNEL("float x; device float *p = &x;"), "__global"},
        {KERNEL("c[0] = 1.0f;"), "read-only"},
        {KERNEL("device float *p = c;"), "__constant"},
        {KERNEL("float x = exp2(a);"), "error"},
        {KERNEL("simdgroup_float8x8 m; simdgroup_load(m, c);"), "no matching function"},
        {KERNEL("simdgroup_half8x8 m; simdgroup_load(m, a);"), "no matching function"},
        {KERNEL("simdgroup_matrix<int, 8, 8> m;"), "float, half or bfloat"},
        {KERNEL("simdgroup_matrix<float, 16, 16> m;"), "8x8"},
        {KERNEL("long x = simd_shuffle_xor(long(i), 1);"), "at most 32 bits"},
        {KERNEL("threadgroup_barrier(2);"), "no"},
        {KERNEL("threadgroup_barrier(mem_flags::none);"), "none"},
        {HEAD "kernel void k(device float *a) {}", "it has no attribute"},
        {HEAD "kernel void k(device float *a [[buffer(31)]]) {}", "0 to 30"},
        {HEAD "kernel void k(device float *a [[buffer(2)]], device float *b [[buffer(2)]]) {}", "has this index"},
        {HEAD "kernel void k(device float *a [[buffers(2)]]) {}", "none that metalsim knows"},
        {HEAD "kernel void k(uint a [[position]]) {}", "none that metalsim knows"},
        {HEAD "kernel void k(float *a [[buffer(0)]]) {}", "device or constant pointer"},
        {HEAD "kernel void k(threadgroup float *a [[buffer(0)]]) {}", "device or constant pointer"},
        {HEAD "kernel void k(device float *a TG_ARG(0)) {}", "threadgroup pointer"},
        {HEAD "METAL_FUNC void f() { THREADGROUP_ARRAY(float, x, 4); }\nkernel void k() { f(); }",
         "outside of a kernel"},
        {HEAD "kernel void k() { for (;;) { THREADGROUP_ARRAY(float, x, 4); } }", "outermost scope"},
        {KERNEL("THREADGROUP_ARRAY(float, x, c[0]);"), "constant expression"},
        {KERNEL("THREADGROUP_ARRAY(float, x, 4); device float *p = x;"), "__local"},
        {HEAD "template <class X> kernel void k(device X *a [[buffer(0)]]) {}", "template"},
        {HEAD "kernel void k(device float *a [[buffer(0)]]", "does not end"},
        {HEAD "[[max_total_threads_per_threadgroup(32 * 4)]] kernel void k() {}", "must be a number from 1 to 1024"},
        {HEAD "kernel void [[max_total_threads_per_threadgroup(2048)]] k() {}", "must be a number from 1 to 1024"},
        {"#error \"not with these\"\n", "not with these"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strstr(support_rejection(cases[i].text), cases[i].reason))
            fail_msg("\"%s\" is not in: %s", cases[i].reason, metalsim_last_error());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversions),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_facts),
        cmocka_unit_test(test_rejections),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
