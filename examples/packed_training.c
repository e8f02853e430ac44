/* A training step, forward and backward, over three sequences of different length that lie one after another, without
 * padding; each query attends to the keys of its own sequence up to its own place. The results are those of one call
 * for each sequence.
 *
 *     cc examples/packed_training.c -Iinclude -Lbuild/release -Wl,-rpath,$PWD/build/release -lmfa -lm \
 *         -o packed_training
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mfa.h"

enum { SEQUENCES = 3, TOTAL = 700, Q_HEADS = 8, KV_HEADS = 2, HEAD_DIM = 64 };
enum { Q_ROW = Q_HEADS * HEAD_DIM, KV_ROW = KV_HEADS * HEAD_DIM };

/* Sequence b has the rows cu_seqlens[b] up to cu_seqlens[b + 1]. */
static int32_t cu_seqlens[SEQUENCES + 1] = {0, 37, 548, TOTAL};

/* (token, head, column), as a projection of the tokens leaves it; lse is (token, head). */
static float q[TOTAL][Q_ROW], k[TOTAL][KV_ROW], v[TOTAL][KV_ROW], d_o[TOTAL][Q_ROW];

static struct results {
    float o[TOTAL][Q_ROW], lse[TOTAL][Q_HEADS], dq[TOTAL][Q_ROW], dk[TOTAL][KV_ROW], dv[TOTAL][KV_ROW];
} packed, apart;

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

/* A causal problem of `batch` sequences of at most `length` tokens. */
static mfa_problem causal(int64_t batch, int64_t length)
{
    mfa_problem problem;
    mfa_problem_init(&problem, batch, Q_HEADS, KV_HEADS, length, length, HEAD_DIM, HEAD_DIM);
    problem.upper = 0; /* counted from the first token of each sequence */
    problem.q_layout = (mfa_layout){.head = HEAD_DIM, .row = Q_ROW, .column = 1};
    problem.k_layout = (mfa_layout){.head = HEAD_DIM, .row = KV_ROW, .column = 1};
    problem.lse_layout = (mfa_layout){.head = 1, .row = Q_HEADS};
    problem.o_layout = problem.d_o_layout = problem.dq_layout = problem.q_layout;
    problem.v_layout = problem.dk_layout = problem.dv_layout = problem.k_layout;
    return problem;
}

/* Runs both passes on the tensors from row `first` on; `starts` is cu_seqlens, or NULL for one sequence. */
static void forward_and_backward(mfa_context *context, mfa_problem problem, int first, int32_t *starts,
                                 struct results *to)
{
    mfa_buffers buffers = {.size = sizeof buffers};
    buffers.q.base = q[first], buffers.k.base = k[first], buffers.v.base = v[first];
    buffers.cu_seqlens_q.base = buffers.cu_seqlens_k.base = starts;
    buffers.o.base = to->o[first], buffers.lse.base = to->lse[first];
    char line[256];
    check(mfa_problem_print(&problem, line, sizeof line));
    printf("%s, and backward\n", line);
    check(mfa_attention(context, &problem, &buffers, NULL));

    problem.pass = MFA_BACKWARD; /* which reads all of these */
    buffers.d_o.base = d_o[first];
    buffers.dq.base = to->dq[first], buffers.dk.base = to->dk[first], buffers.dv.base = to->dv[first];
    check(mfa_attention(context, &problem, &buffers, NULL));
}

/* Compares `count` numbers; 1 if they agree. */
static int agree(const char *name, const void *x, const void *y, size_t count)
{
    const float *a = x, *b = y;
    float largest = 0;
    for (size_t n = 0; n < count; n++) {
        const float difference = fabsf(a[n] - b[n]);
        largest = difference > largest || isnan(difference) ? difference : largest;
    }
    if (memcmp(x, y, count * sizeof *a) == 0)
        printf("%-3s  bitwise the same\n", name);
    else
        printf("%-3s  the largest difference is %g\n", name, largest);
    return largest < 1e-4f;
}

int main(void)
{
    fill(q[0], TOTAL * Q_ROW), fill(k[0], TOTAL * KV_ROW), fill(v[0], TOTAL * KV_ROW), fill(d_o[0], TOTAL * Q_ROW);
    mfa_context *context;
    check(mfa_context_create(NULL, &context));

    /* A problem has the longest length and the sum of all; where each sequence begins is read when it runs, so that a
     * plan would serve any batch within these. */
    int longest = 0;
    for (int b = 0; b < SEQUENCES; b++) {
        const int length = cu_seqlens[b + 1] - cu_seqlens[b];
        longest = length > longest ? length : longest;
    }
    mfa_problem problem = causal(SEQUENCES, longest);
    problem.varlen_q = problem.varlen_kv = 1;
    problem.total_q = problem.total_kv = TOTAL;
    problem.cu_seqlens_q_layout = problem.cu_seqlens_k_layout = (mfa_layout){.batch = 1};
    forward_and_backward(context, problem, 0, cu_seqlens, &packed);

    for (int b = 0; b < SEQUENCES; b++) {
        problem = causal(1, cu_seqlens[b + 1] - cu_seqlens[b]);
        forward_and_backward(context, problem, cu_seqlens[b], NULL, &apart);
    }
    mfa_context_destroy(context);

    int right = agree("O", packed.o, apart.o, sizeof packed.o / sizeof(float));
    right &= agree("L", packed.lse, apart.lse, sizeof packed.lse / sizeof(float));
    right &= agree("dQ", packed.dq, apart.dq, sizeof packed.dq / sizeof(float));
    right &= agree("dK", packed.dk, apart.dk, sizeof packed.dk / sizeof(float));
    right &= agree("dV", packed.dv, apart.dv, sizeof packed.dv / sizeof(float));
    if (right)
        return 0;
    fprintf(stderr, "packed sequences and one call for each should agree to 1e-4\n");
    return 1;
}
