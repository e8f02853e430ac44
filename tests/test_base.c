/* src/base: sentences, which process this is, and the lock that outlives fork(). */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/process.h"
#include "base/sync.h"

#if defined(__linux__)
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

/* A sentence that is too long ends with a complete UTF-8 character. */
static void test_long_sentence(void **state)
{
    (void)state;
    static const char *const characters[] = {"x", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    enum { LENGTH = 600, CAPACITY = 511 };
    for (size_t bytes = 1; bytes <= 4; bytes++)
        for (size_t before = 0; before < 4; before++) {
            char text[LENGTH + 8] = "...";
            for (size_t at = before; at < LENGTH; at += bytes)
                memcpy(text + at, characters[bytes - 1], bytes + 1);
            assert_int_equal(mfa_fail(MFA_INVALID, "%s", text), MFA_INVALID);
            const size_t length = strlen(mfa_last_error());
            assert_in_range(length, CAPACITY - (bytes - 1), CAPACITY);
            assert_int_equal((length - before) % bytes, 0);
            assert_memory_equal(mfa_last_error(), text, length);
            mfa_fail(MFA_INVALID, "%s", mfa_last_error()); /* a sentence may quote itself */
            assert_int_equal(strlen(mfa_last_error()), length);
        }
    char no_text[LENGTH + 1];
    memset(no_text, 0x80, LENGTH);
    no_text[LENGTH] = '\0';
    mfa_fail(MFA_INVALID, "%s", no_text);
    assert_int_equal(strlen(mfa_last_error()), CAPACITY);
}

static void test_kept_text(void **state)
{
    (void)state;
    char copy[6];
    mfa_error_copy(copy, sizeof copy, "12345");
    assert_string_equal(copy, "12345");
    mfa_error_copy(copy, sizeof copy, "1234\xc3\xa9");
    assert_string_equal(copy, "1234");
    mfa_error_copy(copy, sizeof copy, "123\xc3\xa9\xc3\xa9");
    assert_string_equal(copy, "123\xc3\xa9");
    assert_int_equal(mfa_error_fit("", 0), 0);
    assert_int_equal(mfa_error_fit("\xc3\xa9", 1), 0);
}

/* In a PID namespace a child may have the number that its parent has in another. */
pid_t getpid(void)
{
    return 7;
}

#if defined(__linux__)
static int refuses; /* as Linux before 4.14 does */

int madvise(void *memory, size_t bytes, int advice)
{
    if (refuses) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_madvise, memory, bytes, advice);
}

/* As an emulator that accepts any advice and ignores it. */
static int kernel_wipes(void)
{
    const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const int wipes = madvise(page, bytes, MADV_WIPEONFORK) == 0 && madvise(page, bytes, -1) != 0;
    munmap(page, bytes);
    return wipes;
}

/* A child process that is made without running the handlers of fork(). */
static pid_t fork_without_handlers(void)
{
    return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}
#endif

/* Whether `child`, which may not assert, returns 1 in a child. */
static int is_so_in_child(pid_t (*make)(void), int (*child)(uint32_t), uint32_t argument)
{
    const pid_t process = make();
    if (process == 0) {
        alarm(30); /* a deadlock ends here */
        _exit(child(argument) ? 0 : 1);
    }
    int status = -1;
    return process > 0 && waitpid(process, &status, 0) == process && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static int has_greater_number(uint32_t than)
{
    const uint32_t number = mfa_process_number();
    return number > than && number == mfa_process_number();
}

/* Ensures that the parent's number is not the first one. */
static int has_greater_number_as_its_child_has(uint32_t than)
{
    const uint32_t number = mfa_process_number();
    return number > than && is_so_in_child(fork, has_greater_number, number) && number == mfa_process_number();
}

static void test_number_of_a_child(void **state)
{
    (void)state;
    const uint32_t number = mfa_process_number();
    assert_int_not_equal(number, 0);
    for (int n = 0; n < 3; n++)
        assert_true(is_so_in_child(fork, has_greater_number_as_its_child_has, number));
    assert_int_equal(mfa_process_number(), number);
}

#if defined(__linux__)
static void test_number_without_handlers(void **state)
{
    (void)state;
    if (!kernel_wipes()) {
        print_message("           not run: this kernel wipes no memory in a child\n");
        skip();
    }
    assert_true(is_so_in_child(fork_without_handlers, has_greater_number, mfa_process_number()));
}

/* Runs before this process has a number: where it is kept is decided once. */
static int is_right_where_memory_is_not_wiped(uint32_t nothing)
{
    (void)nothing;
    refuses = 1;
    return has_greater_number_as_its_child_has(0) && has_greater_number_as_its_child_has(0);
}

static void test_number_by_a_handler(void **state)
{
    (void)state;
    assert_true(is_so_in_child(fork, is_right_where_memory_is_not_wiped, 0));
}
#endif

static struct mfa_lock lock;

static int takes_the_lock(uint32_t times)
{
    while (times-- > 0) {
        mfa_lock_take(&lock);
        mfa_lock_release(&lock);
    }
    return 1;
}

static void test_lock_held_in_the_parent(void **state)
{
    (void)state;
    mfa_lock_take(&lock);
    assert_true(is_so_in_child(fork, takes_the_lock, 2));
    mfa_lock_release(&lock);
    assert_true(takes_the_lock(2));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#if defined(__linux__)
        cmocka_unit_test(test_number_by_a_handler), /* the first */
        cmocka_unit_test(test_number_without_handlers),
#endif
        cmocka_unit_test(test_long_sentence),           cmocka_unit_test(test_kept_text),
        cmocka_unit_test(test_number_of_a_child),       cmocka_unit_test(test_lock_held_in_the_parent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
