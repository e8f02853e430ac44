/* A loader of arm64 Mach-O libraries for Linux on arm64, under an emulator too: the very libmfa.dylib that ships to
 * Macs is executed without one. It does what dyld does with such a file: maps its segments, binds its imports (to
 * system.c), hands out its exports and its threads' variables. It knows what lld writes for macOS 14 and refuses all
 * else with a sentence. */
#ifndef MACHO_MACHO_H
#define MACHO_MACHO_H

#include <stddef.h>

typedef struct macho_image macho_image;

/* The address of an import such as "_malloc", or NULL. */
typedef void *(*macho_resolver)(const char *symbol);

/* NULL: `error` says why. An image stays until the process ends. */
const macho_image *macho_open(const char *path, macho_resolver resolve, char *error, size_t capacity);

/* The address of an export such as "_mfa_version", or NULL. */
void *macho_find(const macho_image *image, const char *symbol);

/* The file that an address belongs to, as it was given to macho_open; NULL: to none. */
const char *macho_file_of(const void *address);

/* libSystem, as far as system.c has it. */
void *macho_system(const char *symbol);

/* What a library gets that looks for others by dlopen and dlsym. The program sets them before it needs them. */
struct macho_libraries {
    void *(*open)(const char *path);                /* NULL: there is no such library */
    void *(*find)(void *library, const char *name); /* in NULL: in all of the process. NULL: there is no such symbol */
};
extern struct macho_libraries macho_libraries;

#endif
