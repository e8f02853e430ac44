/* gemm_exp2: P = exp(S - m), S = factor * K Q^T + bias, at once. The exponentials of one register tile stand between
 * the multiply-adds of the next, which leave units of the processor idle. For panels of full width whose scores need
 * nothing but a bias. */

struct exp2_epilogue {
    real factor;
    const real *bias; /* [key][PANEL], added to the scores; or NULL */
    const real *m;    /* [PANEL] */
    real *l;          /* [PANEL]: the sums of P are added to it */
    struct packed_b P;
};

/* The epilogue of keys from `key` on. */
static inline struct exp2_epilogue exp2_from(struct exp2_epilogue e, int64_t key)
{
    e.P = b_from(e.P, key, 0);
    e.bias = e.bias ? e.bias + key * PANEL : NULL;
    return e;
}

#if USE_AMX
#include "cpu/kernels/gemm/exp2_amx.h"
#else
#include "cpu/kernels/gemm/exp2_fma.h"
#endif
