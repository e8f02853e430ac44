/* What libmfa uses of <sys/stat.h> on macOS; see tools/macos/toolchain.cmake. */
#ifndef _SYS_STAT_H
#define _SYS_STAT_H

#include <stdint.h>
#include <time.h>

typedef uint16_t mode_t;
typedef int64_t off_t;

struct stat {
    int32_t st_dev;
    mode_t st_mode;
    uint16_t st_nlink;
    uint64_t st_ino;
    uint32_t st_uid, st_gid;
    int32_t st_rdev;
    struct timespec st_atimespec, st_mtimespec, st_ctimespec, st_birthtimespec;
    off_t st_size;
    int64_t st_blocks;
    int32_t st_blksize;
    uint32_t st_flags, st_gen;
    int32_t st_lspare;
    int64_t st_qspare[2];
};

#define S_IFMT 0170000
#define S_ISDIR(mode) (((mode) & S_IFMT) == 0040000)
#define S_ISREG(mode) (((mode) & S_IFMT) == 0100000)

int fstat(int file, struct stat *found);
int mkdir(const char *path, mode_t mode);
int stat(const char *path, struct stat *found);

#endif
