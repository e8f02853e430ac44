/* A 64-bit hash that tells files and keys apart; not a cryptographic one. */
#ifndef MFA_BASE_HASH_H
#define MFA_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#define MFA_HASH_EMPTY UINT64_C(0xcbf29ce484222325) /* of no bytes */

/* The hash of what `hash` stands for followed by these bytes (FNV-1a). */
uint64_t mfa_hash_bytes(uint64_t hash, const void *bytes, size_t length);

#endif
