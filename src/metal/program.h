/* Makes the compute pipelines of a key, each when it is first needed. Text becomes an MTLLibrary, for any device, by
 * Metal's front end; each function of it becomes a pipeline, for this device. Metal can keep the second step in a
 * binary archive, but not the first: a library's file (a metallib) is made by Apple's tools, if at all, out of the same
 * texts.
 *
 * The file of a key is such an archive, which grows with the kernels that are made; or a line of text, where an archive
 * has turned out to be of no use on this device: then no other is tried. */
#ifndef MFA_METAL_PROGRAM_H
#define MFA_METAL_PROGRAM_H

#include "base/sync.h"
#include "core/key.h"
#include "metal/device.h"
#include "metal/tiles.h"
#include "mfa.h"

/* Sets of kernels: bit n is kernel n of enum mfa_metal_kernel. */
#define MFA_METAL_KERNEL_BIT(kernel) (UINT32_C(1) << (kernel))

struct mfa_metal_program {
    struct mfa_key key;
    const struct mfa_metal_device *device;
    const char *cache;      /* a folder of the context's, for an archive that has grown; NULL: none */
    id metallib, archive;   /* owned; nil: none */
    struct mfa_lock making; /* guards what follows */
    struct mfa_metal_made {
        _Atomic(id) pipeline; /* owned; nil: not made yet */
        mfa_status status;    /* MFA_OK, or why it cannot be made: */
        char *sentence;
    } made[MFA_METAL_KERNELS];
};

/* Hashes of all that makes a metallib and an archive stale. */
uint64_t mfa_metal_program_library_stamp(const struct mfa_key *key);
uint64_t mfa_metal_program_stamp(const struct mfa_metal_device *device, const struct mfa_key *key);

/* Text number `n` of the key, and the name of its file, both to be freed; NULL after the last. */
mfa_status mfa_metal_program_text(const struct mfa_key *key, int n, char **text, char **name);

/* The kernels that every run of the key uses, and those that any may use; without layout_test. */
uint32_t mfa_metal_program_always(const struct mfa_key *key);
uint32_t mfa_metal_program_all(const struct mfa_key *key);

/* What a program is made of, and how much of it at once. */
struct mfa_metal_origin {
    const struct mfa_metal_device *device;
    const struct mfa_key *key;
    const char *library; /* a metallib, whose functions are used if it has them; or NULL */
    const char *cache;   /* as in the program */
    uint32_t kernels;
    int misses; /* load sets it: this device does not find in the archive what was put into it. Then compile is not to
                   make another one */
};

/* Makes the kernels, and puts them into a binary archive at `path`, if that can be done; NULL: none is made.
 * MFA_COMPILE_FAILED: the sentence has the compiler's words. MFA_UNSUPPORTED: a pipeline has too few threads on this
 * device. */
mfa_status mfa_metal_program_compile(const struct mfa_metal_origin *origin, const char *path,
                                     struct mfa_metal_program **program);

/* The same, compiled before: MFA_COMPILE_FAILED if the archive at `path` lacks anything but layout_test. */
mfa_status mfa_metal_program_load(struct mfa_metal_origin *origin, const char *path,
                                  struct mfa_metal_program **program);

/* The pipeline of a kernel, borrowed. It is made if this is the first time, and what the archive has grown by is kept
 * in the cache. Fails as compile does, and then in the same way each time. */
mfa_status mfa_metal_program_pipeline(struct mfa_metal_program *program, enum mfa_metal_kernel kernel, id *pipeline);

void mfa_metal_program_free(struct mfa_metal_program *program);

#endif
