/* The checker finds each injected fault, whatever the schedule, says where it is, and is silent about the
 * kernel without one. */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 100

struct injected_fault {
    const char *finding, *line; /* words of the report, and of a line of injected_faults.metal that it names */
};

static const struct injected_fault faults[] = {
    [1] = {"divergence", "as it should be"},
    [2] = {"out of bounds: read", "x = from[i];"},
    [3] = {"of threadgroup array shared, which has 256", "(shared + 1)[index]"},
    [4] = {"unwritten", "shared[63 - index]"},
    [5] = {"race", "shared[index & ~1u]"},
    [6] = {"mem_threadgroup", "shared[63 - index]"},
    [7] = {"mem_threadgroup", "shared[63 - index]"},
    [8] = {"mem_threadgroup", "shared[63 - index]"},
    [9] = {"mem_threadgroup", "shared[63 - index]"},
    [10] = {"divergence", "FAULT == 10"},
    [11] = {"mem_threadgroup", "shared[63 - index]"},
    [12] = {"mem_threadgroup", "narrow[index ^ 1]"},
    [13] = {"mem_threadgroup", "narrow[index ^ 1]"},
    [14] = {"divergence", "FAULT == 14"},
    [15] = {"divergence", "lane & 2 ?"},
    [16] = {"different addresses for one matrix", "simdgroup_load(m"},
    [17] = {"overflows", "0x10000000"},
    [18] = {"not aligned", "float2 two"},
    [19] = {"its integer type cannot hold", "1e20f"},
    [20] = {"a null pointer", "nowhere[0]"},
    [21] = {"unwritten", "to[i < args.count ? i : 0] * 0.0f"},
    [22] = {"nothing orders threadgroups", "to[index < args.count ? index : 0] = sum"},
    [23] = {"nothing orders threadgroups", "to[i - 64]"},
    [24] = {"race", "atomic_fetch_add_explicit"},
    [25] = {"an address of no buffer", "<< 40"},
    [26] = {"an index beyond the end of an array", "shared[index + 1]"},
};
#define FAULTS (sizeof faults / sizeof *faults)

static metalsim_status run(const metalsim_library *library, enum metalsim_schedule schedule, float *to)
{
    float from[COUNT];
    const struct {
        uint32_t count;
        float scale;
    } args = {COUNT, 2};
    uint32_t counter = 0;
    for (int i = 0; i < COUNT; i++)
        from[i] = (float)i;
    const struct metalsim_dispatch dispatch = {
        .threadgroups = {2, 1, 1},
        .threads = {64, 1, 1},
        .buffers = {support_buffer(from, sizeof from), support_output(to, sizeof from),
                    support_bytes(&args, sizeof args), support_buffer(&counter, sizeof counter)},
        .schedule = schedule,
        .seed = 9,
    };
    metalsim_status status = metalsim_dispatch_run(metalsim_library_find(library, "turn_round"), &dispatch);
    if (status == METALSIM_OK)
        assert_int_equal(counter, 128);
    return status;
}

/* Does the report name a line of the file that holds these words, or one at most two below? */
static int names_line(const char *report, const char *text, const char *words)
{
    int line = 1;
    for (const char *at = text; *at; line++) {
        size_t length = strcspn(at, "\n");
        const char *found = strstr(at, words);
        for (int below = 0; found && found < at + length && below < 3; below++) {
            char line_name[64];
            snprintf(line_name, sizeof line_name, "injected_faults.metal:%d", line + below);
            const char *named = strstr(report, line_name);
            if (named && (named[strlen(line_name)] < '0' || named[strlen(line_name)] > '9'))
                return 1;
        }
        at += length + (at[length] == '\n');
    }
    return 0;
}

