/* Compiled kernels on disk. A file is named after its kernel's key and a stamp, which hashes what it was compiled from
 * and for; beside it lies a `.check` file, a line of text with the file's identity, length and hash. A file is used
 * only if all of these match; anything else is a miss, and a folder that cannot be written is no error. */
#ifndef MFA_CORE_CACHE_H
#define MFA_CORE_CACHE_H

#include <stdint.h>

#include "base/file.h"
#include "core/key.h"
#include "mfa.h"

/* Which file. */
struct mfa_cache_name {
    const struct mfa_key *key;
    uint64_t stamp;
    const char *suffix; /* "", or what tells one kind of file from others of this key */
};

/* 1 and the path of a valid file, or 0. A NULL folder holds nothing. */
int mfa_cache_find(const char *folder, const struct mfa_cache_name *name, char path[MFA_FILE_PATH]);

/* A file that is being made, in a folder of its own within the cache folder, so that a rename puts it into the cache.
 * */
struct mfa_cache_draft {
    char folder[MFA_FILE_PATH]; /* "": it could not be made */
    char path[MFA_FILE_PATH];   /* the place to write the file to */
};

/* Makes the draft's folder. Returns 0 if the cache folder is NULL or cannot be written. */
int mfa_cache_draft_begin(const char *folder, const struct mfa_cache_name *name, struct mfa_cache_draft *draft);

/* Puts the draft's file into the cache. Returns 0 if it is not there or cannot be kept. */
int mfa_cache_draft_keep(const char *folder, const struct mfa_cache_name *name, struct mfa_cache_draft *draft);

/* Removes what has not been kept. */
void mfa_cache_draft_end(struct mfa_cache_draft *draft);

#endif
