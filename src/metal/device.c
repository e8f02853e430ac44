#include "metal/device.h"

#include "base/error.h"
#include "metal/tiles.h"

#define NEWEST_FAMILY 20         /* the highest Apple family that is queried; there are 10 now */
#define THREADGROUP_MEMORY 32768 /* bytes that the tiles assume */

/* The default device is nil in some programs without a window: then the first of all, which on Macs with an Apple
 * GPU is the same. */
static id find_device(void)
{
    id device = mfa_metal_objc.default_device();
    if (device)
        return device;
    id devices = mfa_metal_objc.all_devices();
    device = SEND(retain, SEND(array_first, devices));
    mfa_metal_objc_release(devices);
    return device;
}

static int family_of(id device)
{
    int family = NEWEST_FAMILY;
    while (family > 0 && !SEND_WITH(device_has_family, device, MTL_FAMILY_APPLE + family))
        family--;
    return family;
}

static void read_build(char *build, size_t capacity)
{
    size_t length = capacity - 1;
    if (mfa_metal_objc.system_fact("kern.osversion", build, &length, NULL, 0) != 0)
        length = 0;
    build[length] = '\0';
}

static mfa_status check(const struct mfa_metal_device *device)
{
    const NSUInteger memory = SEND(device_threadgroup_memory, device->device);
    if (!mfa_metal_tiles_family(device->family))
        return mfa_fail(MFA_UNAVAILABLE,
                        "the Metal device is %s, of GPU family Apple%d; Apple7 (M1) or later is needed", device->name,
                        device->family);
    if (memory < THREADGROUP_MEMORY)
        return mfa_fail(MFA_UNAVAILABLE, "the Metal device is %s, with %lu bytes of threadgroup memory; %d are needed",
                        device->name, memory, THREADGROUP_MEMORY);
    if (!device->queue)
        return mfa_fail(MFA_UNAVAILABLE, "the Metal device is %s, which gives no command queue", device->name);
    return MFA_OK;
}

mfa_status mfa_metal_device_open(struct mfa_metal_device *device)
{
    *device = (struct mfa_metal_device){.device = find_device()};
    if (!device->device)
        return mfa_fail(MFA_UNAVAILABLE, "the Metal device cannot be used: Metal finds none on this machine");
    mfa_error_copy(device->name, sizeof device->name, mfa_metal_objc_text(SEND(device_name, device->device)));
    read_build(device->build, sizeof device->build);
    device->family = family_of(device->device);
    device->buffer_max = SEND(device_buffer_length, device->device);
    device->queue = SEND(new_queue, device->device);
    const mfa_status status = check(device);
    if (status != MFA_OK)
        mfa_metal_device_close(device);
    return status;
}

void mfa_metal_device_close(struct mfa_metal_device *device)
{
    mfa_metal_objc_release(device->queue);
    mfa_metal_objc_release(device->device);
}

mfa_status mfa_metal_device_allocate(const struct mfa_metal_device *device, uint64_t bytes, NSUInteger storage,
                                     id *buffer)
{
    *buffer = bytes <= device->buffer_max ? SEND_WITH(new_buffer, device->device, (NSUInteger)bytes, storage) : NULL;
    if (*buffer)
        return MFA_OK;
    return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for an MTLBuffer of %llu bytes; the device's limit is %llu",
                    (unsigned long long)bytes, (unsigned long long)device->buffer_max);
}
