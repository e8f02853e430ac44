/* How a context gets its kernels, with a backend that compiles: its "compiler" writes the key's text to a file, and its
 * "kernel" is that text. No state of the cache folder is an error. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

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
#include "core/context.h"
#include "core/plan.h"
#include "folder.h"
#include "mfa.h"

/* -- A backend -- */

static atomic_int compiled, from_library, loaded, unloaded;
static uint64_t stamp_now = 1, shared = 100;
static int compile_fails, write_fails, load_fails, attempts;
static int max_rows; /* of a kernel that the device can run; 0: any */

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

static void fake_choose(void *state, const mfa_problem *problem, int simpler, struct mfa_choice *choice)
{
    (void)state;
    *choice = (struct mfa_choice){.key = {.pass = problem->pass,
                                          .dtype = problem->dtype,
                                          .head_dim = (int32_t)problem->head_dim,
                                          .value_dim = (int32_t)problem->value_dim,
                                          .block_q = simpler ? 16 : 32,
                                          .block_kv = 64,
                                          .mask_dtype = problem->dtype,
                                          .machine = "apple9"},
                                  .threads = 2,
                                  .shared = shared,
                                  .per_thread = (uint64_t)problem->q_len * 8};
}

static mfa_status fake_compile(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                               const void **kernel)
{
    (void)state, (void)whole;
    char text[MFA_KEY_TEXT];
    mfa_key_print(key, text);
    attempts++;
    if (compile_fails)
        return mfa_fail(MFA_COMPILE_FAILED, "%s: not today", text);
    if (max_rows && key->block_q > max_rows)
        return mfa_fail(MFA_UNSUPPORTED, "%s is too large", text);
    atomic_fetch_add(&compiled, 1);
    atomic_fetch_add(&from_library, library != NULL);
    if (path && !write_fails)
        assert_true(mfa_file_write(path, text, strlen(text)));
    char *copy = strdup(text);
    assert_non_null(copy);
    *kernel = copy;
    return MFA_OK;
}

static uint64_t fake_stamp(void *state, const struct mfa_key *key)
{
    (void)state, (void)key;
    return stamp_now;
}

static uint64_t fake_library_stamp(void *state, const struct mfa_key *key)
{
    (void)state, (void)key;
    return 1;
}

/* Two texts, "a.text" and "b.text". */
static mfa_status fake_text(void *state, const struct mfa_key *key, int n, char **text, char **name)
{
    static const char *const texts[] = {"first", "second"}, *const names[] = {"a.text", "b.text"};
    (void)state, (void)key;
    *text = n < 2 ? strdup(texts[n]) : NULL;
    *name = n < 2 ? strdup(names[n]) : NULL;
    return MFA_OK;
}

static mfa_status fake_load(void *state, const struct mfa_key *key, const char *library, const char *path, int whole,
                            const void **kernel)
{
    (void)state, (void)library, (void)whole;
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

static const struct mfa_backend fake = {.name = "fake",
                                        .device = MFA_DEVICE_CPU,
                                        .open = fake_open,
                                        .close = fake_close,
                                        .supports = fake_supports,
                                        .choose = fake_choose,
                                        .library_suffix = ".lib",
                                        .stamp = fake_stamp,
                                        .library_stamp = fake_library_stamp,
                                        .text = fake_text,
                                        .compile = fake_compile,
                                        .load = fake_load,
                                        .unload = fake_unload,
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
    atomic_store(&from_library, 0);
    stamp_now = 1;
    attempts = compile_fails = write_fails = load_fails = max_rows = 0;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    chmod(folder, 0700);
    remove_all(folder);
    return 0;
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
    assert_int_equal(loaded, 0);
    mfa_context_destroy(context);
    assert_int_equal(unloaded, 2);

    context = open_context(folder); /* from the disk */
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 2);
    assert_int_equal(loaded, 1);
    mfa_context_destroy(context);

    stamp_now = 2; /* a new driver */
    context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 3);
    mfa_context_destroy(context);

    load_fails = 1; /* a valid file that the device rejects: compiled again */
    context = open_context(folder);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 4);
    mfa_context_destroy(context);
    assert_int_equal(unloaded, loaded + compiled);
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
    assert_int_equal(plan_one(context, 64), MFA_COMPILE_FAILED); /* it is not tried again */
    assert_non_null(strstr(mfa_last_error(), "not today"));
    assert_int_equal(attempts, 1);
    mfa_context_destroy(context);
    context = open_context(folder);
    write_fails = 1;
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(each_file(folder, NULL), 0);
    write_fails = 0;
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
    snprintf(path, sizeof path, "%s/file", folder);
    assert_true(mfa_file_write(path, "a file, no folder", 17));
    static const char *const refused[] = {"/proc/no/folder", "", NULL};
    for (int i = 0; i < 3; i++) {
        mfa_context *context = open_context(refused[i] ? refused[i] : path);
        assert_int_equal(plan_one(context, 64), MFA_OK);
        assert_int_equal(compiled, i + 1);
        mfa_context_destroy(context);
        assert_int_equal(each_file(folder, NULL), 1);
    }
}

