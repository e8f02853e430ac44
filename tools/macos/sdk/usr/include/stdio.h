/* What libmfa uses of <stdio.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _STDIO_H
#define _STDIO_H

#include <stdarg.h>
#include <stddef.h>

int snprintf(char *text, size_t capacity, const char *format, ...) __attribute__((format(printf, 3, 4)));
int vsnprintf(char *text, size_t capacity, const char *format, va_list arguments) __attribute__((format(printf, 3, 0)));
int remove(const char *path);
int rename(const char *from, const char *to);

#endif
