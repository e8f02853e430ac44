/* gemm_dS: P = exp(S - L), S = factor * K Q^T + bias, and dS = P * (dP - D), dP = V dO^T, at once: the exponentials of
 * a tile stand between the multiply-adds of its dP. For panels of full width whose scores need nothing but a bias. */

struct dS_epilogue {
    real factor;
    const real *bias;  /* [key][PANEL], added to the scores; or NULL */
    const real *L, *D; /* [PANEL] */
    struct gradients to;
    struct prefetch_cursor *next; /* two, which tiles move on in turn; or NULL */
};

#if USE_AMX
#include "cpu/kernels/gemm/dS_amx.h"
#else
#include "cpu/kernels/gemm/dS_fma.h"
#endif
