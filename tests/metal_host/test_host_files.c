/* Files of compiled kernels: a later process compiles less, and no state of a disk leads to a wrong result or to an
 * error. Processes are this program again:
 *
 *     test_host_files --run FOLDER [BYTES]
 *
 * which runs a problem with that cache folder, writing no file beyond so many bytes, and exits with 0 if it is right
 * and the runtime has found nothing; and
 *
 *     test_host_files --contents
 *
 * which gives addresses of memory in the place of MTLBuffers first, and exits with 0 if they are refused. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/file.h"
#include "metal_host/host.h"
#include "metal_host/steps.h"
#include "support/report.h"

extern char **environ;

static const char text[] = "forward f16 b1 h2 q9 kv17 d24";

static char outside[64]; /* a folder for what does not belong in the cache */

static int begin(void **state)
{
    snprintf(outside, sizeof outside, "%s", host_folder());
    return steps_begin(state);
}

static int end(void **state)
{
    host_remove(outside);
    return steps_end(state);
}

/* --- In this process ------------------------------------------------------------------------------ */

/* Asserts that a context with this folder runs the problem right; returns the counts. */
static struct metalsim_counts run_right(const char *cache)
{
    struct test_case s;
    metalsim_runtime_clear();
    mfa_context *context = host_open(cache);
    assert_non_null(context);
    assert_true(host_test_case_open(&s, text, 0, 1));
    assert_true(host_check(context, &s, &(struct host_options){0}));
    test_case_close(&s);
    mfa_context_destroy(context);
    assert_true(host_is_clean(1));
    return host_counts();
}

static mfa_status precompile(const char *to, mfa_compiler compiler)
{
    mfa_problem problem;
    mfa_context *context = host_open(steps_folder);
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    problem.device = MFA_DEVICE_METAL;
    const mfa_status status = mfa_precompile(context, &problem, to, compiler, NULL);
    mfa_context_destroy(context);
    return status;
}

/* Calls `visit` with each file of the folder whose name has these words; returns their number. */
static int each_file(const char *of, const char *words, void (*visit)(const char *path))
{
    DIR *listing = opendir(of);
    int count = 0;
    for (struct dirent *entry; listing && (entry = readdir(listing)) != NULL;) {
        char path[512];
        if (entry->d_name[0] == '.' || !strstr(entry->d_name, words))
            continue;
        snprintf(path, sizeof path, "%s/%.300s", of, entry->d_name);
        count++;
        if (visit)
            visit(path);
    }
    if (listing)
        closedir(listing);
    return count;
}

static void test_cached(void **state)
{
    (void)state;
    struct metalsim_counts counts = run_right(steps_folder);
    const uint64_t sources = counts.sources, functions = counts.functions;
    assert_true(sources > 0 && functions > 0);
    assert_int_equal(each_file(steps_folder, "", NULL), 2); /* an archive, and the line beside it */
    counts = run_right(steps_folder);
    assert_int_equal(counts.sources, sources); /* Metal cannot keep what its front end makes of a text */
    assert_int_equal(counts.functions, 0);
    assert_int_equal(counts.archived, functions);
    assert_int_equal(counts.written, 0);
    print_message("an archive: %d texts compiled, 0 functions\n", (int)sources);

    assert_int_equal(precompile(NULL, metalsim_runtime_compile), MFA_OK);
    assert_int_equal(each_file(steps_folder, "", NULL), 4);
    counts = run_right(steps_folder);
    assert_int_equal(counts.sources + counts.functions + counts.written, 0);
    assert_int_equal(counts.metallibs, 1);
    assert_int_equal(counts.archives, 1);
    print_message("a library and an archive: nothing compiled\n");
}

/* Another GPU, another system: each has files of its own, which do not disturb the others'. */
static void test_foreign(void **state)
{
    (void)state;
    static const struct {
        const char *name, *build;
        int family;
    } machines[] = {
        {"Apple M1", "23A344", 7}, {"Apple M2", "23A344", 8}, {"Apple M2", "24B83", 8}, {"Apple M3", "24B83", 9}};
    struct metalsim_settings settings;
    for (int again = 0; again < 2; again++)
        for (size_t n = 0; n < sizeof machines / sizeof *machines; n++) {
            metalsim_runtime_defaults(&settings);
            settings.name = machines[n].name, settings.build = machines[n].build, settings.family = machines[n].family;
            metalsim_runtime_set(&settings);
            const struct metalsim_counts counts = run_right(steps_folder);
            assert_int_equal(counts.functions == 0, again);
        }
    assert_int_equal(each_file(steps_folder, ".check", NULL), 4);
}

