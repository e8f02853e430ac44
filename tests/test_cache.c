/* The kernel cache, and the context's way to it, with a backend that compiles: its "compiler" writes the
 * key's text to a file, and its "kernel" is that text. Whatever is wrong with a file is a miss, and
 * nothing that can be wrong with the folder is an error. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "core/cache.h"
#include "core/context.h"
#include "core/plan.h"
#include "mfa.h"

/* -- A backend -- */

static atomic_int compiled, loaded, unloaded;
static uint64_t stamp_now = 1, shared = 100;
static int compile_fails, load_fails;

static mfa_status fake_open(const mfa_context_options *options, void **state)
{
    (void)options;
    *state = &compiled;
    return MFA_OK;
}

static void fake_close(void *state)
{
    assert_ptr_equal(state, &compiled);
}

static mfa_status fake_supports(void *state, const mfa_problem *problem)
{
    (void)state;
    return problem->head_dim == 7 ? mfa_fail(MFA_UNSUPPORTED, "head_dim is 7; seven is not done") : MFA_OK;
}

static void fake_choose(void *state, const mfa_problem *problem, struct mfa_choice *choice)
{
    (void)state;
    *choice = (struct mfa_choice){.key = {problem->pass, problem->dtype, (int32_t)problem->head_dim,
                                          (int32_t)problem->value_dim, 32, 64, 0, problem->dtype, "apple9"},
                                  .splits = 1, .panels = 1, .threads = 2, .shared = shared,
                                  .per_thread = (uint64_t)problem->q_len * 8};
}

static mfa_status fake_compile(void *state, const struct mfa_key *key, const char *path)
{
    (void)state;
    char text[MFA_KEY_TEXT];
    mfa_key_print(key, text);
    if (compile_fails)
        return mfa_fail(MFA_COMPILE_FAILED, "%s: not today", text);
    atomic_fetch_add(&compiled, 1);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    return MFA_OK;
}

static uint64_t fake_stamp(void *state)
{
    (void)state;
    return stamp_now;
}

static mfa_status fake_load(void *state, const struct mfa_key *key, const char *path, const void **kernel)
{
    (void)state;
    char expected[MFA_KEY_TEXT], *text;
    size_t length;
    mfa_key_print(key, expected);
    if (load_fails-- > 0)
        return mfa_fail(MFA_DEVICE_FAILED, "the device does not like %s", expected);
    load_fails = 0;
    assert_true(mfa_file_read(path, &text, &length));
    assert_int_equal(length, strlen(expected));
    assert_memory_equal(text, expected, length);
    atomic_fetch_add(&loaded, 1);
    *kernel = text;
    return MFA_OK;
}

static void fake_unload(void *state, const void *kernel)
{
    (void)state;
    atomic_fetch_add(&unloaded, 1);
    free((void *)kernel);
}

static size_t launched_workspace;

static mfa_status fake_launch(void *state, const void *kernel, const mfa_problem *problem,
                              const struct mfa_choice *choice, const mfa_buffers *buffers, void *workspace,
                              void *stream)
{
    (void)state;
    (void)problem;
    (void)buffers;
    (void)stream;
    assert_non_null(kernel);
    assert_int_equal((uintptr_t)workspace % 64, 0);
    launched_workspace = choice->shared + (size_t)choice->threads * choice->per_thread;
    memset(workspace, 0xff, launched_workspace);
    return MFA_OK;
}

static const struct mfa_backend fake = {
    .name = "fake", .device = MFA_DEVICE_CPU, .open = fake_open, .close = fake_close, .supports = fake_supports,
    .choose = fake_choose, .compile = fake_compile, .stamp = fake_stamp, .load = fake_load, .unload = fake_unload,
    .launch = fake_launch};

static mfa_status absent_open(const mfa_context_options *options, void **state)
{
    (void)options;
    (void)state;
    return mfa_fail(MFA_UNAVAILABLE, "this machine has no such device");
}

static const struct mfa_backend absent = {.name = "absent", .device = MFA_DEVICE_METAL, .open = absent_open};
static const struct mfa_backend absent_cpu = {.name = "absent", .device = MFA_DEVICE_CPU, .open = absent_open};

static const struct mfa_backend *const backends[] = {&absent, &fake, NULL};

/* -- A folder for each test -- */

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/test_cache-XXXXXX");
    atomic_store(&compiled, 0);
    atomic_store(&loaded, 0);
    atomic_store(&unloaded, 0);
    stamp_now = 1;
    compile_fails = load_fails = 0;
    return mkdtemp(folder) ? 0 : -1;
}

