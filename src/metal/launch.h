/* Runs kernels: encodes the list of dispatch.h as commands on a stream. */
#ifndef MFA_METAL_LAUNCH_H
#define MFA_METAL_LAUNCH_H

#include <stdatomic.h>

#include "core/backend.h"
#include "metal/device.h"
#include "metal/program.h"
#include "metal/stream.h"
#include "mfa.h"

#define MFA_METAL_SCRATCH 16 /* buffers kept for concurrent runs */

/* Scratch memory that is kept from run to run; all zeros at first. */
struct mfa_metal_scratch {
    _Atomic(id) alone[MFA_METAL_SCRATCH]; /* for runs that are ALONE: each takes one and puts it back */
    id in_order;                          /* for runs that are IN_ORDER: used within PyTorch's dispatch queue only */
};
void mfa_metal_scratch_free(struct mfa_metal_scratch *scratch);

/* A run. */
struct mfa_metal_launch {
    const struct mfa_metal_device *device;
    const struct mfa_metal_torch *torch; /* NULL, unless the stream is MFA_STREAM_TORCH */
    struct mfa_metal_watched *watched;
    struct mfa_metal_scratch *scratch;
    struct mfa_metal_program *program;
    const mfa_problem *problem;
    const struct mfa_choice *choice;
    const mfa_buffers *buffers;
    void *stream; /* the argument of mfa_plan_run */
};
mfa_status mfa_metal_launch_run(const struct mfa_metal_launch *launch);

/* Runs layout_test: MFA_UNAVAILABLE if simdgroup matrices lie otherwise in this device's lanes than the kernels
 * assume. */
mfa_status mfa_metal_launch_test(const struct mfa_metal_device *device, struct mfa_metal_program *program);

#endif