static void test_precompile(void **state)
{
    (void)state;
    assert_int_equal(precompile(outside, NULL), MFA_OK);
    assert_int_equal(each_file(outside, "", NULL), 2);
    assert_int_equal(each_file(steps_folder, "", NULL), 0);
    metalsim_runtime_clear();
    assert_int_equal(precompile(outside, NULL), MFA_OK);
    assert_int_equal(host_counts().functions + host_counts().written, 0); /* what is there stays */
    assert_int_equal(precompile(outside, metalsim_runtime_compile), MFA_OK);
    assert_int_equal(each_file(outside, ".metallib", NULL), 2);
    struct metalsim_counts counts = run_right(outside);
    assert_int_equal(counts.sources + counts.functions, 0);
    static const char *const refused[] = {"/proc/none", "/dev/null/folder", ""};
    for (int n = 0; n < 3; n++) {
        assert_int_equal(precompile(refused[n], NULL), MFA_INVALID);
        assert_non_null(strstr(mfa_last_error(), "folder"));
        print_message("%s\n", mfa_last_error());
    }
}

static int32_t fail_to_compile(const char *const *texts, int32_t count, const char *library, void *argument)
{
    (void)texts, (void)count, (void)library, (void)argument;
    return 1;
}

static int32_t compile_to_nothing(const char *const *texts, int32_t count, const char *library, void *argument)
{
    (void)texts, (void)count, (void)library, (void)argument;
    return 0;
}

static void test_compilers_that_fail(void **state)
{
    (void)state;
    static const mfa_compiler compilers[] = {fail_to_compile, compile_to_nothing};
    for (int n = 0; n < 2; n++) {
        assert_int_equal(precompile(outside, compilers[n]), MFA_COMPILE_FAILED);
        print_message("%s\n", mfa_last_error());
        assert_int_equal(each_file(outside, "", NULL), 0);
    }
}

/* --- Damage --------------------------------------------------------------------------------------- */

static char *whole;
static size_t whole_length, harms, hits;
static uint64_t undamaged; /* functions and sources of a run with all files good */

static void write_back(const char *path, const char *bytes, size_t length)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_true(!length || fwrite(bytes, length, 1, file) == 1);
    assert_int_equal(fclose(file), 0);
}

/* With one damaged file, results are right, the runtime does not read it, and kernels are compiled again. */
static void run_harmed(const char *path, const char *bytes, size_t length)
{
    write_back(path, bytes, length);
    const struct metalsim_counts counts = run_right(steps_folder);
    harms++;
    hits += counts.sources + counts.functions == undamaged;
    write_back(path, whole, whole_length);
}

static void harm(const char *path)
{
    assert_true(mfa_file_read(path, &whole, &whole_length));
    const size_t stride = whole_length > 1000 ? whole_length / 40 : 1; /* a library is long */
    char *other = malloc(whole_length + 1);
    for (size_t at = 0; at < whole_length; at += stride) {
        run_harmed(path, whole, at);
        memcpy(other, whole, whole_length);
        other[at] = (char)(other[at] ^ 1 << at % 8);
        run_harmed(path, other, whole_length);
    }
    memcpy(other, whole, whole_length);
    other[whole_length] = 0;
    run_harmed(path, other, whole_length + 1);
    free(other);
    free(whole);
}

/* Truncated at every byte, one bit flipped in each, and one byte too long. */
static void test_damage(void **state)
{
    (void)state;
    run_right(steps_folder);
    undamaged = run_right(steps_folder).sources;
    harms = hits = 0;
    each_file(steps_folder, "", harm);
    print_message("%d harmed archives and lines beside them; %d passed for good\n", (int)harms, (int)hits);
    assert_int_equal(hits, 0);
}

static void test_damaged_library(void **state)
{
    (void)state;
    assert_int_equal(precompile(NULL, metalsim_runtime_compile), MFA_OK);
    undamaged = 0;
    harms = hits = 0;
    each_file(steps_folder, ".metallib", harm);
    print_message("%d harmed libraries and lines beside them; %d passed for good\n", (int)harms, (int)hits);
    assert_int_equal(hits, 0);
}

