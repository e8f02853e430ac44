/* Compiled kernels on disk. A file is named after its kernel's key and a stamp, which hashes what it was
 * compiled from and for; beside it lies a line of text that says what the file must be. A file is used
 * only if all of it is so: any doubt is a miss, and a folder that cannot be written is no error. */
#ifndef MFA_CORE_CACHE_H
#define MFA_CORE_CACHE_H

#include <stdint.h>

#include "base/file.h"
#include "core/key.h"
#include "mfa.h"

/* 1 and the path of a good file, or 0. A NULL folder holds nothing. */
int mfa_cache_find(const char *folder, const struct mfa_key *key, uint64_t stamp, char path[MFA_FILE_PATH]);

/* A file in the making, in a folder of its own. */
struct mfa_cache_draft {
    char folder[MFA_FILE_PATH];
    char path[MFA_FILE_PATH]; /* compile to this */
    int beside;               /* made in the cache folder, so that a rename is all it takes to keep it */
};

/* Makes the draft's folder in the cache folder, or else among the system's temporaries.
 * MFA_COMPILE_FAILED if neither can be written. */
mfa_status mfa_cache_draft_begin(const char *folder, const struct mfa_key *key, struct mfa_cache_draft *draft);

/* Puts the draft's file into the cache if that can be done. Its path is the place to load it from. */
void mfa_cache_draft_keep(const char *folder, const struct mfa_key *key, uint64_t stamp, struct mfa_cache_draft *draft);

/* Removes what has not been kept. */
void mfa_cache_draft_end(struct mfa_cache_draft *draft);

#endif
