/* The counts of one test program, and the lines that print them. */
#include "support/report.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

static uint64_t the_seed;
static atomic_llong passed, failed;
static FILE *bits;

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

int report_bits_to(const char *path)
{
    bits = fopen(path, "w");
    if (!bits)
        fprintf(stderr, "--bits is \"%s\"; it must be a file that can be written\n", path);
    return bits != NULL;
}

int report_wants_bits(void)
{
    return bits != NULL;
}

void report_bits(const char *what, uint64_t hash)
{
    if (bits)
        fprintf(bits, "%016llx %s\n", (unsigned long long)hash, what);
}

int report_end(void)
{
    if (bits && fclose(bits) != 0) {
        perror("--bits");
        failed++;
    }
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