/* If the device cannot run a kernel, the simpler one is used, in this context and in one that finds it on disk. */
static void test_next_choice(void **state)
{
    (void)state;
    max_rows = 16;
    for (int i = 0; i < 2; i++) {
        mfa_context *context = open_context(folder);
        const mfa_problem problem = a_problem(64);
        mfa_plan *plan;
        char text[256];
        assert_int_equal(mfa_plan_create(context, &problem, &plan), MFA_OK);
        assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
        assert_non_null(strstr(text, "_q16_"));
        assert_int_equal(compiled, 1);
        mfa_plan_destroy(plan);
        mfa_context_destroy(context);
    }
    max_rows = 8; /* the device cannot run the simpler one either */
    remove_all(folder);
    mfa_context *context = open_context(folder);
    attempts = 0;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(plan_one(context, 64), MFA_UNSUPPORTED);
        assert_non_null(strstr(mfa_last_error(), "_q16_k64_apple9 is too large"));
        assert_int_equal(attempts, 2);
    }
    mfa_context_destroy(context);
}

static int libraries, compiler_fails;

/* A device's own compiler: copies the texts into the library. */
static int32_t join_texts(const char *const *texts, int32_t count, const char *library, void *argument)
{
    char all[64] = "";
    assert_ptr_equal(argument, &libraries);
    libraries++;
    for (int32_t n = 0; n < count; n++) {
        char *text;
        size_t length;
        assert_true(mfa_file_read(texts[n], &text, &length));
        strncat(all, text, length);
        free(text);
    }
    assert_string_equal(all, "firstsecond");
    assert_non_null(strstr(texts[1], "/b.text"));
    if (compiler_fails < 2) /* 2: it reports success, but has made no file */
        assert_true(mfa_file_write(library, all, strlen(all)));
    return compiler_fails == 1;
}

static void test_precompile(void **state)
{
    (void)state;
    char shipped[MFA_FILE_PATH];
    const mfa_problem problem = a_problem(64);
    mfa_context *context = open_context(folder);
    snprintf(shipped, sizeof shipped, "%s/shipped", folder);
    libraries = compiler_fails = 0;
    for (int i = 0; i < 2; i++) { /* files that are there are kept */
        assert_int_equal(mfa_precompile(context, &problem, shipped, join_texts, &libraries), MFA_OK);
        assert_int_equal(compiled, 1);
        assert_int_equal(from_library, 1);
        assert_int_equal(libraries, 1);
        assert_int_equal(each_file(shipped, NULL), 4);
    }
    assert_int_equal(loaded, 1); /* to see whether it is whole */
    assert_int_equal(unloaded, 2);
    assert_int_equal(mfa_precompile(context, &problem, NULL, NULL, NULL), MFA_OK); /* into the cache */
    assert_int_equal(compiled, 2);
    assert_int_equal(from_library, 1);
    assert_int_equal(each_file(folder, NULL), 3);
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 2);
    mfa_context_destroy(context);

    context = open_context(shipped); /* a new driver: the library is still valid */
    stamp_now = 2;
    assert_int_equal(plan_one(context, 64), MFA_OK);
    assert_int_equal(compiled, 3);
    assert_int_equal(from_library, 2);
    mfa_context_destroy(context);
}

