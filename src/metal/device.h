/* The GPU, and the objects that live as long as a context: the device and its queue. */
#ifndef MFA_METAL_DEVICE_H
#define MFA_METAL_DEVICE_H

#include "metal/objc.h"
#include "mfa.h"

struct mfa_metal_device {
    id device, queue;         /* owned */
    int family;               /* n of MTLGPUFamilyApple: the highest that it supports */
    uint64_t buffer_max;      /* bytes of a buffer */
    char name[64], build[32]; /* of the GPU, "Apple M1"; of the system, "23A344" */
};

/* MFA_UNAVAILABLE: there is no device, or the kernels cannot run on it. */
mfa_status mfa_metal_device_open(struct mfa_metal_device *device);
void mfa_metal_device_close(struct mfa_metal_device *device);

/* A buffer of the device, owned. MFA_OUT_OF_MEMORY. */
mfa_status mfa_metal_device_allocate(const struct mfa_metal_device *device, uint64_t bytes, NSUInteger storage,
                                     id *buffer);

#endif
