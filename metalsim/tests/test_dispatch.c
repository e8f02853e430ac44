/* Dispatches and libraries: Metal's limits are refused with sentences, bindings are what they say, many
 * CPU threads do the same as one, and the cache compiles a text once. */
#define _GNU_SOURCE
#include "support.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const text =
    "#include <metal_stdlib>\nusing namespace metal;\n"
    "struct sizes { ulong count; float scale; };\n"
    "kernel void scale(device const float *from [[buffer(0)]], device float *to [[buffer(30)]],\n"
    "    constant sizes &s [[buffer(1)]], threadgroup float *memory TG_ARG(0),\n"
    "    uint i [[thread_position_in_grid]], uint own [[thread_index_in_threadgroup]]) {\n"
    "    memory[own] = i < s.count ? from[i] : 0.0f;\n"
    "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "    if (i < s.count) to[i] = memory[own] * s.scale;\n"
    "}\n"
    "[[kernel, max_total_threads_per_threadgroup(64)]] void\n"
    "few(device uint *to [[buffer(0)]], uint i [[thread_position_in_grid]]) { to[i] = i; }\n"
    "[[max_total_threads_per_threadgroup(32)]] kernel void\n"
    "fewer(device uint *to [[buffer(0)]], uint i [[thread_position_in_grid]]) { to[i] = i; }\n"
    "kernel void sum(device uint *to [[buffer(0)]], uint i [[thread_position_in_grid]]) { to[i] = simd_sum(i); }\n"
    "kernel void nothing() {}\n"
    "kernel void shift(device const float *from [[buffer(0)]], device float *to [[buffer(30)]],\n"
    "    constant sizes &s [[buffer(1)]], threadgroup float *memory TG_ARG(2),\n"
    "    uint i [[thread_position_in_grid]], uint own [[thread_index_in_threadgroup]]) {\n"
    "    THREADGROUP_ARRAY(float, first, 128);\n"
    "    THREADGROUP_ARRAY(float2, second, sizeof(float) * 32);\n"
    "    first[own] = i < s.count ? from[i] : 0.0f;\n"
    "    second[own] = float2{float(i), 1.0f};\n"
    "    memory[own] = -1.0f;\n"
    "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "    uint other = own ^ 1;\n"
    "    if (i < s.count) to[i] = first[other] + second[other].x + second[other].y + memory[other];\n"
    "}\n";

struct sizes {
    uint64_t count;
    float scale;
};

#define COUNT 1000
static float from[COUNT], to[COUNT];
static const struct sizes sizes = {COUNT, 3};

static struct metalsim_dispatch sound(void)
{
    return (struct metalsim_dispatch){
        .threadgroups = {(COUNT + 127) / 128, 1, 1},
        .threads = {128, 1, 1},
        .buffers = {[0] = support_buffer(from, sizeof from),
                    [1] = support_bytes(&sizes, sizeof sizes),
                    [30] = support_output(to, sizeof to)},
        .threadgroup_lengths = {128 * sizeof(float)},
    };
}

static void expect_error(const metalsim_library *library, const char *name, const struct metalsim_dispatch *dispatch,
                         const char *words)
{
    assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, name), dispatch), METALSIM_REFUSED);
    support_expect_error(words);
}

