/* What libmfa uses of <dlfcn.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _DLFCN_H
#define _DLFCN_H

#define RTLD_NOW 0x2
#define RTLD_LOCAL 0x4
#define RTLD_DEFAULT ((void *)-2)

typedef struct dl_info {
    const char *dli_fname;
    void *dli_fbase;
    const char *dli_sname;
    void *dli_saddr;
} Dl_info;

int dladdr(const void *address, Dl_info *found);
void *dlopen(const char *path, int mode);
void *dlsym(void *library, const char *name);

#endif
