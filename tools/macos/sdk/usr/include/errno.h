/* What libmfa uses of <errno.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _ERRNO_H
#define _ERRNO_H

extern int *__error(void);
#define errno (*__error())

#define EINTR 4

#endif
