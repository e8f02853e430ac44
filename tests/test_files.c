/* Files, and those of the kernel cache: an invalid one is a cache miss. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/file.h"
#include "core/cache.h"
#include "folder.h"
#include "mfa.h"

static char folder[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/test_files-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    remove_all(folder);
    return 0;
}

static const struct mfa_key key = {MFA_FORWARD, MFA_VARIANT_TILED, MFA_F16, 64, 64, 32,
                                   64,          MFA_FEATURE_BAND,  MFA_F16, 0,  0,  "apple9"};

static struct mfa_cache_name name_of(uint64_t stamp)
{
    return (struct mfa_cache_name){&key, stamp, ""};
}

static void keep_contents(uint64_t stamp, const char *contents)
{
    struct mfa_cache_draft draft;
    const struct mfa_cache_name name = name_of(stamp);
    assert_true(mfa_cache_draft_begin(folder, &name, &draft));
    assert_true(mfa_file_write(draft.path, contents, strlen(contents)));
    assert_true(mfa_cache_draft_keep(folder, &name, &draft));
    mfa_cache_draft_end(&draft);
    char path[MFA_FILE_PATH], *bytes;
    size_t length;
    assert_true(mfa_cache_find(folder, &name, path));
    assert_true(mfa_file_read(path, &bytes, &length));
    assert_int_equal(length, strlen(contents));
    assert_memory_equal(bytes, contents, length);
    free(bytes);
}

static int hit(uint64_t stamp)
{
    char path[MFA_FILE_PATH];
    const struct mfa_cache_name name = name_of(stamp);
    return mfa_cache_find(folder, &name, path);
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

static void test_absolute(void **state)
{
    (void)state;
    char path[MFA_FILE_PATH], long_path[MFA_FILE_PATH + 1];
    assert_true(mfa_file_absolute("/a/b", path));
    assert_string_equal(path, "/a/b");
    assert_int_equal(chdir(folder), 0);
    assert_true(mfa_file_absolute("a/b", path));
    assert_int_equal(strncmp(path, folder, strlen(folder)), 0);
    assert_string_equal(path + strlen(folder), "/a/b");
    assert_true(mfa_file_shipped_folder(path)); /* beside this program */
    assert_int_equal(path[0], '/');
    assert_string_equal(strrchr(path, '/'), "/kernels");
    memset(long_path, 'a', MFA_FILE_PATH);
    long_path[MFA_FILE_PATH] = '\0';
    assert_false(mfa_file_absolute(long_path, path));
    long_path[MFA_FILE_PATH - 10] = '\0';
    assert_false(mfa_file_absolute(long_path, path));
    assert_false(mfa_file_absolute("", path));
    assert_int_equal(chdir("/"), 0);
}

static void test_hit_and_stale(void **state)
{
    (void)state;
    assert_false(hit(1));
    struct mfa_cache_name other = name_of(1);
    char path[MFA_FILE_PATH];
    assert_false(mfa_cache_find(NULL, &other, path));
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
    other.suffix = ".library";
    assert_false(mfa_cache_find(folder, &other, path));
    struct mfa_key wider = key;
    wider.head_dim = 65;
    other = (struct mfa_cache_name){&wider, 1, ""};
    assert_false(mfa_cache_find(folder, &other, path));
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

/* A reader that opens it waits for a writer. */
static void replace_by_fifo(const char *path)
{
    remove_one(path);
    assert_int_equal(mkfifo(path, 0700), 0);
}

static void replace_by_device(const char *path)
{
    remove_one(path);
    assert_int_equal(symlink("/dev/zero", path), 0);
}

static void replace_by_socket(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int opened = socket(AF_UNIX, SOCK_STREAM, 0);
    remove_one(path);
    assert_true(strlen(path) < sizeof address.sun_path);
    strcpy(address.sun_path, path);
    assert_int_equal(bind(opened, (const struct sockaddr *)&address, sizeof address), 0);
    close(opened);
}

static const char *expected_end; /* NULL: the kernel; else the line beside it */
static void (*wanted_damage)(const char *path);

static void damage(const char *path)
{
    const int is_check = strstr(path, ".check") != NULL;
    if (is_check == (expected_end != NULL))
        wanted_damage(path);
}

static void test_damage_is_a_miss(void **state)
{
    (void)state;
    static void (*const damages[])(const char *) = {truncate_last,   flip_first,        append_one,
                                                    make_empty,      remove_one,        replace_by_folder,
                                                    replace_by_fifo, replace_by_device, replace_by_socket};
    alarm(30); /* a deadlock ends here */
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++)
        for (int check = 0; check < 2; check++) {
            keep_contents(1, "kernel");
            assert_true(hit(1));
            wanted_damage = damages[i];
            expected_end = check ? ".check" : NULL;
            each_file(folder, damage);
            assert_false(hit(1));
            remove_all(folder);
            assert_int_equal(mkdir(folder, 0700), 0);
        }
    alarm(0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {TEST(test_files), TEST(test_default_folder), TEST(test_absolute),
                                       TEST(test_hit_and_stale), TEST(test_damage_is_a_miss)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
