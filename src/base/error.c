/* The last error sentence of each thread, and the names of the statuses. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[512];

#undef mfa_fail /* what error.h makes of it for clang-tidy */

mfa_status mfa_fail(mfa_status status, const char *format, ...)
{
    char text[sizeof sentence + 1]; /* arguments may point to the last sentence; one byte more, to tell what is cut */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    mfa_error_copy(sentence, sizeof sentence, text);
    return status;
}

static int is_within_character(char byte)
{
    return ((unsigned char)byte & 0xc0) == 0x80;
}

size_t mfa_error_fit(const char *text, size_t most)
{
    const size_t length = strlen(text);
    if (length <= most)
        return length;
    size_t end = most;
    while (end > 0 && most - end < 3 && is_within_character(text[end])) /* three follow the first at most */
        end--;
    return is_within_character(text[end]) ? most : end; /* text that is not UTF-8 is cut anywhere */
}

void mfa_error_copy(char *copy, size_t capacity, const char *text)
{
    const size_t length = mfa_error_fit(text, capacity - 1);
    memcpy(copy, text, length);
    copy[length] = '\0';
}

const char *mfa_last_error(void)
{
    return sentence;
}

const char *mfa_status_name(mfa_status status)
{
    switch ((int)status) {
#define STATUS(name, value) \
    case value: return #name;
#include "base/status.inc"
#undef STATUS
    default: return "unknown status";
    }
}
