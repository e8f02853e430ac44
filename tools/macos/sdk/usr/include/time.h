/* What libmfa uses of <time.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _TIME_H
#define _TIME_H

typedef long time_t;
typedef unsigned clockid_t;

struct timespec {
    time_t tv_sec;
    long tv_nsec;
};

#define CLOCK_MONOTONIC 6

int clock_gettime(clockid_t clock, struct timespec *time);
int nanosleep(const struct timespec *time, struct timespec *rest);

#endif
