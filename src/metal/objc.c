#include "metal/objc.h"

#include <dlfcn.h>
#include <stdatomic.h>

#include "base/error.h"
#include "base/process.h"
#include "base/sync.h"

/* Test builds define other files. */
#if !defined(MFA_METAL_OBJC)
#define MFA_METAL_OBJC "/usr/lib/libobjc.A.dylib"
#endif
#if !defined(MFA_METAL_FRAMEWORK)
#define MFA_METAL_FRAMEWORK "/System/Library/Frameworks/Metal.framework/Metal"
#endif

struct mfa_metal_objc mfa_metal_objc;

static const char *const selectors[MFA_METAL_METHODS] = {
#define METHOD(name, receiver, selector, ownership, since, result, types) selector,
#include "metal/selectors.inc"
#undef METHOD
};

static mfa_status find(void *library, const char *path, const char *name, void *function)
{
    void *found = dlsym(library, name);
    *(void **)function = found; /* POSIX: a pointer to a function has the form of one to an object */
    return found ? MFA_OK : mfa_fail(MFA_UNAVAILABLE, "the Metal device cannot be used: %s has no %s", path, name);
}

static mfa_status open_library(const char *path, void **library)
{
    *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return *library ? MFA_OK
                    : mfa_fail(MFA_UNAVAILABLE, "the Metal device cannot be used: this machine has no %s", path);
}

/* The libraries are never closed: what they register in the process stays, too. */
static mfa_status open_all(struct mfa_metal_objc *opened)
{
    SEL (*selector_named)(const char *name);
    void *objc, *metal;
    mfa_status status = open_library(MFA_METAL_OBJC, &objc);
    if (status == MFA_OK)
        status = open_library(MFA_METAL_FRAMEWORK, &metal);
    const struct {
        void **library;
        const char *path, *name;
        void *function;
    } functions[] = {
        {&objc, MFA_METAL_OBJC, "objc_msgSend", &opened->send},
        {&objc, MFA_METAL_OBJC, "sel_registerName", &selector_named},
        {&objc, MFA_METAL_OBJC, "objc_getClass", &opened->class_named},
        {&objc, MFA_METAL_OBJC, "objc_autoreleasePoolPush", &opened->push},
        {&objc, MFA_METAL_OBJC, "objc_autoreleasePoolPop", &opened->pop},
        {&objc, MFA_METAL_OBJC, "dispatch_sync_f", &opened->dispatch_sync},
        {&objc, MFA_METAL_OBJC, "malloc_size", &opened->malloc_size},
        {&objc, MFA_METAL_OBJC, "sysctlbyname", &opened->system_fact},
        {&metal, MFA_METAL_FRAMEWORK, "MTLCreateSystemDefaultDevice", &opened->default_device},
        {&metal, MFA_METAL_FRAMEWORK, "MTLCopyAllDevices", &opened->all_devices},
    };
    for (size_t n = 0; n < sizeof functions / sizeof *functions && status == MFA_OK; n++)
        status = find(*functions[n].library, functions[n].path, functions[n].name, functions[n].function);
    for (int n = 0; n < MFA_METAL_METHODS && status == MFA_OK; n++)
        opened->selectors[n] = selector_named(selectors[n]);
    return status;
}

mfa_status mfa_metal_objc_open(void)
{
    static atomic_int done;
    static struct mfa_lock opening;
    mfa_status status = MFA_OK;
    if (!atomic_load_explicit(&done, memory_order_acquire)) {
        mfa_lock_take(&opening);
        if (!atomic_load_explicit(&done, memory_order_relaxed)) {
            status = open_all(&mfa_metal_objc);
            mfa_metal_objc.process = mfa_process_number();
            atomic_store_explicit(&done, status == MFA_OK, memory_order_release);
        }
        mfa_lock_release(&opening);
    }
    if (status == MFA_OK && !mfa_metal_objc_is_here())
        status = mfa_fail(MFA_UNAVAILABLE, "the Metal device was opened before fork(); a child can use the CPU only");
    return status;
}

int mfa_metal_objc_is_here(void)
{
    return mfa_process_number() == mfa_metal_objc.process;
}

void *mfa_metal_objc_push(void)
{
    return mfa_metal_objc.push();
}

void mfa_metal_objc_pop(void *pool)
{
    mfa_metal_objc.pop(pool);
}

id mfa_metal_objc_new(const char *class_name)
{
    return SEND(new, mfa_metal_objc.class_named(class_name));
}

void mfa_metal_objc_release(id object)
{
    SEND(release, object);
}

int mfa_metal_objc_is_object(const void *pointer)
{
    static atomic_int passed;
    if (atomic_load_explicit(&passed, memory_order_relaxed))
        return 1;
    if (mfa_metal_objc.malloc_size(pointer) == 0)
        return 0;
    atomic_store_explicit(&passed, 1, memory_order_relaxed);
    return 1;
}

int mfa_metal_objc_has(id object, enum mfa_metal_method method)
{
    return SEND_WITH(responds_to, object, mfa_metal_objc.selectors[method]);
}

id mfa_metal_objc_string(const char *text)
{
    return SEND_WITH(string_from, mfa_metal_objc.class_named("NSString"), text);
}

id mfa_metal_objc_url(const char *path)
{
    return SEND_WITH(url_of_file, mfa_metal_objc.class_named("NSURL"), mfa_metal_objc_string(path));
}

const char *mfa_metal_objc_text(id string)
{
    const char *text = SEND(string_text, string);
    return text ? text : "";
}

mfa_status mfa_metal_objc_fail(mfa_status status, const char *what, id error)
{
    const char *text = mfa_metal_objc_text(SEND(error_text, error));
    return mfa_fail(status, "%s: %s", what, *text ? text : "Metal gives no reason");
}
