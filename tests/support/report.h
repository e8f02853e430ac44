/* What every test program prints: the seed first, a line for what it ran, the counts at the end. */
#ifndef SUPPORT_REPORT_H
#define SUPPORT_REPORT_H

#include <stdint.h>

void report_begin(const char *program, uint64_t seed);
uint64_t report_seed(void);

/* One check passed; one failed, with a line that says what and how. */
void report_pass(void);
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void report_fail(const char *format, ...);

long long report_passed(void);
long long report_failed(void);

/* From now on report_bits writes lines to this file, which it empties; 0 if it cannot, with a line that says so. */
int report_bits_to(const char *path);

/* Whether it does. */
int report_wants_bits(void);

/* A result of what `what` names has this hash. */
void report_bits(const char *what, uint64_t hash);

/* Prints "N passed, N failed"; what main returns. */
int report_end(void);

/* The same for a cmocka group of `count` tests, of which cmocka says that `failed` failed. */
int report_group(int count, int failed);

#endif
