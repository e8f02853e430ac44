#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"

/* METALSIM_TESTS is this folder, METALSIM_CACHE one for compiled libraries: the build says so. */

char *support_read(const char *name)
{
    char path[MFA_FILE_PATH], *text;
    size_t length;
    snprintf(path, sizeof path, "%s/%s", METALSIM_TESTS, name);
    assert_true(mfa_file_read(path, &text, &length));
    text[length] = '\0'; /* the reader leaves room for it */
    return text;
}

static metalsim_library *create(const char *name, const char *text, const char *defines, unsigned build)
{
    metalsim_library *library = NULL;
    if (metalsim_library_create(name, text, defines, METALSIM_CACHE, build, &library) != METALSIM_OK)
        fail_msg("%s", metalsim_last_error());
    return library;
}

metalsim_library *support_load(const char *file, const char *defines, unsigned build)
{
    char *text = support_read(file);
    metalsim_library *library = create(file, text, defines, build);
    free(text);
    return library;
}

metalsim_library *support_compile(const char *text, unsigned build)
{
    return create("text.metal", text, NULL, build);
}

const char *support_rejection(const char *text)
{
    metalsim_library *library = NULL;
    metalsim_status status = metalsim_library_create("text.metal", text, NULL, METALSIM_CACHE, 0, &library);
    assert_int_equal(status, METALSIM_COMPILE_FAILED);
    return metalsim_last_error();
}

void support_expect_error(const char *words)
{
    if (!strstr(metalsim_last_error(), words))
        fail_msg("\"%s\" is not in: %s", words, metalsim_last_error());
}
