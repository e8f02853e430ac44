/* What libmfa uses of <sys/sysctl.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _SYS_SYSCTL_H
#define _SYS_SYSCTL_H

#include <stddef.h>

int sysctlbyname(const char *name, void *value, size_t *size, void *set, size_t set_size);

#endif