static void test_limits(void **state)
{
    static char large[METALSIM_BYTES_MAX + 1];
    metalsim_library *library = support_compile(text, 0);
    struct metalsim_dispatch d;
    (void)state;
#define EXPECT_ERROR(change, words) d = sound(), change, expect_error(library, "scale", &d, words)
    EXPECT_ERROR(d.threads[0] = 0, "scale: threads are 0 x 1 x 1; a threadgroup has 1 to 1024 in all");
    EXPECT_ERROR(d.threads[1] = 9, "threads are 128 x 9 x 1");
    EXPECT_ERROR(d.threads[2] = SIZE_MAX / 2, "1 to 1024");
    EXPECT_ERROR(d.threadgroups[0] = (size_t)1 << 33, "threads along a dimension");
    EXPECT_ERROR(d.threadgroup_lengths[0] = 24, "threadgroup length 0 is 24; it must be a multiple of 16");
    EXPECT_ERROR(d.threadgroup_lengths[0] = 32784, "threadgroup length 0 is 32784; it may be 32768");
    EXPECT_ERROR(d.threadgroup_lengths[0] = 0, "threadgroup length 0 is 0; parameter memory needs 4");
    EXPECT_ERROR(d.buffers[0].binding = METALSIM_NONE, "nothing is bound at index 0, where parameter from reads");
    EXPECT_ERROR(d.buffers[30].base = NULL, "bound at index 30 has a base of NULL");
    EXPECT_ERROR(d.buffers[0].offset = sizeof from + 1, "has offset 4001; its length is 4000");
    EXPECT_ERROR(d.buffers[1].length = 8, "8 bytes are bound at index 1; parameter s needs 16");
    EXPECT_ERROR(d.buffers[1] = support_bytes(large, sizeof large),
                 "bytes at index 1 have length 4097; it must be 1 to 4096");
    EXPECT_ERROR(d.buffers[1] = support_bytes(large, 0), "have length 0");
    EXPECT_ERROR(d.buffers[0] = support_bytes(large, 16),
                 "bytes are bound at index 0; parameter from is in device memory");
#undef REFUSE
    d = sound();
    d.buffers[0] = support_output(to, sizeof to);
    expect_error(library, "few", &d, "threads are 128 x 1 x 1; a threadgroup has 1 to 64 in all");
    d.threads[0] = 33;
    expect_error(library, "fewer", &d, "threads are 33 x 1 x 1; a threadgroup has 1 to 32 in all");
    assert_null(metalsim_library_find(library, "missing"));
    support_expect_error("the library has no kernel \"missing\"");
    metalsim_library_destroy(library);
    metalsim_library_destroy(NULL);
}

static void test_partial_simdgroup(void **state)
{
    uint32_t out[64];
    struct metalsim_dispatch d = {
        .threadgroups = {1, 1, 1}, .threads = {33, 1, 1}, .buffers = {support_output(out, 256)}};
    metalsim_library *library = support_compile(text, 0);
    (void)state;
    assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "few"), &d), METALSIM_OK);
    assert_int_equal(out[32], 32);
    assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "sum"), &d), METALSIM_FAULT);
    support_expect_error("in a simdgroup of 1 lanes: the threads of a threadgroup must be a multiple of 32");
    metalsim_library_destroy(library);
}

static void test_kernels(void **state)
{
    const char *const names[] = {"scale", "few", "fewer", "sum", "nothing", "shift"};
    metalsim_library *library = support_compile(text, 0);
    (void)state;
    assert_int_equal(metalsim_library_count(library), 6);
    for (size_t i = 0; i < 6; i++)
        assert_string_equal(metalsim_kernel_name(metalsim_library_kernel(library, i)), names[i]);
    assert_int_equal(metalsim_kernel_threads(metalsim_library_find(library, "scale")), 1024);
    assert_int_equal(metalsim_kernel_threads(metalsim_library_find(library, "few")), 64);
    assert_int_equal(metalsim_kernel_threads(metalsim_library_find(library, "fewer")), 32);
    assert_int_equal(metalsim_kernel_threads(metalsim_library_find(library, "sum")), 1024);
    struct metalsim_dispatch none = {.threadgroups = {0, 1, 1}, .threads = {1, 1, 1}};
    assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "nothing"), &none), METALSIM_OK);
    metalsim_library_destroy(library);
}

static void fill(void)
{
    for (int i = 0; i < COUNT; i++)
        from[i] = (float)i, to[i] = -1;
}