static void test_injected_faults(void **state)
{
    char *text = support_read("injected_faults.metal");
    (void)state;
    for (size_t fault = 1; fault < FAULTS; fault++) {
        char define[32];
        snprintf(define, sizeof define, "FAULT %zu", fault);
        metalsim_library *library = support_load("injected_faults.metal", define, METALSIM_CHECKED);
        for (int schedule = METALSIM_NATURAL; schedule <= METALSIM_SHUFFLED; schedule++) {
            float to[COUNT];
            if (run(library, (enum metalsim_schedule)schedule, to) != METALSIM_FAULT)
                fail_msg("fault %zu is not found with schedule %d", fault, schedule);
            support_expect_error(faults[fault].finding);
            if (!names_line(metalsim_last_error(), text, faults[fault].line))
                fail_msg("fault %zu: \"%s\" is not named in: %s", fault, faults[fault].line, metalsim_last_error());
        }
        metalsim_library_destroy(library);
    }
    free(text);
}

/* Accesses of every width are watched: to the last byte of a buffer, and to the bytes of others. */
static void test_widths(void **state)
{
    static const struct {
        const char *name;
        size_t size;
    } types[] = {
        {"uchar", 1},  {"half", 2},   {"bfloat", 2}, {"float", 4},   {"ulong", 8},          {"uchar4", 4},
        {"half2", 4},  {"half4", 8},  {"float2", 8}, {"float3", 16}, {"float4", 16},        {"ulong2", 16},
        {"ushort", 2}, {"uint4", 16}, {"short4", 8}, {"char2", 2},   {"packed_float4", 16}, {"packed_half4", 8},
    };
    static unsigned char from[33 * 16] __attribute__((aligned(16))), to[33 * 16] __attribute__((aligned(16)));
    (void)state;
    metalsim_library *library = support_load("widths.metal", NULL, METALSIM_CHECKED);
    assert_int_equal(metalsim_library_count(library), sizeof types / sizeof *types);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        char name[64], words[64];
        const size_t size = types[i].size, bytes = 32 * size;
        snprintf(name, sizeof name, "copy_%s", types[i].name);
        const metalsim_kernel *kernel = metalsim_library_find(library, name);
        assert_non_null(kernel);
        struct metalsim_dispatch dispatch = {
            .threadgroups = {1, 1, 1},
            .threads = {32, 1, 1},
            .buffers = {support_buffer(from, bytes), support_output(to, bytes)},
        };
        assert_int_equal(metalsim_dispatch_run(kernel, &dispatch), METALSIM_OK);
        for (int buffer = 0; buffer < 2; buffer++) {
            dispatch.buffers[buffer].length = bytes - 1;
            assert_int_equal(metalsim_dispatch_run(kernel, &dispatch), METALSIM_FAULT);
            snprintf(words, sizeof words, "%s of %zu bytes at byte %zu of buffer %d, which has",
                     buffer ? "write" : "read", size, bytes - size, buffer);
            support_expect_error(words);
            dispatch.buffers[buffer].length = bytes;
        }
        dispatch.threadgroups[0] = 2; /* the second threadgroup has no elements left */
        assert_int_equal(metalsim_dispatch_run(kernel, &dispatch), METALSIM_FAULT);
        support_expect_error("threadgroup 1");
        if (size > 1 && strncmp(types[i].name, "packed", 6) != 0) {
            dispatch.threadgroups[0] = 1;
            dispatch.buffers[0] = support_buffer(from, sizeof from);
            dispatch.buffers[0].offset = size / 2;
            assert_int_equal(metalsim_dispatch_run(kernel, &dispatch), METALSIM_FAULT);
            support_expect_error("not aligned");
        }
    }
    metalsim_library_destroy(library);
}

