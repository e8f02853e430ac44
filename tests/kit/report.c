/* The counts of one test program, and the lines that print them. */
#include "kit/report.h"

#include <stdarg.h>
#include <stdio.h>

static uint64_t the_seed;
static long long passed, failed;

void report_begin(const char *program, uint64_t seed)
{
    the_seed = seed;
    printf("%s --seed %llu\n", program, (unsigned long long)seed);
    fflush(stdout);
}

uint64_t report_seed(void)
{
    return the_seed;
}

void report_pass(void)
{
    passed++;
}

void report_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("FAILED  ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
    failed++;
}

long long report_passed(void)
{
    return passed;
}

long long report_failed(void)
{
    return failed;
}

int report_end(void)
{
    printf("%lld passed, %lld failed\n", passed, failed);
    fflush(stdout);
    return failed != 0;
}

int report_group(int count, int group_failed)
{
    failed += group_failed;
    passed += count - group_failed;
    return report_end();
}
