/* The dispatches of a run: which kernels, over how many threadgroups, with which buffers. Making the list needs no GPU;
 * the host encodes it as it is, and so do the tests that execute kernels without a GPU. */
#ifndef MFA_METAL_DISPATCH_H
#define MFA_METAL_DISPATCH_H

#include <stdint.h>

#include "core/backend.h"
#include "metal/kernels/contract.h"
#include "metal/source.h"
#include "metal/tiles.h"
#include "mfa.h"

#define MFA_METAL_DISPATCHES 10 /* the most of one run */

/* Where the memory of one of the kernel's buffers is: an operand, or the workspace. */
struct mfa_metal_binding {
    int32_t buffer;  /* the kernel's index */
    int32_t operand; /* number in mfa_operands, whose mfa_buffer says where it begins; -1: the workspace */
    uint64_t offset; /* bytes from the begin of the workspace */
};

/* A kernel and its arguments. Dispatches run one after another: each sees what those before it have written. An operand
 * that a kernel does not use, or that has no elements, may have no base: then any buffer may be bound. */
struct mfa_metal_dispatch {
    enum mfa_metal_kernel kernel;
    int64_t groups; /* threadgroups, 1 or more */
    int64_t
        chunk; /* the most of them in one command, so that commands are short; call.first_group is where one begins */
    int32_t threads;            /* of a threadgroup */
    struct mfa_metal_call call; /* for buffer 0, with first_group = 0 */
    int32_t binding_count;
    struct mfa_metal_binding bindings[MFA_METAL_BUFFERS];
};

/* Fills in choice->shared, the bytes of the workspace; the rest of the choice has been made. */
void mfa_metal_dispatch_measure(const mfa_problem *problem, struct mfa_choice *choice);

/* Threads of a threadgroup of the kernel. */
int32_t mfa_metal_dispatch_threads(enum mfa_metal_kernel kernel, const struct mfa_key *key);

/* The dispatches of a canonical problem that is supported, with the choice made for it; of the buffers only whether
 * they are there and their offsets matter. Returns how many. */
int mfa_metal_dispatch_list(const mfa_problem *problem, const struct mfa_choice *choice, const mfa_buffers *buffers,
                            struct mfa_metal_dispatch list[MFA_METAL_DISPATCHES]);

#endif
