/* The two comparisons, and the message of a failure. */
#include "support/compare.h"

#include <math.h>
#include <string.h>

#include "support/report.h"

static void fail(const char *what, const char *tensor, const int64_t shape[4], int64_t at, double got, double expected,
                 double tolerance)
{
    long long c = at % shape[3], r = at / shape[3] % shape[2], h = at / shape[3] / shape[2] % shape[1];
    long long b = at / shape[3] / shape[2] / shape[1];
    report_fail("%s\n        %s[%lld, %lld, %lld, %lld] is %.9g, expected %.9g, tolerance %.3g, seed %llu", what,
                tensor, b, h, r, c, got, expected, tolerance, (unsigned long long)report_seed());
}

int compare_close(const char *what, const char *tensor, const int64_t shape[4], const double *got,
                  const double *expected, double tolerance, double *worst)
{
    int64_t count = shape[0] * shape[1] * shape[2] * shape[3], at_largest = 0;
    double largest = 0;
    for (int64_t at = 0; at < count; at++) {
        if (got[at] == expected[at])
            continue;
        double difference = fabs(got[at] - expected[at]);
        if (!isfinite(difference)) {
            fail(what, tensor, shape, at, got[at], expected[at], tolerance);
            return 0;
        }
        if (difference > largest) {
            largest = difference;
            at_largest = at;
        }
    }
    if (worst && tolerance > 0)
        *worst = fmax(*worst, largest / tolerance);
    if (largest > tolerance) {
        fail(what, tensor, shape, at_largest, got[at_largest], expected[at_largest], tolerance);
        return 0;
    }
    return 1;
}

int compare_same(const char *what, const char *tensor, const int64_t shape[4], const double *got,
                 const double *expected)
{
    int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
    for (int64_t at = 0; at < count; at++)
        if (memcmp(&got[at], &expected[at], sizeof *got)) {
            fail(what, tensor, shape, at, got[at], expected[at], 0);
            return 0;
        }
    return 1;
}
