/* The kernel cache. The stamp is part of a file's name, so two processes that write the same file write equivalent
 * files, and a valid file may be replaced before it is loaded. */
#define _GNU_SOURCE
#include "core/cache.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"

#define CHECK_LINE 512 /* bytes of the line beside a file, and its end */

struct place {
    char path[MFA_FILE_PATH], check[MFA_FILE_PATH];
    char identity[MFA_KEY_TEXT + 64]; /* library version, key, stamp */
};

static int fits(int length)
{
    return length > 0 && length < MFA_FILE_PATH;
}

static int find_place(const char *folder, const struct mfa_cache_name *wanted, struct place *place)
{
    char name[MFA_KEY_TEXT];
    mfa_key_print(wanted->key, name);
    snprintf(place->identity, sizeof place->identity, "libmfa %d.%d.%d %s%s stamp %016" PRIx64, MFA_VERSION_MAJOR,
             MFA_VERSION_MINOR, MFA_VERSION_PATCH, name, wanted->suffix, wanted->stamp);
    const uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, place->identity, strlen(place->identity));
    const char *suffix = wanted->suffix;
    return fits(snprintf(place->path, MFA_FILE_PATH, "%s/%s-%016" PRIx64 "%s", folder, name, hash, suffix)) &&
           fits(snprintf(place->check, MFA_FILE_PATH, "%s/%s-%016" PRIx64 "%s.check", folder, name, hash, suffix));
}

/* What the line beside the file says if `bytes` are its contents. Returns its length. */
static size_t describe(const struct place *place, const char *bytes, size_t length, char line[CHECK_LINE])
{
    return (size_t)snprintf(line, CHECK_LINE, "%s length %zu content %016" PRIx64 "\n", place->identity, length,
                            mfa_hash_bytes(MFA_HASH_EMPTY, bytes, length));
}

/* The line that belongs to the file at `path` as it is now; 0: the file cannot be read or is empty. */
static size_t describe_file(const struct place *place, const char *path, char line[CHECK_LINE])
{
    char *bytes;
    size_t length, line_length = 0;
    if (!mfa_file_read(path, &bytes, &length))
        return 0;
    if (length > 0)
        line_length = describe(place, bytes, length, line);
    free(bytes);
    return line_length;
}

int mfa_cache_find(const char *folder, const struct mfa_cache_name *name, char path[MFA_FILE_PATH])
{
    struct place place;
    char expected[CHECK_LINE], *line;
    if (!folder || !find_place(folder, name, &place))
        return 0;
    const size_t expected_length = describe_file(&place, place.path, expected);
    size_t length;
    if (!expected_length || !mfa_file_read(place.check, &line, &length))
        return 0;
    const int good = length == expected_length && memcmp(line, expected, length) == 0;
    free(line);
    if (good)
        memcpy(path, place.path, sizeof place.path);
    return good;
}

int mfa_cache_draft_begin(const char *folder, const struct mfa_cache_name *name, struct mfa_cache_draft *draft)
{
    if (folder && mfa_file_make_folder(folder) &&
        fits(snprintf(draft->folder, MFA_FILE_PATH, "%s/libmfa-draft-XXXXXX", folder)) && mkdtemp(draft->folder)) {
        if (fits(snprintf(draft->path, MFA_FILE_PATH, "%s/draft%s", draft->folder, name->suffix)))
            return 1;
        rmdir(draft->folder);
    }
    draft->folder[0] = draft->path[0] = '\0';
    return 0;
}

int mfa_cache_draft_keep(const char *folder, const struct mfa_cache_name *name, struct mfa_cache_draft *draft)
{
    struct place place;
    char line[CHECK_LINE];
    if (!draft->folder[0] || !find_place(folder, name, &place))
        return 0;
    const size_t length = describe_file(&place, draft->path, line);
    return length && rename(draft->path, place.path) == 0 && mfa_file_write(place.check, line, length);
}

void mfa_cache_draft_end(struct mfa_cache_draft *draft)
{
    if (!draft->folder[0])
        return;
    unlink(draft->path);
    rmdir(draft->folder);
    draft->folder[0] = '\0';
}
