/* The last error sentence of each thread: the field, what was given, what is accepted. */
#ifndef MFA_BASE_ERROR_H
#define MFA_BASE_ERROR_H

#include "mfa.h"

/* Keeps the sentence for mfa_last_error() and returns `status`, so that a check is one line:
 *     return mfa_fail(MFA_INVALID, "q_len is %lld; it must be 0 or more", (long long)n); */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
mfa_status
mfa_fail(mfa_status status, const char *format, ...);
#ifdef __clang_analyzer__ /* which sees a declaration only, and so not that the result is `status` */
#define mfa_fail(status, ...) ((void)mfa_fail(status, __VA_ARGS__), (status))
#endif

/* How many bytes of `text` fit into `most` bytes: all of them, or as many as end with a complete UTF-8 character. */
size_t mfa_error_fit(const char *text, size_t most);

/* Copies as much of the text as fits into `capacity` bytes with its terminating 0. */
void mfa_error_copy(char *copy, size_t capacity, const char *text);

#endif
