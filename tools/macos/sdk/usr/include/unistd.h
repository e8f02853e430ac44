/* What libmfa uses of <unistd.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _UNISTD_H
#define _UNISTD_H

#include <stddef.h>

typedef long ssize_t;

int close(int file);
char *getcwd(char *path, size_t size);
char *mkdtemp(char *path);
ssize_t read(int file, void *bytes, size_t size);
int rmdir(const char *path);
int unlink(const char *path);
ssize_t write(int file, const void *bytes, size_t size);

#endif