/* Calls `visit` with each file of the folder. Returns how many there are. */
static int each_file(const char *path, void (*visit)(const char *path))
{
    DIR *listing = opendir(path);
    int count = 0;
    for (struct dirent *entry; listing && (entry = readdir(listing)) != NULL;) {
        char name[MFA_FILE_PATH];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        count++;
        if (visit)
            visit(name);
    }
    if (listing)
        closedir(listing);
    return count;
}

static void remove_all(const char *path)
{
    struct stat found;
    if (lstat(path, &found) == 0 && S_ISDIR(found.st_mode))
        each_file(path, remove_all);
    remove(path);
}

static int remove_folder(void **state)
{
    (void)state;
    chmod(folder, 0700);
    remove_all(folder);
    return 0;
}

static const struct mfa_key key = {MFA_FORWARD, MFA_F16, 64, 64, 32, 64, MFA_FEATURE_BAND, MFA_F16, "apple9"};

static void keep_contents(uint64_t stamp, const char *contents)
{
    struct mfa_cache_draft draft;
    assert_int_equal(mfa_cache_draft_begin(folder, &key, &draft), MFA_OK);
    assert_true(mfa_file_write(draft.path, contents, strlen(contents)));
    mfa_cache_draft_keep(folder, &key, stamp, &draft);
    char *bytes;
    size_t length;
    assert_true(mfa_file_read(draft.path, &bytes, &length));
    assert_int_equal(length, strlen(contents));
    assert_memory_equal(bytes, contents, length);
    free(bytes);
    mfa_cache_draft_end(&draft);
}

static int hit(uint64_t stamp)
{
    char path[MFA_FILE_PATH];
    return mfa_cache_find(folder, &key, stamp, path);
}

static void test_files(void **state)
{
    (void)state;
    char path[MFA_FILE_PATH], *bytes;
    size_t length;
    snprintf(path, sizeof path, "%s/a/b/c", folder);
    assert_true(mfa_file_make_folder(path));
    assert_true(mfa_file_make_folder(path));
    strcat(path, "/file");
    assert_false(mfa_file_read(path, &bytes, &length));
    assert_true(mfa_file_write(path, "", 0));
    assert_true(mfa_file_read(path, &bytes, &length));
    assert_int_equal(length, 0);
    free(bytes);
    assert_true(mfa_file_write(path, "two\0words", 9));
    assert_true(mfa_file_read(path, &bytes, &length));
    assert_int_equal(length, 9);
    assert_memory_equal(bytes, "two\0words", 9);
    free(bytes);
    assert_false(mfa_file_make_folder(path)); /* a file is there */
    assert_false(mfa_file_read(folder, &bytes, &length));
    snprintf(path, sizeof path, "%s/a/b/c", folder);
    assert_int_equal(each_file(path, NULL), 1); /* no temporary is left */
}

static void test_default_folder(void **state)
{
    (void)state;
    char path[MFA_FILE_PATH];
    setenv("HOME", "/home/of", 1);
    unsetenv("MFA_CACHE");
    unsetenv("XDG_CACHE_HOME");
    assert_true(mfa_file_cache_folder(path));
#if defined(__APPLE__)
    assert_string_equal(path, "/home/of/Library/Caches/libmfa");
#else
    assert_string_equal(path, "/home/of/.cache/libmfa");
#endif
    setenv("XDG_CACHE_HOME", "not/absolute", 1);
    assert_true(mfa_file_cache_folder(path));
    assert_non_null(strstr(path, "/home/of/"));
    setenv("XDG_CACHE_HOME", "/caches", 1);
    assert_true(mfa_file_cache_folder(path));
    assert_string_equal(path, "/caches/libmfa");
    setenv("MFA_CACHE", "/here", 1);
    assert_true(mfa_file_cache_folder(path));
    assert_string_equal(path, "/here");
    unsetenv("MFA_CACHE");
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    assert_false(mfa_file_cache_folder(path));
}

