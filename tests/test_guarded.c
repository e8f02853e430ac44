/* Guarded memory opened and closed by several threads at once: each has memory of its own, of the size it asked for. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "support/guarded.h"
#include "support/report.h"

enum { THREADS = 4, ROUNDS = 2000, REPORT_EACH = 100, HELD = 6, PAGES = 5 };

/* 1 if no other thread wrote to the memory between open and close. */
static int keeps_its_bytes(const struct guarded *memory, unsigned char filler)
{
    for (size_t i = 0; i < memory->size; i++)
        if (memory->bytes[i] != filler)
            return 0;
    return 1;
}

static void *open_and_close(void *argument)
{
    unsigned char filler = *(const unsigned char *)argument;
    struct guarded held[HELD] = {{0}};
    uintptr_t good = 1;
    for (int round = 0; round < ROUNDS; round++) {
        struct guarded *memory = &held[round % HELD];
        if (memory->mapping)
            good = keeps_its_bytes(memory, filler) && good;
        guarded_close(memory);
        guarded_open(memory, "a thread's", 1 + (size_t)(round % PAGES) * guarded_page(), 1, GUARDED_END, filler);
        if (round % REPORT_EACH == 0)
            report_pass();
    }
    for (int i = 0; i < HELD; i++)
        guarded_close(&held[i]);
    return (void *)good;
}

static void test_threads_open_and_close(void **state)
{
    (void)state;
    pthread_t threads[THREADS];
    unsigned char fillers[THREADS];
    long long passed = report_passed();
    for (int n = 0; n < THREADS; n++) {
        fillers[n] = (unsigned char)(n + 1);
        assert_int_equal(pthread_create(&threads[n], NULL, open_and_close, &fillers[n]), 0);
    }
    for (int n = 0; n < THREADS; n++) {
        void *good = NULL;
        pthread_join(threads[n], &good);
        assert_non_null(good);
    }
    assert_int_equal(report_passed() - passed, THREADS * ROUNDS / REPORT_EACH);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads_open_and_close)};
    report_begin("test_guarded", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