/* Valid files that Metal rejects. */
static void test_refused(void **state)
{
    (void)state;
    static const enum metalsim_fault faults[] = {METALSIM_FAULT_ARCHIVE_REFUSED, METALSIM_FAULT_LIBRARY_REFUSED};
    assert_int_equal(precompile(NULL, metalsim_runtime_compile), MFA_OK);
    for (int n = 0; n < 2; n++) {
        struct metalsim_settings settings;
        metalsim_runtime_defaults(&settings);
        settings.fault = faults[n];
        metalsim_runtime_set(&settings);
        const struct metalsim_counts counts = run_right(steps_folder);
        steps_print_counts(metalsim_runtime_fault_name(faults[n]), &counts);
        assert_true(counts.faults > 0);
        assert_true(counts.functions > 0);
        assert_int_equal(counts.written, 1); /* the useless file is replaced */
        assert_int_equal(counts.sources > 0, faults[n] == METALSIM_FAULT_LIBRARY_REFUSED);
    }
}

static struct metalsim_counts run_missing(int misses)
{
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.fault = misses ? METALSIM_FAULT_ARCHIVE_MISSES : METALSIM_FAULT_NONE;
    metalsim_runtime_set(&settings);
    const struct metalsim_counts counts = run_right(steps_folder);
    steps_print_counts(misses ? "archives miss" : "archives do not miss", &counts);
    assert_int_equal(each_file(steps_folder, "", NULL), 2);
    return counts;
}

/* An archive in which Metal does not find what was put into it: that is found out once, if not by the process that has
 * written it, then by the next one; all others make no archive, and compile everything once. */
static void test_missing(void **state)
{
    (void)state;
    const struct metalsim_counts usual = run_right("/proc/none");
    for (int later = 0; later < 2; later++) {
        if (later) {
            assert_int_equal(run_missing(0).written, 1);
            assert_int_equal(run_missing(1).written, 0);
        } else {
            assert_int_equal(run_missing(1).written, 1);
        }
        for (int process = 0; process < 3; process++) {
            const struct metalsim_counts counts = run_missing(process < 2);
            assert_int_equal(counts.sources, usual.sources);
            assert_int_equal(counts.functions, usual.functions);
            assert_int_equal(counts.written + counts.archives + counts.faults, 0);
        }
        each_file(steps_folder, "", host_remove);
    }
}

/* A file that Metal has written in part is not kept. */
static void test_written_in_part(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.fault = METALSIM_FAULT_ARCHIVE_UNWRITTEN;
    metalsim_runtime_set(&settings);
    assert_int_equal(run_right(steps_folder).faults, 1);
    assert_int_equal(each_file(steps_folder, "", NULL), 0);
    host_reset();
    assert_int_equal(run_right(steps_folder).written, 1);
}

/* --- Other processes ------------------------------------------------------------------------------ */

static pid_t start(const char *cache, const char *bytes)
{
    char *words[] = {"/proc/self/exe", "--run", (char *)cache, (char *)bytes, NULL};
    pid_t process = -1;
    assert_int_equal(posix_spawn(&process, words[0], NULL, NULL, words, environ), 0);
    return process;
}

