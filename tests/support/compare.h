/* Compares a result with the expected one, and reports where they differ. */
#ifndef SUPPORT_COMPARE_H
#define SUPPORT_COMPARE_H

#include <stdint.h>

/* 1 if each |got - expected| is at most `tolerance`, infinities being equal and nothing NaN. Else reports a
 * failure with `what` (the problem), the tensor, the index, both values and the tolerance; 0.
 * `worst` (may be NULL) is raised to the largest difference as a share of the tolerance. */
int compare_close(const char *what, const char *tensor, const int64_t shape[4], const double *got,
                  const double *expected, double tolerance, double *worst);

/* 1 if they are the same bit for bit. */
int compare_same(const char *what, const char *tensor, const int64_t shape[4], const double *got,
                 const double *expected);

#endif
