/* Structs of the public ABI begin with their size, so that they can grow. */
#ifndef MFA_BASE_SIZED_H
#define MFA_BASE_SIZED_H

#include <stddef.h>

#include "mfa.h"

/* Copies as much of the caller's struct as the caller knew, and sets the rest to zero, which is the
 * default of every member added later. Its size must be from `first`, that of version 0.1, to `current`.
 * `name` is that of the struct, for the sentence. The copy's size is `current`. */
mfa_status mfa_sized_copy(const char *name, const void *given, size_t first, void *copy, size_t current);

#endif
