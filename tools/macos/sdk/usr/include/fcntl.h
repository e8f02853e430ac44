/* What libmfa uses of <fcntl.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _FCNTL_H
#define _FCNTL_H

#define O_RDONLY 0x0
#define O_NONBLOCK 0x4
#define O_CLOEXEC 0x1000000

int open(const char *path, int flags, ...);

#endif
