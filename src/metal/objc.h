/* Calls Metal from C, through the Objective-C runtime. Both are opened by the first problem for a Metal device, so that
 * the library loads on systems without them.
 *
 * A message is SEND(name, receiver) or SEND_WITH(name, receiver, ...), name being a row of selectors.inc: that row
 * gives the selector and the types, so no cast is made by hand. On arm64 Macs a call without the right types would
 * put arguments where methods do not look for them. A message to nil returns 0. */
#ifndef MFA_METAL_OBJC_H
#define MFA_METAL_OBJC_H

#include <stddef.h>
#include <stdint.h>

#include "mfa.h"

/* Types with the names of Apple's headers, which are never included together with this one. */
typedef struct objc_object *id;
typedef struct objc_selector *SEL;
typedef _Bool BOOL;
typedef long NSInteger;
typedef unsigned long NSUInteger;
typedef struct MTLSize {
    NSUInteger width, height, depth;
} MTLSize;

/* Constants of Metal's headers. */
enum {
    MTL_FAMILY_APPLE = 1000,           /* MTLGPUFamilyApple7 is 1007 */
    MTL_STORAGE_SHARED = 0,            /* MTLResourceStorageModeShared */
    MTL_STORAGE_PRIVATE = 2 << 4,      /* MTLResourceStorageModePrivate */
    MTL_LANGUAGE_3_1 = (3 << 16) + 1,  /* MTLLanguageVersion3_1, the first that has bfloat */
    MTL_MATH_SAFE = 0,                 /* MTLMathModeSafe */
    MTL_FAIL_ON_ARCHIVE_MISS = 1 << 2, /* MTLPipelineOptionFailOnBinaryArchiveMiss */
    MTL_COMMANDS_COMPLETED = 4,        /* MTLCommandBufferStatusCompleted */
    MTL_COMMANDS_FAILED = 5,           /* MTLCommandBufferStatusError */
    MTL_DISPATCH_CONCURRENT = 1,       /* MTLDispatchTypeConcurrent */
    MTL_BARRIER_BUFFERS = 1,           /* MTLBarrierScopeBuffers */
    MTL_BYTES_MAX = 4096               /* of setBytes */
};

enum mfa_metal_method {
#define METHOD(name, receiver, selector, ownership, since, result, types) MFA_METAL_METHOD_##name,
#include "metal/selectors.inc"
#undef METHOD
    MFA_METAL_METHODS
};

#define METHOD(name, receiver, selector, ownership, since, result, types) typedef result mfa_metal_method_##name types;
#include "metal/selectors.inc"
#undef METHOD

/* The functions and selectors that were found. Read only after mfa_metal_objc_open has returned MFA_OK. */
struct mfa_metal_objc {
    uint32_t process; /* the process that opened them: Metal does not survive fork() */
    /* sysctlbyname, malloc_size and dispatch_sync_f are C functions of libSystem, which libobjc links with. */
    void (*send)(void); /* objc_msgSend, with a type that cannot be called with arguments */
    SEL selectors[MFA_METAL_METHODS];
    id (*class_named)(const char *name);
    void *(*push)(void);
    void (*pop)(void *pool);
    id (*default_device)(void);
    id (*all_devices)(void); /* an NSArray, owned */
    void (*dispatch_sync)(void *queue, void *argument, void (*function)(void *argument));
    size_t (*malloc_size)(const void *pointer); /* bytes of a block of malloc's; 0: it is none */
    int (*system_fact)(const char *name, void *value, size_t *length, void *new_value, size_t new_length);
};
extern struct mfa_metal_objc mfa_metal_objc;

#define SEND_AS(name) ((mfa_metal_method_##name *)mfa_metal_objc.send)
#define SEND(name, receiver) SEND_AS(name)((receiver), mfa_metal_objc.selectors[MFA_METAL_METHOD_##name])
#define SEND_WITH(name, receiver, ...) \
    SEND_AS(name)((receiver), mfa_metal_objc.selectors[MFA_METAL_METHOD_##name], __VA_ARGS__)

/* Opens both, once in a process. MFA_UNAVAILABLE: this machine does not have them, or a parent of this process
 * opened them. */
mfa_status mfa_metal_objc_open(void);

/* 0 in a child of the process that opened them: there, objects must not be released either. */
int mfa_metal_objc_is_here(void);

/* Between these two calls, which every entry point of this backend makes, autoreleased objects live. */
void *mfa_metal_objc_push(void);
void mfa_metal_objc_pop(void *pool);

/* An object of the named class, owned. */
id mfa_metal_objc_new(const char *class_name);

/* Releases an owned object; nil is a no-op. */
void mfa_metal_objc_release(id object);

/* Whether a caller's pointer may be to an object: it is to a block of malloc's, as objects are. Once a pointer of this
 * process has passed, no other is looked at. */
int mfa_metal_objc_is_object(const void *pointer);

/* Whether the object has the method. */
int mfa_metal_objc_has(id object, enum mfa_metal_method method);

/* NSString and NSURL of text, borrowed from the pool; text of an NSString, which lives as long as that. Never NULL. */
id mfa_metal_objc_string(const char *text);
id mfa_metal_objc_url(const char *path);
const char *mfa_metal_objc_text(id string);

/* Fails with what could not be done and the reason that Metal gives: "WHAT: REASON". error: an NSError or nil. */
mfa_status mfa_metal_objc_fail(mfa_status status, const char *what, id error);

#endif
