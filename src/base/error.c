/* The last error sentence of each thread, and the names of the statuses. */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[512];

mfa_status mfa_fail(mfa_status status, const char *format, ...)
{
    char text[sizeof sentence]; /* the arguments may hold the sentence before */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    memcpy(sentence, text, sizeof sentence);
    return status;
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
