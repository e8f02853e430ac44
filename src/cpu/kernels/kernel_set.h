/* The body of a kernel set, in terms of the vector API included before it (simd/). The file that includes it has
 * defined KERNEL_SET, the name in kernels.inc. */
#include <float.h>
#include <sched.h>

#include "core/philox.h"
#include "cpu/kernels/contract.h"
#include "cpu/kernels/tensor_rows.h"

#include "core/codes.h"
#include "cpu/kernels/codes.h"

#include "cpu/kernels/gemm/layout.h"
#include "cpu/kernels/gemm/prefetch.h"
#include "cpu/kernels/gemm/pack.h"
#include "cpu/kernels/gemm/unroll.h"
#include "cpu/kernels/gemm/gemm.h"
#include "cpu/kernels/gemm/int8.h"
#include "cpu/kernels/gemm/decode.h"
#include "cpu/kernels/gemm/decode_int16.h"

#include "cpu/kernels/attention/sequence.h"
#include "cpu/kernels/attention/panel.h"
#include "cpu/kernels/attention/block_range.h"
#include "cpu/kernels/attention/kv_source.h"
#include "cpu/kernels/attention/bias.h"
#include "cpu/kernels/attention/score.h"
#include "cpu/kernels/attention/dropout.h"
#include "cpu/kernels/attention/sinks.h"
#include "cpu/kernels/attention/softmax.h"
#include "cpu/kernels/attention/gradients.h"

#include "cpu/kernels/gemm/exp2.h"
#include "cpu/kernels/gemm/dS.h"

#include "cpu/kernels/attention/int8.h"
#include "cpu/kernels/attention/forward.h"
#include "cpu/kernels/attention/decode.h"
#include "cpu/kernels/attention/q_block.h"
#include "cpu/kernels/attention/backward.h"
#include "cpu/kernels/attention/decode_backward.h"
#include "cpu/kernels/attention/dbias.h"
#include "cpu/kernels/attention/dsinks.h"

const struct mfa_cpu_kernels KERNEL_SET = {
    .lanes = LANES,
    .panel = PANEL,
    .int8 = INT8_PRODUCTS,
    .forward = forward,
    .decode = decode,
    .merge = merge,
    .decode_rows = DECODE_ROWS,
    .decode_backward_rows = DECODE_BACKWARD_ROWS,
    .decode_keys = DECODE_KEYS,
    .backward_preprocess = backward_preprocess,
    .backward = backward,
    .decode_backward = decode_backward,
    .dbias = dbias,
    .dsinks = dsinks,
    .forward_scratch = forward_scratch,
    .decode_scratch = decode_scratch,
    .backward_scratch = backward_scratch,
    .decode_backward_scratch = decode_backward_scratch,
    .partial_bytes = partial_bytes,
};