static int wait_for(pid_t process)
{
    int status = -1;
    assert_int_equal(waitpid(process, &status, 0), process);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* The counts of a process, from the report that it wrote. */
static uint64_t reported(const char *path, const char *name)
{
    char *bytes, *found;
    size_t length;
    assert_true(mfa_file_read(path, &bytes, &length));
    char *report = strndup(bytes, length);
    found = strstr(report, name);
    const uint64_t count = found ? strtoull(found + strlen(name), NULL, 10) : UINT64_MAX;
    free(report);
    free(bytes);
    return count;
}

static void test_second_process(void **state)
{
    (void)state;
    char path[160];
    snprintf(path, sizeof path, "%s/report", outside);
    setenv("METALSIM_REPORT", path, 1);
    assert_int_equal(wait_for(start(steps_folder, NULL)), 0);
    const uint64_t first = reported(path, "\nfunctions ");
    assert_int_equal(wait_for(start(steps_folder, NULL)), 0);
    const uint64_t second = reported(path, "\nfunctions "), archived = reported(path, "\narchived ");
    assert_int_equal(precompile(NULL, metalsim_runtime_compile), MFA_OK);
    assert_int_equal(wait_for(start(steps_folder, NULL)), 0);
    const uint64_t third = reported(path, "\nfunctions ") + reported(path, "\nsources ");
    unsetenv("METALSIM_REPORT");
    print_message("functions compiled: first process %d, second 0; with a library, sources and functions: %d\n",
                  (int)first, (int)third);
    assert_true(first > 0);
    assert_int_equal(second, 0);
    assert_int_equal(archived, first);
    assert_int_equal(third, 0);
}

/* Memory in the place of an MTLBuffer, to which no message can be sent. Only a process without an earlier run sees. */
static void test_contents(void **state)
{
    (void)state;
    char *words[] = {"/proc/self/exe", "--contents", NULL};
    pid_t process = -1;
    assert_int_equal(posix_spawn(&process, words[0], NULL, NULL, words, environ), 0);
    assert_int_equal(wait_for(process), 0);
}

/* The settings that a process takes from its environment. */
static void test_environment(void **state)
{
    (void)state;
    static const char *const settings[][3] = {
        {"METALSIM_FAULT", "no_device", "1"}, {"METALSIM_FAULT", "no_pipeline:1", "1"},
        {"METALSIM_FAULT", "nonsense", "1"},  {"METALSIM_FAULT", "no_pipeline:99", "0"},
        {"METALSIM_FAMILY", "5", "1"},        {"METALSIM_FAMILY", "9", "0"},
        {"METALSIM_MACOS", "26", "0"},        {"METALSIM_CHECKED", "1", "0"},
    };
    for (size_t n = 0; n < sizeof settings / sizeof *settings; n++) {
        setenv(settings[n][0], settings[n][1], 1);
        print_message("%s=%s %s\n", settings[n][0], settings[n][1], *settings[n][2] == '1' ? "must fail:" : "");
        assert_int_equal(wait_for(start(steps_folder, NULL)), atoi(settings[n][2]));
        unsetenv(settings[n][0]);
        each_file(steps_folder, "", host_remove);
    }
}

/* Files beside the library are found there: a copy of it, with its folder. */
static void test_shipped(void **state)
{
    (void)state;
    char path[256], kernels[160], *bytes;
    size_t length;
    snprintf(kernels, sizeof kernels, "%s/kernels", outside);
    assert_int_equal(precompile(kernels, metalsim_runtime_compile), MFA_OK);
    assert_int_equal(each_file(kernels, "", NULL), 4);
    assert_true(mfa_file_read(LIBRARY, &bytes, &length));
    snprintf(path, sizeof path, "%s/%s", outside, LIBRARY_NAME);
    assert_true(mfa_file_write(path, bytes, length));
    free(bytes);
    snprintf(path, sizeof path, "%s/report", outside);
    setenv("METALSIM_REPORT", path, 1);
    setenv("LD_LIBRARY_PATH", outside, 1);
    assert_int_equal(wait_for(start(steps_folder, NULL)), 0);
    unsetenv("LD_LIBRARY_PATH");
    unsetenv("METALSIM_REPORT");
    assert_int_equal(reported(path, "\nsources ") + reported(path, "\nfunctions "), 0);
    assert_int_equal(each_file(steps_folder, "", NULL), 0);
}

static void test_several_at_once(void **state)
{
    (void)state;
    enum { PROCESSES = 4 };
    pid_t processes[PROCESSES];
    for (int round = 0; round < 3; round++) {
        for (int n = 0; n < PROCESSES; n++)
            processes[n] = start(steps_folder, NULL);
        for (int n = 0; n < PROCESSES; n++)
            assert_int_equal(wait_for(processes[n]), 0);
        assert_int_equal(each_file(steps_folder, "", NULL), 2);
        assert_int_equal(run_right(steps_folder).functions, 0);
        each_file(steps_folder, "", host_remove);
    }
}

/* A process that is killed at any moment leaves no files that later processes misread. */
static void test_killed_writer(void **state)
{
    (void)state;
    int killed = 0;
    for (int n = 0; n < 30; n++) {
        const pid_t process = start(steps_folder, NULL);
        usleep((useconds_t)(400 * n));
        kill(process, SIGKILL);
        killed += wait_for(process) != 0;
        if (n % 3 == 2) {
            run_right(steps_folder);
            assert_int_equal(run_right(steps_folder).functions, 0);
            each_file(steps_folder, "", host_remove);
        }
    }
    print_message("%d of 30 processes were killed before their end\n", killed);
}

/* A disk that is full at any byte. */
static void test_full_disk(void **state)
{
    (void)state;
    run_right(outside); /* so that metalsim itself has nothing to write */
    for (int bytes = 0; bytes < 400; bytes += bytes < 80 ? 8 : 40) {
        char limit[16];
        snprintf(limit, sizeof limit, "%d", bytes);
        assert_int_equal(wait_for(start(steps_folder, limit)), 0);
        run_right(steps_folder);
        each_file(steps_folder, "", host_remove);
    }
}

static void test_folders_that_cannot_be_written(void **state)
{
    (void)state;
    static const char *const folders[] = {"/proc/none", "/sys", "/dev/null/folder", ""};
    for (size_t n = 0; n < sizeof folders / sizeof *folders; n++)
        for (int again = 0; again < 2; again++)
            assert_true(run_right(folders[n]).functions > 0);
    if (geteuid() != 0) { /* root may write to any folder */
        assert_int_equal(chmod(steps_folder, 0500), 0);
        assert_true(run_right(steps_folder).functions > 0);
        assert_int_equal(chmod(steps_folder, 0700), 0);
    }
}

/* Something else exists where a file should be written. */
static void test_strange_folders(void **state)
{
    (void)state;
    char path[256];
    snprintf(path, sizeof path, "%s/file", outside);
    assert_true(mfa_file_write(path, "a file, no folder", 17));
    assert_true(run_right(path).functions > 0);
    snprintf(path, sizeof path, "%s/libmfa-draft-000000", steps_folder); /* the draft of a process that was killed */
    assert_int_equal(mkdir(path, 0700), 0);
    assert_true(run_right(steps_folder).functions > 0);
    assert_int_equal(run_right(steps_folder).functions, 0);
    assert_int_equal(setenv("MFA_CACHE", steps_folder, 1), 0);
    assert_int_equal(run_right(NULL).functions, 0);
    assert_int_equal(unsetenv("MFA_CACHE"), 0);
}

/* --- The process ---------------------------------------------------------------------------------- */

static int run(const char *cache, const char *bytes)
{
    struct test_case s;
    int good = host_test_case_open(&s, text, 0, 1);
    if (bytes) {
        const struct rlimit limit = {(rlim_t)atoi(bytes), (rlim_t)atoi(bytes)};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    mfa_context *context = host_open(cache);
    good = good && context && host_check(context, &s, &(struct host_options){0});
    mfa_context_destroy(context);
    test_case_close(&s);
    return !(host_is_clean(1) && good);
}

static int run_contents(void)
{
    enum { LENGTH = 4, DIM = 64 };
    static _Alignas(64) char memory[4][LENGTH * DIM * sizeof(float)];
    mfa_problem problem;
    mfa_buffers buffers = {.size = sizeof buffers};
    mfa_buffer *const given[] = {&buffers.q, &buffers.k, &buffers.v, &buffers.o};
    mfa_context *context = host_open("/proc/none");
    mfa_problem_init(&problem, 1, 1, 1, LENGTH, LENGTH, DIM, DIM);
    problem.device = MFA_DEVICE_METAL;
    for (int n = 0; n < 4; n++)
        given[n]->base = memory[n];
    int good = mfa_attention(context, &problem, &buffers, NULL) == MFA_UNAVAILABLE;
    printf("%s\n", mfa_last_error());
    good = good && strstr(mfa_last_error(), "the base of q is") && strstr(mfa_last_error(), "MTLBuffer");
    for (int n = 0; n < 4; n++)
        given[n]->base = metalsim_runtime_buffer(memory[n], sizeof memory[n], 0);
    good = mfa_attention(context, &problem, &buffers, NULL) == MFA_OK && good;
    for (int n = 0; n < 4; n++)
        metalsim_runtime_release(given[n]->base);
    mfa_context_destroy(context);
    return !(host_is_clean(1) && good);
}

#undef TEST
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(int count, char **words)
{
    const struct CMUnitTest tests[] = {
        TEST(test_cached),
        TEST(test_foreign),
        TEST(test_precompile),
        TEST(test_compilers_that_fail),
        TEST(test_damage),
        TEST(test_damaged_library),
        TEST(test_refused),
        TEST(test_missing),
        TEST(test_written_in_part),
        TEST(test_second_process),
        TEST(test_contents),
        TEST(test_environment),
        TEST(test_shipped),
        TEST(test_several_at_once),
        TEST(test_killed_writer),
        TEST(test_full_disk),
        TEST(test_folders_that_cannot_be_written),
        TEST(test_strange_folders),
    };
    if (count >= 3 && !strcmp(words[1], "--run"))
        return run(words[2], count > 3 ? words[3] : NULL);
    if (count == 2 && !strcmp(words[1], "--contents"))
        return run_contents();
    report_begin("test_host_files", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
