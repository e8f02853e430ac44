#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct metalsim_text last;

static int reserve(struct metalsim_text *text, size_t more)
{
    if (text->length + more < text->capacity)
        return 1;
    size_t capacity = 2 * (text->length + more) + 64;
    char *bytes = realloc(text->bytes, capacity);
    if (!bytes)
        return 0;
    text->bytes = bytes;
    text->capacity = capacity;
    return 1;
}

void metalsim_text_add_bytes(struct metalsim_text *text, const char *bytes, size_t length)
{
    if (!reserve(text, length))
        return;
    memcpy(text->bytes + text->length, bytes, length);
    text->length += length;
    text->bytes[text->length] = '\0';
}

static void add(struct metalsim_text *text, const char *format, va_list arguments)
{
    va_list again;
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    if (length > 0 && reserve(text, (size_t)length))
        text->length += (size_t)vsnprintf(text->bytes + text->length, (size_t)length + 1, format, again);
    va_end(again);
}

void metalsim_text_add(struct metalsim_text *text, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    add(text, format, arguments);
    va_end(arguments);
}

metalsim_status metalsim_fail(metalsim_status status, const char *format, ...)
{
    struct metalsim_text error = {0};
    va_list arguments;
    va_start(arguments, format);
    add(&error, format, arguments); /* the arguments may point into the last one */
    va_end(arguments);
    free(last.bytes);
    last = error;
    return status;
}

const char *metalsim_last_error(void)
{
    return last.bytes ? last.bytes : "";
}
