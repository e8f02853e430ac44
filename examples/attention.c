/* Attention in C, forward and backward, on random numbers; one gradient is compared with a difference quotient.
 *
 *     cc examples/attention.c -Iinclude -Lbuild/release -Wl,-rpath,$PWD/build/release -lmfa -lm -o attention
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "mfa.h"

enum { BATCH = 1, Q_HEADS = 8, KV_HEADS = 2, LENGTH = 300, HEAD_DIM = 64 };
enum { Q_SIZE = BATCH * Q_HEADS * LENGTH * HEAD_DIM, KV_SIZE = BATCH * KV_HEADS * LENGTH * HEAD_DIM };

static float q[Q_SIZE], k[KV_SIZE], v[KV_SIZE], o[Q_SIZE], lse[BATCH * Q_HEADS * LENGTH];
static float d_o[Q_SIZE], dq[Q_SIZE], dk[KV_SIZE], dv[KV_SIZE];

static void fill(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = 2 * (float)rand() / (float)RAND_MAX - 1;
}

/* Stops the program with the library's sentence if a call failed. */
static void check(mfa_status status)
{
    if (status == MFA_OK)
        return;
    fprintf(stderr, "%s: %s\n", mfa_status_name(status), mfa_last_error());
    exit(1);
}

/* The loss whose gradient to O is d_o. */
static double loss(mfa_context *context, const mfa_problem *problem, const mfa_buffers *forward)
{
    double sum = 0;
    check(mfa_attention(context, problem, forward, NULL));
    for (int i = 0; i < Q_SIZE; i++)
        sum += (double)o[i] * d_o[i];
    return sum;
}

int main(void)
{
    fill(q, Q_SIZE), fill(k, KV_SIZE), fill(v, KV_SIZE), fill(d_o, Q_SIZE);

    mfa_problem problem;
    mfa_problem_init(&problem, BATCH, Q_HEADS, KV_HEADS, LENGTH, LENGTH, HEAD_DIM, HEAD_DIM);
    problem.upper = 0; /* causal: no key after the query */

    mfa_context *context;
    check(mfa_context_create(NULL, &context));
    mfa_buffers forward = {.size = sizeof forward}, backward;
    forward.q.base = q, forward.k.base = k, forward.v.base = v;
    forward.o.base = o, forward.lse.base = lse;
    backward = forward; /* which reads all of these */
    backward.d_o.base = d_o, backward.dq.base = dq, backward.dk.base = dk, backward.dv.base = dv;

    /* A plan is made once, and may be run many times, on any buffers. */
    char line[256];
    mfa_plan *plan;
    check(mfa_plan_create(context, &problem, &plan));
    check(mfa_plan_describe(plan, line, sizeof line));
    check(mfa_plan_run(plan, &forward, NULL));
    mfa_plan_destroy(plan);
    printf("%s\nO of the last query begins with %g\n", line, o[Q_SIZE - HEAD_DIM]);

    /* mfa_attention() plans and runs in one call. */
    problem.pass = MFA_BACKWARD;
    check(mfa_attention(context, &problem, &backward, NULL));

    problem.pass = MFA_FORWARD;
    const int last = KV_SIZE - 1 - 10 * HEAD_DIM;
    const float saved = v[last], step = 0.125f; /* O is linear in V */
    v[last] = saved + step;
    const double above = loss(context, &problem, &forward);
    v[last] = saved - step;
    const double below = loss(context, &problem, &forward), quotient = (above - below) / (2 * step);
    printf("a number of dV is %g; the difference quotient is %g\n", dv[last], quotient);
    mfa_context_destroy(context);
    return fabs(dv[last] - quotient) > 1e-3 * (1 + fabs(quotient));
}
