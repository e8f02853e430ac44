/* Binary archives: the code of functions for one GPU and one system, in a file. Here a file is a mark, the machine, a
 * count, a hash for each function, and a hash of all that. Metal does not promise to see damage; so damage that the
 * host has let through is a finding. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/hash.h"
#include "runtime/metal.h"

/* --- Where one lies ------------------------------------------------------------------------------- */

struct location {
    struct metalsim_object object;
    id url; /* nil: a new archive */
};

static void finish_location(id self)
{
    metalsim_release(((struct location *)self)->url);
}

METALSIM_CLASS(MTLBinaryArchiveDescriptor, struct location, finish_location)

void metalsim_location_set_url(id self, SEL selector, id url)
{
    struct location *location = (struct location *)self;
    if (url && !metalsim_object_is(url, &metalsim_class_NSURL, selector))
        return;
    metalsim_retain(url);
    metalsim_release(location->url);
    location->url = url;
}

/* --- Archives ------------------------------------------------------------------------------------- */

struct archive {
    struct metalsim_object object;
    uint64_t *functions;
    size_t count;
    int is_of_file;
};

static void finish_archive(id self)
{
    struct archive *archive = (struct archive *)self;
    free(archive->functions);
    archive->functions = NULL, archive->count = 0;
}

METALSIM_CLASS(MTLBinaryArchive, struct archive, finish_archive)

static int has(const struct archive *archive, uint64_t hash)
{
    for (size_t i = 0; i < archive->count; i++)
        if (archive->functions[i] == hash)
            return 1;
    return 0;
}

static void add(struct archive *archive, uint64_t hash)
{
    if (has(archive, hash))
        return;
    archive->functions = realloc(archive->functions, (archive->count + 1) * sizeof hash);
    if (!archive->functions)
        abort();
    archive->functions[archive->count++] = hash;
}

int metalsim_archive_has(id archives, uint64_t hash)
{
    for (size_t i = 0; archives && metalsim_array_object(archives, i); i++) {
        id archive = metalsim_array_object(archives, i);
        if (metalsim_object_is(archive, &metalsim_class_MTLBinaryArchive, "one of the binary archives") &&
            has((const struct archive *)archive, hash) &&
            !(((const struct archive *)archive)->is_of_file && metalsim_fails(METALSIM_FAULT_ARCHIVE_MISSES)))
            return 1;
    }
    return 0;
}

/* --- Files ---------------------------------------------------------------------------------------- */

struct header {
    char mark[4];
    uint32_t count;
    uint64_t machine;
};

/* A hash of what the code is good for. */
static uint64_t machine(void)
{
    const uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, metalsim_now.name, strlen(metalsim_now.name));
    return mfa_hash_bytes(hash, metalsim_now.build, strlen(metalsim_now.build)) + (uint64_t)metalsim_now.family;
}

/* 0: this is no archive. One of another machine has nothing that is of use here. */
static int read_archive(const char *path, struct archive *archive)
{
    struct header header;
    char *bytes;
    size_t length;
    uint64_t sum;
    if (!mfa_file_read(path, &bytes, &length))
        return 0;
    int good = length >= sizeof header + sizeof sum;
    if (good) {
        memcpy(&header, bytes, sizeof header);
        good = !memcmp(header.mark, "MTLA", 4) && length == sizeof header + (header.count + 1) * sizeof(uint64_t);
    }
    if (good) {
        const char *at = bytes + sizeof header;
        memcpy(&sum, bytes + length - sizeof sum, sizeof sum);
        if (sum != mfa_hash_bytes(MFA_HASH_EMPTY, bytes, length - sizeof sum))
            metalsim_find("a damaged binary archive is opened: %s", path);
        for (uint32_t i = 0; i < header.count && header.machine == machine(); i++) {
            uint64_t hash;
            memcpy(&hash, at + i * sizeof hash, sizeof hash);
            add(archive, hash);
        }
    }
    free(bytes);
    return good;
}

id metalsim_device_new_archive(id self, SEL selector, id descriptor, id *error)
{
    (void)self;
    if (!metalsim_object_is(descriptor, &metalsim_class_MTLBinaryArchiveDescriptor, selector))
        return NULL;
    id url = ((struct location *)descriptor)->url;
    const char *path = metalsim_url_path(url);
    struct archive *archive = (struct archive *)metalsim_object_create(&metalsim_class_MTLBinaryArchive);
    const int fails = metalsim_fails(url ? METALSIM_FAULT_ARCHIVE_REFUSED : METALSIM_FAULT_ARCHIVE_UNMADE);
    if (!fails && !url)
        return &archive->object;
    if (!fails && read_archive(path, archive)) {
        METALSIM_COUNT(archives);
        archive->is_of_file = 1;
        return &archive->object;
    }
    metalsim_release(&archive->object);
    if (error)
        *error = metalsim_error("Invalid binary archive: \"%s\"", path);
    return NULL;
}

BOOL metalsim_archive_add(id self, SEL selector, id descriptor, id *error)
{
    (void)selector;
    const struct function *function = metalsim_description_function(descriptor);
    if (!function)
        return 0;
    if (metalsim_fails_for(METALSIM_FAULT_ARCHIVE_FULL, function->name)) {
        if (error)
            *error = metalsim_error("the function %s cannot be added to a binary archive", function->name);
        return 0;
    }
    if (!has((struct archive *)self, function->hash))
        METALSIM_COUNT(functions);
    add((struct archive *)self, function->hash);
    return 1;
}

/* `fails`: before its end. */
static int write_archive(const struct archive *archive, const char *path, int fails)
{
    const struct header header = {{'M', 'T', 'L', 'A'}, (uint32_t)archive->count, machine()};
    const size_t bytes = archive->count * sizeof *archive->functions;
    uint64_t sum = mfa_hash_bytes(MFA_HASH_EMPTY, &header, sizeof header);
    sum = mfa_hash_bytes(sum, archive->functions, bytes);
    FILE *file = fopen(path, "wb");
    if (!file)
        return 0;
    int good = fwrite(&header, sizeof header, 1, file) == 1;
    good = good && (!bytes || fwrite(archive->functions, bytes, 1, file) == 1);
    good = good && !fails && fwrite(&sum, sizeof sum, 1, file) == 1;
    return fclose(file) == 0 && good;
}

BOOL metalsim_archive_write(id self, SEL selector, id url, id *error)
{
    (void)selector;
    const char *path = metalsim_url_path(url);
    if (write_archive((struct archive *)self, path, metalsim_fails(METALSIM_FAULT_ARCHIVE_UNWRITTEN))) {
        METALSIM_COUNT(written);
        return 1;
    }
    if (error)
        *error = metalsim_error("the binary archive cannot be written to \"%s\"", path);
    return 0;
}
