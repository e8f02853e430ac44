/* Mutants: all barriers of a text are found, wherever they stand and whatever surrounds them; and the
 * checker catches every mutant of a kernel that needs its barriers. */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "metalsim/mutants.h"

static void test_names(void **state)
{
    static const char *const text = "#line 7 \"a.metal\"\n"
                                    "// threadgroup_barrier(mem_flags::mem_device)\n"
                                    "/* threadgroup_barrier(mem_flags::mem_device)\n */ my_threadgroup_barrier(1);\n"
                                    "const char *s = \"threadgroup_barrier()\"; threadgroup_barriers(1);\n"
                                    "threadgroup_barrier(mem_flags::mem_threadgroup); x;\n"
                                    "  #line 30 \"b.h\"\n"
                                    "#define WAIT simdgroup_barrier (mem_flags::mem_threadgroup |\\\n"
                                    "    mem_flags::mem_device)\n"
                                    "simdgroup_barrier(mem_flags::mem_none); y;\n";
    static const char *const names[] = {
        "a.metal:11:1: threadgroup_barrier deleted",
        "a.metal:11:1: threadgroup_barrier made one of the simdgroup",
        "a.metal:11:1: threadgroup_barrier for no memory",
        "a.metal:11:1: threadgroup_barrier for other memory",
        "b.h:30:14: simdgroup_barrier deleted",
        "b.h:30:14: simdgroup_barrier for no memory",
        "b.h:32:1: simdgroup_barrier deleted",
    };
    static const char *const parts[] = {
        "\n((void)0); x;",
        "\nsimdgroup_barrier(mem_flags::mem_threadgroup); x;",
        "\nthreadgroup_barrier(mem_flags::mem_none); x;",
        "\nthreadgroup_barrier(mem_flags::mem_device); x;",
        "#define WAIT ((void)0)\n",
        "#define WAIT simdgroup_barrier(mem_flags::mem_none)\n",
        "\n((void)0); y;",
    };
    (void)state;
    assert_int_equal(metalsim_mutants_count(text), 7);
    for (size_t i = 0; i < 7; i++) {
        char name[METALSIM_MUTANT_NAME], *mutant = metalsim_mutants_make(text, i, name);
        assert_non_null(mutant);
        assert_string_equal(name, names[i]);
        assert_non_null(strstr(mutant, parts[i]));
        free(mutant);
    }
    char name[METALSIM_MUTANT_NAME];
    assert_null(metalsim_mutants_make(text, 7, name));
    assert_int_equal(metalsim_mutants_count("no barrier"), 0);
}

/* Does the compiler see a difference to `seen`, what it sees of the original? */
static int differs(const char *seen, const char *mutant)
{
    char *other = metalsim_mutants_preprocess(mutant, METALSIM_CACHE);
    assert_non_null(seen);
    assert_non_null(other);
    const int differ = strcmp(seen, other) != 0;
    free(other);
    return differ;
}

/* injected_faults.metal without a fault. The text also has the barriers that the faults replace; they are not compiled.
 */
static int is_caught(const char *text)
{
    float from[100], to[100];
    uint32_t counter = 0;
    const struct {
        uint32_t count;
        float scale;
    } args = {100, 2};
    metalsim_library *library;
    if (metalsim_library_create("injected_faults.metal", text, NULL, METALSIM_CACHE, METALSIM_CHECKED, &library))
        fail_msg("%s", metalsim_last_error());
    for (int i = 0; i < 100; i++)
        from[i] = (float)i;
    const struct metalsim_dispatch dispatch = {
        .threadgroups = {2, 1, 1},
        .threads = {64, 1, 1},
        .buffers = {support_buffer(from, sizeof from), support_output(to, sizeof to), support_bytes(&args, sizeof args),
                    support_buffer(&counter, sizeof counter)},
    };
    struct metalsim_dispatch other = dispatch;
    other.threadgroups[0] = 1;
    other.buffers[0] = support_output(to, sizeof to);
    int caught = metalsim_dispatch_run(metalsim_library_find(library, "turn_round"), &dispatch) != METALSIM_OK ||
                 metalsim_dispatch_run(metalsim_library_find(library, "split_in_two"), &other) != METALSIM_OK;
    metalsim_library_destroy(library);
    return caught;
}

static void test_all_caught(void **state)
{
    char *file = support_read("injected_faults.metal"), *text = malloc(strlen(file) + 32);
    assert_non_null(text);
    sprintf(text, "#define FAULT 0\n%s", file);
    free(file);
    size_t caught = 0, count = metalsim_mutants_count(text);
    (void)state;
    assert_false(is_caught(text)); /* and the cache's folder is made */
    char *seen = metalsim_mutants_preprocess(text, METALSIM_CACHE);
    for (size_t i = 0; i < count; i++) {
        char name[METALSIM_MUTANT_NAME], *mutant = metalsim_mutants_make(text, i, name);
        assert_non_null(mutant);
        const int differ = differs(seen, mutant); /* else it is what has passed */
        assert_true(!differ || is_caught(mutant));
        caught += (size_t)differ;
        free(mutant);
    }
    free(seen);
    free(text);
    assert_int_equal(caught, 4 + 4 + 3 + 4); /* three threadgroup_barriers and one simdgroup_barrier */
}

/* Of two barriers in a row, neither is needed, and that shows: each can be deleted. */
static void test_needless_barrier(void **state)
{
    static const char *const wait = "threadgroup_barrier(mem_flags::mem_threadgroup); /* as it should be */";
    char *file = support_read("injected_faults.metal"), *text = malloc(strlen(file) + 256), *at = strstr(file, wait);
    size_t not_caught = 0;
    (void)state;
    assert_non_null(text);
    assert_non_null(at);
    sprintf(text, "#define FAULT 0\n%.*s threadgroup_barrier(mem_flags::mem_threadgroup); %s", (int)(at - file), file,
            at);
    assert_false(is_caught(text));
    char *seen = metalsim_mutants_preprocess(text, METALSIM_CACHE);
    for (size_t i = 0; i < metalsim_mutants_count(text); i++) {
        char name[METALSIM_MUTANT_NAME], *mutant = metalsim_mutants_make(text, i, name);
        assert_non_null(mutant);
        if (differs(seen, mutant) && !is_caught(mutant))
            not_caught++;
        free(mutant);
    }
    free(seen);
    free(file);
    free(text);
    assert_int_equal(not_caught, 2 * 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_all_caught),
        cmocka_unit_test(test_needless_barrier),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