static void test_precompile_failures(void **state)
{
    (void)state;
    const mfa_problem problem = a_problem(64), seven = a_problem(7);
    mfa_context *context = open_context(folder);
    assert_int_equal(mfa_precompile(NULL, &problem, NULL, NULL, NULL), MFA_INVALID);
    assert_int_equal(mfa_precompile(context, NULL, NULL, NULL, NULL), MFA_INVALID);
    assert_int_equal(mfa_precompile(context, &seven, NULL, NULL, NULL), MFA_UNSUPPORTED);
    assert_int_equal(mfa_precompile(context, &problem, "/proc/no/folder", NULL, NULL), MFA_INVALID);
    assert_non_null(strstr(mfa_last_error(), "folder is /proc/no/folder"));
    for (compiler_fails = 1; compiler_fails <= 2; compiler_fails++) {
        assert_int_equal(mfa_precompile(context, &problem, NULL, join_texts, &libraries), MFA_COMPILE_FAILED);
        assert_non_null(strstr(mfa_last_error(), "the compiler that was given"));
    }
    write_fails = 1;
    assert_int_equal(mfa_precompile(context, &problem, NULL, NULL, NULL), MFA_COMPILE_FAILED);
    compile_fails = 1;
    assert_int_equal(mfa_precompile(context, &problem, NULL, NULL, NULL), MFA_COMPILE_FAILED);
    assert_non_null(strstr(mfa_last_error(), "not today"));
    assert_int_equal(each_file(folder, NULL), 0); /* no draft is left */
    mfa_context_destroy(context);
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

/* fork() while a thread of the parent loads a kernel. */
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

/* A buffer whose length the backend knows. */
static uint64_t measure(void *state, const void *base)
{
    (void)state;
    return *(const uint64_t *)base;
}

/* Operands must lie within their buffers, whatever the signs of their strides. */
static void test_extents(void **state)
{
    (void)state;
    struct mfa_backend measured = fake;
    measured.buffer_length = measure;
    const struct mfa_backend *const one[] = {&measured, NULL};
    static const struct {
        int64_t row, column;
        uint64_t offset, length; /* of k: 3 rows of 8 */
        int fits;
    } cases[] = {
        /* clang-format off */
        {8, 1, 0, 96, 1},    {8, 1, 0, 95, 0},    {8, 1, 4, 96, 0},    {8, 1, 4, 100, 1},  {0, 0, 0, 4, 1},
        {-8, 1, 64, 96, 1},  {-8, 1, 60, 96, 0},  {-8, 1, 64, 95, 0},  {8, -1, 28, 96, 1}, {8, -1, 24, 96, 0},
        {-8, -1, 92, 96, 1}, {-8, -1, 88, 96, 0}, {-8, -1, 92, 95, 0}, {8, 1, 200, 96, 0},
        {INT64_C(1) << 58, 1, 0, UINT64_MAX, 1},  {INT64_C(1) << 58, 1, UINT64_MAX - 63, UINT64_MAX, 0},
        /* clang-format on */
    };
    mfa_context_options options = {.size = sizeof options, .cache = folder};
    mfa_context *context = NULL;
    uint64_t all = UINT64_MAX, length;
    assert_int_equal(mfa_context_open(one, &options, &context), MFA_OK);
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        mfa_problem problem;
        mfa_problem_init(&problem, 1, 1, 1, 2, 3, 8, 8);
        problem.k_layout.row = cases[n].row, problem.k_layout.column = cases[n].column;
        length = cases[n].length;
        const mfa_buffers buffers = {
            .size = sizeof buffers, .q = {&all, 0}, .k = {&length, cases[n].offset}, .v = {&all, 0}, .o = {&all, 0}};
        const mfa_status status = mfa_attention(context, &problem, &buffers, NULL);
        assert_int_equal(status, cases[n].fits ? MFA_OK : MFA_INVALID);
        if (!cases[n].fits)
            assert_int_equal(strncmp(mfa_last_error(), "k begins at byte ", 17), 0);
    }
    static const struct {
        uint64_t offset, size, length;
        int fits;
    } workspaces[] = {{0, 132, 132, 1}, {64, 132, 196, 1}, {64, 132, 195, 0}, {0, 200, 132, 0}, {192, 132, 132, 0}};
    static _Alignas(64) uint64_t memory[32]; /* the workspace: its first element is its length */
    for (size_t n = 0; n < sizeof workspaces / sizeof *workspaces; n++) {
        mfa_problem problem;
        mfa_problem_init(&problem, 1, 1, 1, 2, 3, 8, 8);
        memory[0] = workspaces[n].length;
        const mfa_buffers buffers = {.size = sizeof buffers,
                                     .q = {&all, 0},
                                     .k = {&all, 0},
                                     .v = {&all, 0},
                                     .o = {&all, 0},
                                     .workspace = {memory, workspaces[n].offset},
                                     .workspace_size = workspaces[n].size};
        const mfa_status status = mfa_attention(context, &problem, &buffers, NULL);
        assert_int_equal(status, workspaces[n].fits ? MFA_OK : MFA_INVALID);
        if (!workspaces[n].fits)
            assert_int_equal(strncmp(mfa_last_error(), "workspace begins at byte ", 25), 0);
    }
    mfa_context_destroy(context);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_compiled_once), TEST(test_failures),   TEST(test_folders_that_cannot_be_written),
        TEST(test_next_choice),   TEST(test_precompile), TEST(test_precompile_failures),
        TEST(test_many_threads),  TEST(test_workspace),  TEST(test_fork_while_loading),
        TEST(test_extents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
