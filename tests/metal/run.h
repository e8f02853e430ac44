/* Runs a problem's pass by the Metal kernels on the GPU of gpu.h, through the same code that a host uses. */
#ifndef TESTS_METAL_RUN_H
#define TESTS_METAL_RUN_H

#include "metal/tiles.h"
#include "support/operands.h"

struct metal_trace {
    int64_t visited[MFA_METAL_KERNELS]; /* blocks; -1: the kernel did not run */
    int dispatches, commands;
};

/* The tiles: those of a GPU family, with all or half of the threads; and the splits of each row's keys, 0: as the
 * backend chooses. */
struct metal_target {
    int family, halved, splits;
};

/* What the Metal backend chooses for a canonical problem, the workspace included. */
void metal_choose(struct metal_target target, const mfa_problem *problem, struct mfa_choice *choice);

/* As operands_run. `chunk`: threadgroups of a command, 0: as the list has it. A failure of the device is
 * MFA_DEVICE_FAILED, and mfa_last_error() has its message. */
mfa_status metal_run(struct operands *operands, struct metal_target target, int64_t chunk, struct metal_trace *trace);

/* Runs layout_test; 1 if the layout of matrices is that of fragment.h. */
int metal_run_layout_test(int family);

/* If set, replaces the text of a kernel's program. Both texts are from malloc; the callee frees the old one. */
extern char *(*metal_rewrite)(enum mfa_metal_kernel kernel, char *text);

/* The number of blocks that each kernel of the pass has to visit: those that neither the band, nor the mask, nor the
 * block map leaves empty. The operands have the lengths of the entries. */
void metal_expect(const struct inputs *inputs, const struct operands *operands, struct metal_target target,
                  int64_t expected[MFA_METAL_KERNELS]);

#endif
