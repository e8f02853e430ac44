/* A folder for each test, and what is in it. */
#ifndef TESTS_FOLDER_H
#define TESTS_FOLDER_H

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"

/* Calls `visit` with each file of the folder. Returns how many there are. */
static inline int each_file(const char *path, void (*visit)(const char *path))
{
    DIR *listing = opendir(path);
    int count = 0;
    for (struct dirent *entry; listing && (entry = readdir(listing)) != NULL;) {
        char name[MFA_FILE_PATH];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        count++;
        if (snprintf(name, sizeof name, "%s/%s", path, entry->d_name) >= (int)sizeof name)
            continue;
        if (visit)
            visit(name);
    }
    if (listing)
        closedir(listing);
    return count;
}

static inline void remove_all(const char *path)
{
    struct stat found;
    if (lstat(path, &found) == 0 && S_ISDIR(found.st_mode))
        each_file(path, remove_all);
    remove(path);
}

#endif
