#include "report.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "error.h"

#define ADDRESSES (2 * METALSIM_FINDINGS)

/* Text of addr2line -a -i: an address, then its place and those that it was inlined into, a line each.
 * Our own headers are left out. */
static void name_place(const char *lines, struct metalsim_text *place)
{
    for (const char *line = lines; *line && strncmp(line, "0x", 2);) {
        line += strncmp(line, "./", 2) ? 0 : 2;
        int length = (int)strcspn(line, "\n");
        int own = !strncmp(line, METALSIM_INCLUDE "/", strlen(METALSIM_INCLUDE) + 1);
        int unknown = *line == '?';
        const char *discriminator = strstr(line, " (");
        int shown = discriminator && discriminator < line + length ? (int)(discriminator - line) : length;
        if (!own && !unknown)
            metalsim_text_add(place, place->length ? ", called from %.*s" : "%.*s", shown, line);
        line += length + (line[length] == '\n');
    }
    if (!place->length)
        metalsim_text_add(place, "?");
}

/* The place of each address, given as offsets in the library. */
static void name_places(const struct metalsim_library *library, const void *const *addresses, size_t count,
                        struct metalsim_text *places)
{
    char hex[ADDRESSES][24];
    const char *words[ADDRESSES + 8] = {"addr2line", "-a", "-i", "-e", library->path};
    const char *begin = library->object->begin;
    for (size_t i = 0; i < count; i++) { /* a return address is that of the next instruction */
        snprintf(hex[i], sizeof hex[i], "0x%jx", (uintmax_t)((const char *)addresses[i] - begin - 1));
        words[5 + i] = hex[i];
    }
    struct metalsim_text output = {0}, errors = {0};
    metalsim_command_run(words, &output, &errors);
    const char *line = output.bytes ? output.bytes : "";
    for (size_t i = 0; i < count; i++) {
        line = strchr(line, '\n') ? strchr(line, '\n') + 1 : "";
        name_place(line, &places[i]);
        while (*line && strncmp(line, "0x", 2))
            line = strchr(line, '\n') ? strchr(line, '\n') + 1 : "";
    }
    free(output.bytes);
    free(errors.bytes);
}

metalsim_status metalsim_report(const struct metalsim_library *library, const char *kernel,
                                const struct metalsim_findings *findings)
{
    const void *addresses[ADDRESSES];
    struct metalsim_text places[ADDRESSES] = {{0}}, report = {0};
    size_t count = 0, next = 0;
    for (size_t i = 0; i < findings->count; i++) {
        const struct metalsim_finding *f = &findings->list[i];
        if (f->site)
            addresses[count++] = f->site;
        if (f->other)
            addresses[count++] = f->other;
    }
    if (count)
        name_places(library, addresses, count, places);
    for (size_t i = 0; i < findings->count; i++) {
        const struct metalsim_finding *f = &findings->list[i];
        metalsim_text_add(&report, "%s: ", kernel);
        if (f->site)
            metalsim_text_add(&report, "%s: ", places[next++].bytes);
        metalsim_text_add(&report, "%s", f->text);
        if (f->other)
            metalsim_text_add(&report, " (the other place: %s)", places[next++].bytes);
        metalsim_text_add(&report, "\n");
    }
    metalsim_fail(METALSIM_FAULT, "%s", report.bytes ? report.bytes : "out of memory");
    for (size_t i = 0; i < count; i++)
        free(places[i].bytes);
    free(report.bytes);
    return METALSIM_FAULT;
}
