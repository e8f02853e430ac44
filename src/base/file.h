/* Files as the kernel cache needs them. Nothing here sets an error sentence: what fails on disk is never
 * fatal. Functions return 1 if they did it, else 0. */
#ifndef MFA_BASE_FILE_H
#define MFA_BASE_FILE_H

#include <stddef.h>

#define MFA_FILE_PATH 4096 /* bytes of a path and its end */

/* The user's folder for compiled kernels: MFA_CACHE; XDG_CACHE_HOME/libmfa; ~/Library/Caches/libmfa on
 * macOS, ~/.cache/libmfa elsewhere. It need not exist. */
int mfa_file_cache_folder(char path[MFA_FILE_PATH]);

/* The path from the root, in the folder that is current now. 0: the path is empty, or too long. */
int mfa_file_absolute(const char *path, char absolute[MFA_FILE_PATH]);

/* The folder `kernels` beside the file that this library is in: kernels that were shipped with it. It need not
 * exist. */
int mfa_file_shipped_folder(char path[MFA_FILE_PATH]);

/* Makes the folder and those above it, for this user alone; good if it is already there. */
int mfa_file_make_folder(const char *path);

/* The whole file in memory to be freed by the caller; never NULL, even if it is empty. Only a regular file is read. */
int mfa_file_read(const char *path, char **bytes, size_t *length);

/* Writes a temporary beside it and renames that: others see the old contents or the new, whole. */
int mfa_file_write(const char *path, const void *bytes, size_t length);

#endif