static void test_hit_and_stale(void **state)
{
    (void)state;
    assert_false(hit(1));
    assert_false(mfa_cache_find(NULL, &key, 1, NULL));
    keep_contents(1, "kernel one");
    assert_true(hit(1));
    assert_false(hit(2));
    assert_int_equal(each_file(folder, NULL), 2);
    keep_contents(2, "kernel two");
    assert_true(hit(1));
    assert_true(hit(2));
    keep_contents(1, "kernel one, compiled again");
    assert_true(hit(1));
    assert_int_equal(each_file(folder, NULL), 4);
    struct mfa_key other = key;
    other.head_dim = 65;
    char path[MFA_FILE_PATH];
    assert_false(mfa_cache_find(folder, &other, 1, path));
}

static void truncate_last(const char *path)
{
    struct stat found;
    assert_int_equal(stat(path, &found), 0);
    assert_int_equal(truncate(path, found.st_size - 1), 0);
}

static void flip_first(const char *path)
{
    FILE *file = fopen(path, "r+");
    const int first = fgetc(file);
    rewind(file);
    fputc(first ^ 1, file);
    fclose(file);
}

static void append_one(const char *path)
{
    FILE *file = fopen(path, "a");
    fputc('x', file);
    fclose(file);
}

static void make_empty(const char *path)
{
    assert_int_equal(truncate(path, 0), 0);
}

static void remove_one(const char *path)
{
    assert_int_equal(unlink(path), 0);
}

static void replace_by_folder(const char *path)
{
    remove_one(path);
    assert_int_equal(mkdir(path, 0700), 0);
}

static const char *wanted_end; /* NULL: the kernel; else the line beside it */
static void (*wanted_damage)(const char *path);

static void damage(const char *path)
{
    const int is_check = strstr(path, ".check") != NULL;
    if (is_check == (wanted_end != NULL))
        wanted_damage(path);
}

static void test_damage_is_a_miss(void **state)
{
    (void)state;
    static void (*const damages[])(const char *) = {truncate_last, flip_first, append_one,
                                                    make_empty,    remove_one, replace_by_folder};
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++)
        for (int check = 0; check < 2; check++) {
            keep_contents(1, "kernel");
            assert_true(hit(1));
            wanted_damage = damages[i];
            wanted_end = check ? ".check" : NULL;
            each_file(folder, damage);
            assert_false(hit(1));
            remove_all(folder);
            assert_int_equal(mkdir(folder, 0700), 0);
        }
}

/* -- The context -- */

static mfa_context *open_context(const char *cache)
{
    mfa_context_options options = {.size = sizeof options, .cache = cache};
    mfa_context *context = NULL;
    assert_int_equal(mfa_context_open(backends, &options, &context), MFA_OK);
    return context;
}

static mfa_problem a_problem(int64_t head_dim)
{
    mfa_problem problem;
    mfa_problem_init(&problem, 1, 2, 2, 16, 16, head_dim, head_dim);
    return problem;
}

static mfa_status plan_one(mfa_context *context, int64_t head_dim)
{
    const mfa_problem problem = a_problem(head_dim);
    mfa_plan *plan = NULL;
    const mfa_status status = mfa_plan_create(context, &problem, &plan);
    mfa_plan_destroy(plan);
    return status;
}

static void test_compiled_once(void **state)
{
    (void)state;
    mfa_context *context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(plan_one(context, 32), MFA_OK);
    assert_int_equal(compiled, 2);
    assert_int_equal(loaded, 2);
    mfa_context_destroy(context);
    assert_int_equal(unloaded, 2);

    context = open_context(folder); /* from the disk */
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 2);
    assert_int_equal(loaded, 3);
    mfa_context_destroy(context);

    stamp_now = 2; /* a new driver */
    context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 3);
    mfa_context_destroy(context);

    load_fails = 1; /* a good file that the device refuses: compiled again */
    context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 4);
    mfa_context_destroy(context);
    assert_int_equal(unloaded, loaded);
}

static void test_failures(void **state)
{
    (void)state;
    mfa_context *context = open_context(folder);
    compile_fails = 1;
    assert_int_equal(plan_one(context, 64), MFA_COMPILE_FAILED);
    assert_non_null(strstr(mfa_last_error(), "not today"));
    assert_int_equal(each_file(folder, NULL), 0); /* no draft is left */
    compile_fails = 0;
    load_fails = 1;
    assert_int_equal(plan_one(context, 64), MFA_DEVICE_FAILED);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(plan_one(context, 7), MFA_UNSUPPORTED);
    assert_string_equal(mfa_last_error(), "head_dim is 7; seven is not done");
    mfa_problem problem = a_problem(64);
    problem.device = MFA_DEVICE_METAL;
    assert_int_equal(mfa_problem_supported(context, &problem), MFA_UNAVAILABLE);
    assert_string_equal(mfa_last_error(), "this machine has no such device");
    mfa_context_destroy(context);

    static const struct mfa_backend *const no_cpu[] = {&fake, &absent_cpu, NULL};
    context = NULL;
    assert_int_equal(mfa_context_open(no_cpu, NULL, &context), MFA_UNAVAILABLE);
    assert_null(context);
}

