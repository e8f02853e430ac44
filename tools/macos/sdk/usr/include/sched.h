/* What libmfa uses of <sched.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _SCHED_H
#define _SCHED_H

int sched_yield(void);

#endif
