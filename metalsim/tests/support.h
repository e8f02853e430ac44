/* What the tests of metalsim share. */
#ifndef METALSIM_TESTS_SUPPORT_H
#define METALSIM_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "metalsim/metalsim.h"

/* The text of a file of this folder; freed by the caller. */
char *support_read(const char *name);

/* A library made of that file, and of this text. Failing to compile fails the test. */
metalsim_library *support_load(const char *file, const char *defines, unsigned build);
metalsim_library *support_compile(const char *text, unsigned build);

/* The reason why this text does not compile. That it does fails the test. */
const char *support_rejection(const char *text);

/* Fails the test unless the last error holds these words. */
void support_expect_error(const char *words);

static inline struct metalsim_argument support_buffer(const void *base, size_t length)
{
    return (struct metalsim_argument){METALSIM_BUFFER_BINDING, base, length, 0, 0};
}

static inline struct metalsim_argument support_output(void *base, size_t length)
{
    return (struct metalsim_argument){METALSIM_BUFFER_BINDING, base, length, 0, 1};
}

static inline struct metalsim_argument support_bytes(const void *base, size_t length)
{
    return (struct metalsim_argument){METALSIM_BYTES_BINDING, base, length, 0, 0};
}

#endif
