/* The cache folder, and reading and writing whole files. */
#define _GNU_SOURCE
#include "base/file.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int join(char path[MFA_FILE_PATH], const char *folder, const char *rest)
{
    const int length = snprintf(path, MFA_FILE_PATH, "%s%s", folder, rest);
    return length > 0 && length < MFA_FILE_PATH;
}

int mfa_file_cache_folder(char path[MFA_FILE_PATH])
{
    const char *folder = getenv("MFA_CACHE");
    if (folder && *folder)
        return join(path, folder, "");
    folder = getenv("XDG_CACHE_HOME");
    if (folder && *folder == '/') /* its specification: a relative one is to be ignored */
        return join(path, folder, "/libmfa");
    folder = getenv("HOME");
    if (!folder || !*folder)
        return 0;
#if defined(__APPLE__)
    return join(path, folder, "/Library/Caches/libmfa");
#else
    return join(path, folder, "/.cache/libmfa");
#endif
}

int mfa_file_absolute(const char *path, char absolute[MFA_FILE_PATH])
{
    if (*path == '/')
        return join(absolute, path, "");
    if (!*path || !getcwd(absolute, MFA_FILE_PATH))
        return 0;
    const size_t length = strlen(absolute), left = MFA_FILE_PATH - length;
    const int put = snprintf(absolute + length, left, "/%s", path);
    return put > 0 && (size_t)put < left;
}

int mfa_file_shipped_folder(char path[MFA_FILE_PATH])
{
    static const char here = 0, name[] = "/kernels";
    Dl_info found;
    if (!dladdr(&here, &found) || !found.dli_fname || !mfa_file_absolute(found.dli_fname, path))
        return 0;
    char *end = strrchr(path, '/');
    if (!end || sizeof name > MFA_FILE_PATH - (size_t)(end - path))
        return 0;
    memcpy(end, name, sizeof name);
    return 1;
}

int mfa_file_make_folder(const char *path)
{
    char part[MFA_FILE_PATH];
    if (!join(part, path, ""))
        return 0;
    for (char *end = part + 1; *end; end++) {
        if (*end != '/')
            continue;
        *end = '\0';
        (void)mkdir(part, 0700); /* whether it is there now shows below */
        *end = '/';
    }
    struct stat found;
    return mkdir(part, 0700) == 0 || (stat(part, &found) == 0 && S_ISDIR(found.st_mode));
}

/* The path may name anything; opening a FIFO without O_NONBLOCK would wait for a writer. */
int mfa_file_read(const char *path, char **bytes, size_t *length)
{
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0)
        return 0;
    struct stat found;
    char *contents = NULL;
    size_t have = 0;
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode))
        contents = malloc((size_t)found.st_size + 1);
    while (contents && have < (size_t)found.st_size) {
        const ssize_t got = read(file, contents + have, (size_t)found.st_size - have);
        if (got > 0) {
            have += (size_t)got;
        } else if (got == 0 || errno != EINTR) { /* shorter than it said, or unreadable */
            free(contents);
            contents = NULL;
        }
    }
    close(file);
    if (!contents)
        return 0;
    *bytes = contents;
    *length = have;
    return 1;
}

static int write_all(int file, const char *bytes, size_t length)
{
    while (length > 0) {
        const ssize_t put = write(file, bytes, length);
        if (put < 0 && errno != EINTR)
            return 0;
        if (put > 0) {
            bytes += put;
            length -= (size_t)put;
        }
    }
    return 1;
}

int mfa_file_write(const char *path, const void *bytes, size_t length)
{
    char temporary[MFA_FILE_PATH];
    if (!join(temporary, path, ".XXXXXX"))
        return 0;
    const int file = mkstemp(temporary);
    if (file < 0)
        return 0;
    const int written = write_all(file, bytes, length);
    if (close(file) == 0 && written && rename(temporary, path) == 0)
        return 1;
    unlink(temporary);
    return 0;
}