/* No mistake: no finding in any build, and the same bits by every schedule. */
static void test_clean(void **state)
{
    const unsigned builds[] = {0, METALSIM_CHECKED, METALSIM_FAST_MATH, METALSIM_CHECKED | METALSIM_FAST_MATH,
                               METALSIM_UNOPTIMISED};
    (void)state;
    for (size_t b = 0; b < sizeof builds / sizeof *builds; b++) {
        metalsim_library *library = support_load("injected_faults.metal", "FAULT 0", builds[b]);
        for (int schedule = METALSIM_NATURAL; schedule <= METALSIM_SHUFFLED; schedule++) {
            float to[COUNT];
            if (run(library, (enum metalsim_schedule)schedule, to) != METALSIM_OK)
                fail_msg("%s", metalsim_last_error());
            for (int i = 0; i < COUNT; i++) {
                int other = i / 64 * 64 + 63 - i % 64;
                assert_true(to[i] == (other < COUNT ? 6.0f * (float)other : 0.0f));
            }
        }
        metalsim_library_destroy(library);
    }
}

/* The optimiser may not give one barrier two places. */
static void test_one_barrier(void **state)
{
    const unsigned builds[] = {0, METALSIM_CHECKED, METALSIM_FAST_MATH, METALSIM_UNOPTIMISED};
    (void)state;
    for (size_t b = 0; b < sizeof builds / sizeof *builds; b++) {
        metalsim_library *library = support_load("injected_faults.metal", "FAULT 0", builds[b]);
        float to[64];
        const struct metalsim_dispatch dispatch = {
            .threadgroups = {1, 1, 1},
            .threads = {64, 1, 1},
            .buffers = {support_output(to, sizeof to)},
        };
        if (metalsim_dispatch_run(metalsim_library_find(library, "split_in_two"), &dispatch) != METALSIM_OK)
            fail_msg("%s", metalsim_last_error());
        for (int i = 0; i < 64; i++)
            assert_true(to[i] == (float)(16 * i + 6 + (i < 32 ? 16 * (i + 32) + 6 : 0)));
        metalsim_library_destroy(library);
    }
}

/* Nor two barriers in one place, where a last call made a jump would return. */
static void test_two_barriers(void **state)
{
    const unsigned builds[] = {0, METALSIM_CHECKED, METALSIM_FAST_MATH, METALSIM_UNOPTIMISED};
    (void)state;
    for (size_t b = 0; b < sizeof builds / sizeof *builds; b++) {
        metalsim_library *library = support_load("injected_faults.metal", "FAULT 27", builds[b]);
        uint32_t to[65];
        const struct metalsim_dispatch dispatch = {
            .threadgroups = {1, 1, 1}, .threads = {64, 1, 1}, .buffers = {support_output(to, sizeof to)}};
        assert_int_equal(metalsim_dispatch_run(metalsim_library_find(library, "end_apart"), &dispatch), METALSIM_FAULT);
        support_expect_error("divergence");
        metalsim_library_destroy(library);
    }
}

/* What no barrier orders shows in a plain build, too, as schedules differ; and writes beside threadgroup
 * memory show there by themselves. */
static void test_plain_build_shows_some(void **state)
{
    metalsim_library *library = support_load("injected_faults.metal", "FAULT 5", 0);
    float natural[COUNT], reversed[COUNT];
    (void)state;
    assert_int_equal(run(library, METALSIM_NATURAL, natural), METALSIM_OK);
    assert_int_equal(run(library, METALSIM_REVERSED, reversed), METALSIM_OK);
    assert_memory_not_equal(natural, reversed, sizeof natural);
    metalsim_library_destroy(library);

    library = support_load("injected_faults.metal", "FAULT 3", 0);
    assert_int_equal(run(library, METALSIM_NATURAL, natural), METALSIM_FAULT);
    support_expect_error("beside threadgroup array shared");
    metalsim_library_destroy(library);

    library = support_load("injected_faults.metal", "FAULT 14", 0); /* divergence is found in every build */
    assert_int_equal(run(library, METALSIM_NATURAL, natural), METALSIM_FAULT);
    support_expect_error("divergence");
    metalsim_library_destroy(library);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_injected_faults), cmocka_unit_test(test_widths),
        cmocka_unit_test(test_clean),           cmocka_unit_test(test_one_barrier),
        cmocka_unit_test(test_two_barriers),    cmocka_unit_test(test_plain_build_shows_some),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
