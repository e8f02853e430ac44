/* The part of XLA's FFI that a handler on the CPU needs: its stable C ABI, xla/ffi/api/c_api.h, with names of ours. A
 * struct begins with its size and a list of extensions, and only ever grows at its end. This is version 0.3, the newest
 * when this was written; what a handler on the CPU reads is the same in version 0.1. */
#ifndef MFA_XLA_FFI_H
#define MFA_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

enum { MFA_XLA_MAJOR = 0, MFA_XLA_OLDEST_MINOR = 1, MFA_XLA_MINOR = 3 };

/* Element types. */
enum {
    MFA_XLA_PRED = 1,
    MFA_XLA_S8 = 2,
    MFA_XLA_S32 = 4,
    MFA_XLA_S64 = 5,
    MFA_XLA_U8 = 6,
    MFA_XLA_U64 = 9,
    MFA_XLA_F16 = 10,
    MFA_XLA_F32 = 11,
    MFA_XLA_F64 = 12,
    MFA_XLA_BF16 = 16
};

enum { MFA_XLA_METADATA = 1 }; /* a kind of extension */
enum { MFA_XLA_BUFFER = 1 };   /* a kind of argument or result */
enum { MFA_XLA_STRING = 4 };   /* a kind of attribute */
enum { MFA_XLA_EXECUTE = 3 };  /* a stage */

/* Error codes. */
enum {
    MFA_XLA_INVALID_ARGUMENT = 3,
    MFA_XLA_RESOURCE_EXHAUSTED = 8,
    MFA_XLA_UNIMPLEMENTED = 12,
    MFA_XLA_INTERNAL = 13,
    MFA_XLA_UNAVAILABLE = 14
};

struct mfa_xla_extension {
    size_t size;
    int32_t kind;
    struct mfa_xla_extension *next;
};

struct mfa_xla_version {
    size_t size;
    struct mfa_xla_extension *extensions;
    int major, minor;
};

/* How XLA asks a handler for the version of the interface that it was written for, in place of a call. */
struct mfa_xla_metadata {
    size_t size;
    struct mfa_xla_version version;
    uint32_t traits;
};
struct mfa_xla_metadata_extension {
    struct mfa_xla_extension extension;
    struct mfa_xla_metadata *metadata;
};

struct mfa_xla_error_arguments {
    size_t size;
    struct mfa_xla_extension *extensions;
    const char *message;
    int32_t code;
};

struct mfa_xla_api {
    size_t size;
    struct mfa_xla_extension *extensions;
    struct mfa_xla_version version;
    const void *internal;
    void *(*create_error)(struct mfa_xla_error_arguments *arguments);
    /* and functions that are not used here */
};

/* A dense array in row-major order. */
struct mfa_xla_buffer {
    size_t size;
    struct mfa_xla_extension *extensions;
    int32_t dtype;
    void *data;
    int64_t rank;
    const int64_t *dims;
};

struct mfa_xla_text {
    const char *begin; /* without a terminating 0 */
    size_t length;
};

/* Arguments or results. */
struct mfa_xla_values {
    size_t size;
    struct mfa_xla_extension *extensions;
    int64_t count;
    const int32_t *kinds;
    void *const *values;
};

struct mfa_xla_attributes {
    size_t size;
    struct mfa_xla_extension *extensions;
    int64_t count;
    const int32_t *kinds;
    const struct mfa_xla_text *const *names;
    void *const *values;
};

struct mfa_xla_call_frame {
    size_t size;
    struct mfa_xla_extension *extensions;
    const struct mfa_xla_api *api;
    void *context;
    int32_t stage;
    struct mfa_xla_values arguments, results;
    struct mfa_xla_attributes attributes;
};

#endif
