/* The output of every test program: the seed first, a line for each thing that it ran, the counts at the end. */
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

/* Empties the file, to which report_bits then writes lines; 0 if that fails, which is printed. */
int report_bits_to(const char *path);

/* Whether there is such a file. */
int report_wants_bits(void);

/* Writes the hash of a result of the run that `what` names. */
void report_bits(const char *what, uint64_t hash);

/* Prints "N passed, N failed"; what main returns. */
int report_end(void);

/* The same for a cmocka group of `count` tests, of which cmocka says that `failed` failed. */
int report_group(int count, int failed);

#endif
