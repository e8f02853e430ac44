/* Matrix products by fused multiply-adds, dot products of packs, or products of 2 x 2 blocks (BFMMLA):
 *
 *     C[r][v] (+)= sum over t < k of A[r][t] * B[t][v]          lanes along v
 *
 * A is read a pack at a time and broadcast: along its rows in S^T = K Q^T, dP^T = V dO^T, dV = P^T dO, dK = dS^T Q;
 * down its columns in O^T += V^T P^T and dQ += dS K. A register tile is R rows by V vectors of C; the best R for each V
 * is a constant of the instruction set (simd/): TILE_ROWS_3, TILE_ROWS_2, TILE_ROWS_1. BFMMLA reads two rows of A at a
 * time, and its sums become rows of C at the end of a tile. What is added to C is summed up
 * on its own first: the error of a sum grows with its length, and long sequences make long ones. */

#ifndef TILE_UNROLL
#define TILE_UNROLL
#define PART_UNROLL
#endif

#ifndef SHORT_K_PACKS
#define SHORT_K_PACKS 0
#endif

/* A left operand that is read K_STEP packs at a time: from one row, and from one step along k, to the next. With BFMMLA
 * a step has two rows, and `row` is half of what lies from two rows to the next two. */
struct strided_a {
    const packed *data;
    int64_t row, step;
};

static inline struct strided_a a_of_packed(const packed *A, int64_t stride)
{
    return (struct strided_a){A, stride, USE_MMLA ? 2 * K_STEP : 1};
}

static inline struct strided_a a_of_at(struct packed_at A)
{
    return (struct strided_a){A.data, K_STEP, K_STEP * A.stride};
}

/* Steps of k packs. */
static inline int64_t k_steps(int64_t k)
{
    return (k + K_STEP - 1) / K_STEP;
}

/* C = factor * A B; C += A B. */
enum gemm_mode { GEMM_STORE, GEMM_ADD };

/* What a tile does beside the product. */
struct gemm_extra {
    real factor;                    /* for GEMM_STORE of dot products; reals are multiplied after it */
    struct prefetch_cursor *cursor; /* moved on by a pack for each that is read of A; or NULL */
};

#define TILE gemm_tile_1x1
#define ROWS 1
#define VECTORS 1
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_1x2
#define ROWS 1
#define VECTORS 2
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_1x3
#define ROWS 1
#define VECTORS 3
#include "cpu/kernels/gemm/fma_tile.h"

#if USE_MMLA
#define TILE gemm_tile_2x1
#define ROWS 2
#define VECTORS 1
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_2x2
#define ROWS 2
#define VECTORS 2
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_2x3
#define ROWS 2
#define VECTORS 3
#include "cpu/kernels/gemm/fma_tile.h"
#endif

#define TILE gemm_tile_4x1
#define ROWS 4
#define VECTORS 1
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_4x2
#define ROWS 4
#define VECTORS 2
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_4x3
#define ROWS 4
#define VECTORS 3
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_tall_1
#define ROWS TILE_ROWS_1
#define VECTORS 1
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_tall_2
#define ROWS TILE_ROWS_2
#define VECTORS 2
#include "cpu/kernels/gemm/fma_tile.h"

#define TILE gemm_tile_tall_3
#define ROWS TILE_ROWS_3
#define VECTORS 3
#include "cpu/kernels/gemm/fma_tile.h"

/* All rows of C, some vectors wide: by tall tiles, then by tiles of 4 rows, with BFMMLA of 2, then by single rows. */
#define COLUMN gemm_column_1
#define TALL_ROWS TILE_ROWS_1
#define TALL_TILE gemm_tile_tall_1
#define TILE_4 gemm_tile_4x1
#define TILE_2 gemm_tile_2x1
#define TILE_1 gemm_tile_1x1
#include "cpu/kernels/gemm/fma_column.h"

#define COLUMN gemm_column_2
#define TALL_ROWS TILE_ROWS_2
#define TALL_TILE gemm_tile_tall_2
#define TILE_4 gemm_tile_4x2
#define TILE_2 gemm_tile_2x2
#define TILE_1 gemm_tile_1x2
#include "cpu/kernels/gemm/fma_column.h"

#define COLUMN gemm_column_3
#define TALL_ROWS TILE_ROWS_3
#define TALL_TILE gemm_tile_tall_3
#define TILE_4 gemm_tile_4x3
#define TILE_2 gemm_tile_2x3
#define TILE_1 gemm_tile_1x3
#include "cpu/kernels/gemm/fma_column.h"

/* C is rows x (vectors * LANES). */
static inline __attribute__((always_inline)) void gemm(int64_t rows, int vectors, struct strided_a A, struct packed_b B,
                                                       struct matrix C, int64_t k, enum gemm_mode mode,
                                                       struct gemm_extra extra)
{
    while (vectors > 0) {
        int width = vectors == 4 ? 2 : vectors < 3 ? vectors : 3;
        if (width == 3)
            gemm_column_3(rows, A, B, C, k, mode, extra);
        else if (width == 2)
            gemm_column_2(rows, A, B, C, k, mode, extra);
        else
            gemm_column_1(rows, A, B, C, k, mode, extra);
        vectors -= width, B = b_from(B, 0, width * LANES), C.data += width * LANES;
    }
}

/* C = factor * A B, A along its rows; A.next may be NULL. A factor of reals is hardly ever other than 1. */
static void gemm_nn(int64_t rows, int vectors, struct kv_block A, struct packed_b B, struct matrix C, int64_t k,
                    real factor)
{
    const struct strided_a a = a_of_packed(A.rows, A.stride);
    if (A.next)
        gemm(rows, vectors, a, B, C, k, GEMM_STORE, (struct gemm_extra){factor, A.next});
    else
        gemm(rows, vectors, a, B, C, k, GEMM_STORE, (struct gemm_extra){factor, NULL});
    for (int64_t r = 0; r < rows && K_PACK == 1 && factor != 1; r++)
        scale_vectors(C.data + r * C.stride, vectors * LANES, (double)factor);
}

/* C += A B, A along its rows. */
static void gemm_nn_acc(int64_t rows, int vectors, struct packed_a A, struct packed_b B, struct matrix C, int64_t k)
{
    gemm(rows, vectors, a_of_packed(A.data, A.stride), B, C, k, GEMM_ADD, (struct gemm_extra){1, NULL});
}

/* C += A^T B, A down its columns; A.next may be NULL. */
static void gemm_tn_acc(int64_t rows, int vectors, struct packed_at A, struct packed_b B, struct matrix C, int64_t k)
{
    const struct strided_a a = a_of_at(A);
    if (A.next)
        gemm(rows, vectors, a, B, C, k, GEMM_ADD, (struct gemm_extra){1, A.next});
    else
        gemm(rows, vectors, a, B, C, k, GEMM_ADD, (struct gemm_extra){1, NULL});
}
