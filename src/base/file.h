/* Files as the kernel cache needs them. Nothing here sets an error sentence, since a failure on disk is never
 * fatal. Functions return 1 on success, else 0. */
#ifndef MFA_BASE_FILE_H
#define MFA_BASE_FILE_H

#include <stddef.h>

#define MFA_FILE_PATH 4096 /* bytes of a path, its terminating 0 included */

/* The user's folder for compiled kernels: MFA_CACHE; XDG_CACHE_HOME/libmfa; ~/Library/Caches/libmfa on
 * macOS, ~/.cache/libmfa elsewhere. It need not exist. */
int mfa_file_cache_folder(char path[MFA_FILE_PATH]);

/* The absolute path, relative to the current folder. 0: the path is empty, or too long. */
int mfa_file_absolute(const char *path, char absolute[MFA_FILE_PATH]);

/* The folder `kernels` beside the file that this library is in: kernels that were shipped with it. It need not
 * exist. */
int mfa_file_shipped_folder(char path[MFA_FILE_PATH]);

/* Makes the folder and those above it, for this user alone; 1 also if it is already there. */
int mfa_file_make_folder(const char *path);

/* Reads the entire file into memory that the caller frees; never NULL, even if it is empty. Only regular files are
 * read. */
int mfa_file_read(const char *path, char **bytes, size_t *length);

/* Writes a temporary file beside it and renames that, so others see all of the old contents or all of the new. */
int mfa_file_write(const char *path, const void *bytes, size_t length);

#endif