/* Arrays that a kernel declares, beside an argument. */
static void test_arrays(void **state)
{
    (void)state;
    for (unsigned build = 0; build <= METALSIM_CHECKED; build++) {
        metalsim_library *library = support_compile(text, build);
        const metalsim_kernel *kernel = metalsim_library_find(library, "shift");
        const size_t declared = 128 * sizeof(float) + 128 * 2 * sizeof(float);
        struct metalsim_dispatch d = sound();
        d.threadgroup_lengths[2] = 128 * sizeof(float);
        assert_int_equal(metalsim_kernel_threadgroup_bytes(kernel, d.threadgroup_lengths), declared + 512);
        fill();
        assert_int_equal(metalsim_dispatch_run(kernel, &d), METALSIM_OK);
        for (int i = 0; i < COUNT; i++)
            assert_true(to[i] == (float)(2 * (i ^ 1)));
        d.threadgroup_lengths[0] = METALSIM_THREADGROUP_MAX; /* of no argument, so it does not count */
        d.threadgroup_lengths[2] = METALSIM_THREADGROUP_MAX - declared;
        assert_int_equal(metalsim_dispatch_run(kernel, &d), METALSIM_OK);
        d.threadgroup_lengths[2] += 16;
        expect_error(library, "shift", &d,
                     "shift: its arrays and arguments have 32784 bytes of threadgroup memory; they may have 32768");
        metalsim_library_destroy(library);
    }
}

static void test_cpus(void **state)
{
    metalsim_library *library = support_compile(text, 0);
    (void)state;
    for (int cpus = 0; cpus < 100; cpus = cpus * 2 + 1) {
        struct metalsim_dispatch d = sound();
        d.cpus = cpus;
        fill();
        assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "scale"), &d), METALSIM_OK);
        for (int i = 0; i < COUNT; i++)
            assert_true(to[i] == 3.0f * (float)i);
    }
    metalsim_library_destroy(library);
}

/* One buffer at two indices, with offsets; and two that overlap otherwise. */
static void test_shared_buffer(void **state)
{
    static float both[2 * COUNT];
    metalsim_library *plain = support_compile(text, 0), *checked = support_compile(text, METALSIM_CHECKED);
    const metalsim_library *const libraries[] = {plain, checked};
    (void)state;
    for (int l = 0; l < 2; l++) {
        struct metalsim_dispatch d = sound();
        for (int i = 0; i < COUNT; i++)
            both[i] = (float)i, both[COUNT + i] = -1;
        d.buffers[0] = d.buffers[30] = support_buffer(both, sizeof both);
        d.buffers[30].offset = COUNT * sizeof(float);
        assert_int_equal(metalsim_dispatch_run(metalsim_library_find(libraries[l], "scale"), &d), METALSIM_OK);
        for (int i = 0; i < COUNT; i++)
            assert_true(both[i] == (float)i && both[COUNT + i] == 3.0f * (float)i);
    }
    struct metalsim_dispatch d = sound();
    d.buffers[0] = support_buffer(both, sizeof from);
    d.buffers[30] = support_output(both + 10, sizeof from);
    expect_error(checked, "scale", &d, "the buffers at indices 0 and 30 overlap");
    metalsim_library_destroy(plain);
    metalsim_library_destroy(checked);
}

/* An access just before an offset's buffer, or past its end, is found. */
static void test_buffer_ends(void **state)
{
    metalsim_library *library = support_compile(text, METALSIM_CHECKED);
    const metalsim_kernel *kernel = metalsim_library_find(library, "scale");
    struct metalsim_dispatch d = sound();
    (void)state;
    fill();
    d.buffers[0].length -= 4;
    assert_int_equal(metalsim_dispatch_run(kernel, &d), METALSIM_FAULT);
    support_expect_error("out of bounds: read of 4 bytes at byte 3996 of buffer 0, which has 3996");
    d = sound();
    d.buffers[30].length -= 2;
    assert_int_equal(metalsim_dispatch_run(kernel, &d), METALSIM_FAULT);
    support_expect_error("out of bounds: write of 4 bytes at byte 3996 of buffer 30, which has 3998");
    metalsim_library_destroy(library);
}

/* A write past the end of a threadgroup argument is found in every build. */
static void test_argument_ends(void **state)
{
    const char *const words[] = {
        "out of bounds: something wrote to memory beside threadgroup argument 0",
        "out of bounds: write of 4 bytes at byte 496 of threadgroup argument 0, which has 496"};
    (void)state;
    fill();
    for (unsigned build = 0; build <= METALSIM_CHECKED; build++) {
        metalsim_library *library = support_compile(text, build);
        struct metalsim_dispatch d = sound();
        d.threadgroup_lengths[0] = 496;
        assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "scale"), &d), METALSIM_FAULT);
        support_expect_error(words[build]);
        metalsim_library_destroy(library);
    }
}

