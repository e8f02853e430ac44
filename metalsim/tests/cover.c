/* Runs covered.metal once, for test_tools.py to see what coverage.py says of it.
 *     metalsim_cover CACHE NUMBER [DEFINE] */
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"
#include "metalsim/metalsim.h"

int main(int count, char **words)
{
    char *text = NULL;
    size_t length;
    metalsim_library *library;
    if (count < 3 || !mfa_file_read(METALSIM_TESTS "/covered.metal", &text, &length))
        return 2;
    text[length] = '\0';
    float numbers[32];
    for (int i = 0; i < 32; i++)
        numbers[i] = (float)atof(words[2]);
    struct metalsim_dispatch dispatch = {
        .threadgroups = {1, 1, 1},
        .threads = {32, 1, 1},
        .buffers = {{METALSIM_BUFFER_BINDING, numbers, sizeof numbers, 0, 0}},
    };
    const char *defines = count > 3 ? words[3] : NULL;
    if (metalsim_library_create("tests/covered.metal", text, defines, words[1], METALSIM_COVERAGE, &library) ||
        metalsim_dispatch_run(metalsim_library_find(library, "covered"), &dispatch)) {
        puts(metalsim_last_error());
        return 1;
    }
    metalsim_library_destroy(library);
    free(text);
    return 0;
}
