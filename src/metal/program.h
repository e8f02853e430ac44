/* Makes the compute pipelines of a key. Text becomes an MTLLibrary, for any device, by Metal's
 * front end; each function of it becomes a pipeline, for this device. Metal can keep the second step in a binary
 * archive, but not the first: a library's file (a metallib) is made by Apple's tools, if at all, out of the same
 * texts. */
#ifndef MFA_METAL_PROGRAM_H
#define MFA_METAL_PROGRAM_H

#include "core/key.h"
#include "metal/device.h"
#include "metal/tiles.h"
#include "mfa.h"

struct mfa_metal_program {
    id pipelines[MFA_METAL_KERNELS]; /* owned; nil: the key's pass has no such kernel */
};

/* Hashes of all that makes a metallib and an archive stale. */
uint64_t mfa_metal_program_library_stamp(const struct mfa_key *key);
uint64_t mfa_metal_program_stamp(const struct mfa_metal_device *device, const struct mfa_key *key);

/* Text number `n` of the key, and the name of its file, both to be freed; NULL after the last. */
mfa_status mfa_metal_program_text(const struct mfa_key *key, int n, char **text, char **name);

/* Makes all pipelines of the key, and puts them into a binary archive at `path`, if that can be done. `library`: a
 * metallib, whose functions are used if it has them. `library` and `path` may be NULL: none. MFA_COMPILE_FAILED: the
 * sentence has the compiler's words. MFA_UNSUPPORTED: a pipeline has too few threads on this device. */
mfa_status mfa_metal_program_compile(const struct mfa_metal_device *device, const struct mfa_key *key,
                                     const char *library, const char *path, struct mfa_metal_program **program);

/* The same, compiled before: MFA_COMPILE_FAILED if the archive at `path` lacks anything. */
mfa_status mfa_metal_program_load(const struct mfa_metal_device *device, const struct mfa_key *key, const char *library,
                                  const char *path, struct mfa_metal_program **program);

void mfa_metal_program_free(struct mfa_metal_program *program);

#endif