static void *run_often(void *argument)
{
    const metalsim_kernel *kernel = metalsim_library_find(argument, "scale");
    float *own = malloc(sizeof to);
    long wrong = !own;
    for (int round = 0; own && round < 20; round++) {
        struct metalsim_dispatch d = sound();
        d.buffers[30] = support_output(own, sizeof to);
        wrong += metalsim_dispatch_run(kernel, &d) != METALSIM_OK;
        for (int i = 0; i < COUNT; i++)
            wrong += own[i] != 3.0f * (float)i;
    }
    free(own);
    return (void *)wrong;
}

static void test_concurrent_dispatches(void **state)
{
    metalsim_library *plain = support_compile(text, 0), *checked = support_compile(text, METALSIM_CHECKED);
    pthread_t threads[4];
    (void)state;
    fill();
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, run_often, i % 2 ? plain : checked), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        assert_null(wrong);
    }
    metalsim_library_destroy(plain);
    metalsim_library_destroy(checked);
}

/* -- The cache -- */

static int count_files(const char *folder, const char *suffix)
{
    DIR *open = opendir(folder);
    int count = 0;
    assert_non_null(open);
    for (const struct dirent *entry; (entry = readdir(open));) {
        const char *dot = strrchr(entry->d_name, '.');
        count += dot && !strcmp(dot, suffix);
    }
    closedir(open);
    return count;
}

static void remove_folder(const char *folder)
{
    DIR *open = opendir(folder);
    char path[4096];
    for (const struct dirent *entry; open && (entry = readdir(open));) {
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        unlink(path);
    }
    if (open)
        closedir(open);
    rmdir(folder);
}

static void test_cache(void **state)
{
    char folder[] = "/tmp/metalsim-XXXXXX", inner[64];
    metalsim_library *library;
    (void)state;
    setenv("LLVM_PROFILE_FILE", "/dev/null", 1); /* of the library that counts */
    assert_non_null(mkdtemp(folder));
    snprintf(inner, sizeof inner, "%s/a", folder);
    struct {
        const char *text, *defines;
        unsigned build;
        int libraries; /* in the cache, when this one is there */
    } cases[] = {
        {"constant int x = 1;", NULL, 0, 1},
        {"constant int x = 1;", NULL, 0, 1},
        {"constant int x = 1;", "FIRST 1", 0, 2},
        {"constant int x = 1;", "FIRST 1\nSECOND", 0, 3},
        {"constant int x = 1;", NULL, METALSIM_CHECKED, 4},
        {"constant int x = 1;", NULL, METALSIM_COVERAGE, 5},
        {"constant int x = 2;", NULL, 0, 6},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char source[128];
        snprintf(source, sizeof source, "#include <metal_stdlib>\n%s\n", cases[i].text);
        if (metalsim_library_create("a.metal", source, cases[i].defines, inner, cases[i].build, &library))
            fail_msg("%s", metalsim_last_error());
        assert_int_equal(metalsim_library_count(library), 0);
        metalsim_library_destroy(library);
        assert_int_equal(count_files(inner, ".so"), cases[i].libraries);
    }
    remove_folder(inner);
    remove_folder(folder);
    assert_int_equal(metalsim_library_create("a.metal", "", NULL, "/dev/null/x", 0, &library), METALSIM_REFUSED);
    support_expect_error("cache is \"/dev/null/x\"; it must be a folder that can be written");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_limits),        cmocka_unit_test(test_partial_simdgroup),
        cmocka_unit_test(test_kernels),       cmocka_unit_test(test_cpus),
        cmocka_unit_test(test_shared_buffer), cmocka_unit_test(test_buffer_ends),
        cmocka_unit_test(test_arrays),        cmocka_unit_test(test_argument_ends),
        cmocka_unit_test(test_cache),         cmocka_unit_test(test_concurrent_dispatches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
