/* The last error of each thread: a text of any length. */
#ifndef METALSIM_ERROR_H
#define METALSIM_ERROR_H

#include <stddef.h>

#include "metalsim.h"

/* A text that grows at its end. All zero is an empty one. If memory ends it stays as it was. */
struct metalsim_text {
    char *bytes; /* NULL, or ends with a 0 */
    size_t length, capacity;
};

__attribute__((format(printf, 2, 3))) void metalsim_text_add(struct metalsim_text *text, const char *format, ...);
void metalsim_text_add_bytes(struct metalsim_text *text, const char *bytes, size_t length);

/* Keeps the sentence for metalsim_last_error() and returns `status`. */
__attribute__((format(printf, 2, 3))) metalsim_status metalsim_fail(metalsim_status status, const char *format, ...);

#endif
