/* Attention to keys that lie in two places, as on two devices (ring attention, context parallelism): each half of the
 * keys on its own, O and L of both merged by
 *
 *     L = log(exp(L_1) + exp(L_2)),   O = exp(L_1 - L) O_1 + exp(L_2 - L) O_2
 *
 * then backward over each half with the merged O and L: its dK and dV are final, and the two dQ are added. The results
 * are those of one call over all keys.
 *
 *     cc examples/merge_halves.c -Iinclude -Lbuild/release -Wl,-rpath,$PWD/build/release -lmfa -lm -o merge_halves
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "mfa.h"

enum { Q_HEADS = 8, KV_HEADS = 2, LENGTH = 300, HEAD_DIM = 64, HALVES = 2, HALF = LENGTH / HALVES };
enum { ROWS = Q_HEADS * LENGTH, Q_SIZE = ROWS * HEAD_DIM };
enum { KV_SIZE = KV_HEADS * LENGTH * HEAD_DIM, HALF_SIZE = KV_HEADS * HALF * HEAD_DIM };

/* (head, row, column). The halves of the keys are tensors of their own. */
static float q[Q_SIZE], d_o[Q_SIZE], k[KV_SIZE], v[KV_SIZE];
static float k_half[HALVES][HALF_SIZE], v_half[HALVES][HALF_SIZE];

/* Of one call, of each half, and of both together. */
static float o[Q_SIZE], lse[ROWS], dq[Q_SIZE], dk[KV_SIZE], dv[KV_SIZE];
static float o_half[HALVES][Q_SIZE], lse_half[HALVES][ROWS];
static float dq_half[HALVES][Q_SIZE], dk_half[HALVES][HALF_SIZE], dv_half[HALVES][HALF_SIZE];
static float o_merged[Q_SIZE], lse_merged[ROWS], dq_sum[Q_SIZE], dk_joined[KV_SIZE], dv_joined[KV_SIZE];

static void fill(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = 2 * (float)rand() / (float)RAND_MAX - 1;
}

static void check(mfa_status status)
{
    if (status == MFA_OK)
        return;
    fprintf(stderr, "%s: %s\n", mfa_status_name(status), mfa_last_error());
    exit(1);
}

/* Where number n of one half is among those of both. */
static int place(int half, int n)
{
    const int size = HALF * HEAD_DIM, head = n / size;
    return (head * HALVES + half) * size + n % size;
}

static void merge(void)
{
    for (int row = 0; row < ROWS; row++) {
        const float a = lse_half[0][row], b = lse_half[1][row], largest = a > b ? a : b;
        /* A query that sees no key of a half has L = -inf there, and its weight is exp(-inf) = 0. One that sees none
         * of both would need largest = 0 here; with a causal mask every query sees the first key. */
        const float merged = largest + logf(expf(a - largest) + expf(b - largest));
        const float weight[HALVES] = {expf(a - merged), expf(b - merged)};
        for (int n = row * HEAD_DIM; n < (row + 1) * HEAD_DIM; n++)
            o_merged[n] = weight[0] * o_half[0][n] + weight[1] * o_half[1][n];
        lse_merged[row] = merged;
    }
}

/* Compares `count` numbers; 1 if they agree. */
static int agree(const char *name, const float *a, const float *b, int count)
{
    float largest = 0;
    for (int n = 0; n < count; n++) {
        const float difference = fabsf(a[n] - b[n]);
        largest = difference > largest || isnan(difference) ? difference : largest;
    }
    printf("%-3s  the largest difference is %g\n", name, largest);
    return largest < 1e-4f;
}

int main(void)
{
    fill(q, Q_SIZE), fill(k, KV_SIZE), fill(v, KV_SIZE), fill(d_o, Q_SIZE);
    mfa_context *context;
    check(mfa_context_create(NULL, &context));

    /* One call over all keys, forward and backward, causal. */
    mfa_problem all;
    mfa_problem_init(&all, 1, Q_HEADS, KV_HEADS, LENGTH, LENGTH, HEAD_DIM, HEAD_DIM);
    all.upper = 0;
    mfa_buffers buffers = {.size = sizeof buffers};
    buffers.q.base = q, buffers.k.base = k, buffers.v.base = v, buffers.o.base = o, buffers.lse.base = lse;
    check(mfa_attention(context, &all, &buffers, NULL));
    all.pass = MFA_BACKWARD;
    buffers.d_o.base = d_o, buffers.dq.base = dq, buffers.dk.base = dk, buffers.dv.base = dv;
    check(mfa_attention(context, &all, &buffers, NULL));

    /* Each half. Its key j is key half * HALF + j of all, which query i sees if j - i <= -half * HALF. */
    mfa_problem problems[HALVES];
    mfa_buffers halves[HALVES];
    for (int half = 0; half < HALVES; half++) {
        for (int n = 0; n < HALF_SIZE; n++)
            k_half[half][n] = k[place(half, n)], v_half[half][n] = v[place(half, n)];
        mfa_problem_init(&problems[half], 1, Q_HEADS, KV_HEADS, LENGTH, HALF, HEAD_DIM, HEAD_DIM);
        problems[half].upper = -half * HALF;
        halves[half] = (mfa_buffers){.size = sizeof *halves};
        halves[half].q.base = q, halves[half].k.base = k_half[half], halves[half].v.base = v_half[half];
        halves[half].o.base = o_half[half], halves[half].lse.base = lse_half[half];
        check(mfa_attention(context, &problems[half], &halves[half], NULL));
    }
    merge();
    for (int half = 0; half < HALVES; half++) {
        problems[half].pass = MFA_BACKWARD;
        halves[half].o.base = o_merged, halves[half].lse.base = lse_merged, halves[half].d_o.base = d_o;
        halves[half].dq.base = dq_half[half];
        halves[half].dk.base = dk_half[half], halves[half].dv.base = dv_half[half];
        check(mfa_attention(context, &problems[half], &halves[half], NULL));
        for (int n = 0; n < Q_SIZE; n++)
            dq_sum[n] += dq_half[half][n];
        for (int n = 0; n < HALF_SIZE; n++)
            dk_joined[place(half, n)] = dk_half[half][n], dv_joined[place(half, n)] = dv_half[half][n];
    }
    mfa_context_destroy(context);

    printf("%d queries, and %d keys in two halves, beside one call over all keys\n", LENGTH, LENGTH);
    int right = agree("O", o, o_merged, Q_SIZE);
    right &= agree("L", lse, lse_merged, ROWS);
    right &= agree("dQ", dq, dq_sum, Q_SIZE);
    right &= agree("dK", dk, dk_joined, KV_SIZE);
    right &= agree("dV", dv, dv_joined, KV_SIZE);
    if (right)
        return 0;
    fprintf(stderr, "the halves and one call over all keys should agree to 1e-4\n");
    return 1;
}
