/* What libmfa uses of <stdlib.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _STDLIB_H
#define _STDLIB_H

#include <stddef.h>

void *malloc(size_t size);
void *calloc(size_t count, size_t size);
void *realloc(void *memory, size_t size);
void *aligned_alloc(size_t alignment, size_t size);
void free(void *memory);
char *getenv(const char *name);
double strtod(const char *text, char **end);
long long strtoll(const char *text, char **end, int base);
int mkstemp(char *path);

#endif