static void test_folders_that_cannot_be_written(void **state)
{
    (void)state;
    char path[MFA_FILE_PATH];
    setenv("TMPDIR", folder, 1);
    snprintf(path, sizeof path, "%s/file", folder);
    assert_true(mfa_file_write(path, "a file, no folder", 17));
    static const char *const refused[] = {"/proc/no/folder", "", NULL};
    for (int i = 0; i < 3; i++) {
        mfa_context *context = open_context(refused[i] ? refused[i] : path);
        assert_int_equal(plan_one(context, 64), MFA_OK);
        assert_int_equal(compiled, i + 1);
        mfa_context_destroy(context);
        assert_int_equal(each_file(folder, NULL), 1); /* the private temporary is gone */
    }
    unsetenv("TMPDIR");
}

static void *plan_often(void *argument)
{
    for (int i = 0; i < 200; i++)
        if (plan_one(argument, 8 + i % 4) != MFA_OK)
            return argument;
    return NULL;
}

static void test_many_threads(void **state)
{
    (void)state;
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    mfa_context *context = open_context(folder);
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, plan_often, context), 0);
    for (int i = 0; i < THREADS; i++) {
        void *failed = context;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    assert_int_equal(compiled, 4);
    mfa_context_destroy(context);
    assert_int_equal(unloaded, 4);
}

/* A child is forked off while its parent loads a kernel. */
static void test_fork_while_loading(void **state)
{
    (void)state;
    mfa_context *context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    mfa_lock_take(&context->loading);
    const pid_t process = fork();
    assert_true(process >= 0);
    if (process == 0) {
        alarm(30); /* a deadlock ends here */
        _exit(plan_one(context, 64) != MFA_OK || plan_one(context, 32) != MFA_OK || compiled != 2);
    }
    int status = -1;
    assert_int_equal(waitpid(process, &status, 0), process);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    mfa_lock_release(&context->loading);
    mfa_context_destroy(context);
}

static void test_workspace(void **state)
{
    (void)state;
    mfa_context *context = open_context(folder);
    float element = 0;
    mfa_problem problem;
    const mfa_buffer some = {&element, 0};
    mfa_buffers buffers = {.size = sizeof buffers, .q = some, .k = some, .v = some, .o = some};
    for (int64_t q_len = 1; q_len < 2000; q_len += 37) {
        mfa_problem_init(&problem, 1, 1, 1, q_len, 1, 8, 8);
        assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_OK);
        assert_int_equal(launched_workspace, 100 + 16 * q_len);
    }
    shared = SIZE_MAX / 2 + 1000;
    assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_OUT_OF_MEMORY);
    assert_non_null(strstr(mfa_last_error(), "no memory for a workspace of"));
    shared = UINT64_MAX;
    assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_OUT_OF_MEMORY);
    assert_non_null(strstr(mfa_last_error(), "larger than any memory"));
    shared = 100;

    void *blocks[MFA_CONTEXT_BLOCKS + 4]; /* more at once than are kept */
    for (int i = 0; i < MFA_CONTEXT_BLOCKS + 4; i++) {
        blocks[i] = mfa_context_borrow(context, 1000);
        assert_non_null(blocks[i]);
        assert_int_equal((uintptr_t)blocks[i] % 64, 0);
        memset(blocks[i], i, 1000);
    }
    for (int i = 0; i < MFA_CONTEXT_BLOCKS + 4; i++)
        mfa_context_return(context, blocks[i]);
    void *again = mfa_context_borrow(context, 900);
    int known = 0;
    for (int i = 0; i < MFA_CONTEXT_BLOCKS; i++)
        known |= again == blocks[i];
    assert_true(known);
    mfa_context_return(context, again);
    mfa_context_destroy(context);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_files),          TEST(test_hit_and_stale), TEST(test_damage_is_a_miss),
        TEST(test_compiled_once),  TEST(test_failures),      TEST(test_folders_that_cannot_be_written),
        TEST(test_many_threads),   TEST(test_workspace),     TEST(test_fork_while_loading),
        TEST(test_default_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
