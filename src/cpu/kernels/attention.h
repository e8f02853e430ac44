/* The body of a kernel set, in terms of the vector vocabulary of the dialect included before it. The file
 * that includes it has defined KERNEL_SET, the name in kernels.inc. */
#include <float.h>
#include <sched.h>

#include "cpu/kernels/contract.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/terms.h"
#include "cpu/kernels/panel.h"
#include "cpu/kernels/mask.h"
#include "cpu/kernels/scores.h"
#include "cpu/kernels/each.h"
#if TILES
#include "cpu/kernels/tile_product.h"
#else
#include "cpu/kernels/product.h"
#endif
#include "cpu/kernels/softmax.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/few_product.h"
#include "cpu/kernels/few.h"
#include "cpu/kernels/gradients.h"
#include "cpu/kernels/backward.h"
#include "cpu/kernels/few_backward.h"
#include "cpu/kernels/bias.h"

const struct mfa_cpu_kernels KERNEL_SET = {
    .lanes = LANES,
    .panel = PANEL,
    .forward = forward,
    .few = few,
    .merge = merge,
    .few_rows = FEW_ROWS,
    .few_backward_rows = FEW_BACKWARD_ROWS,
    .few_keys = FEW_KEYS,
    .prepare = prepare,
    .backward = backward,
    .few_backward = few_backward,
    .bias = bias,
    .forward_scratch = forward_scratch,
    .few_scratch = few_scratch,
    .backward_scratch = backward_scratch,
    .few_backward_scratch = few_backward_scratch,
    .partial_bytes = partial_bytes,
};
