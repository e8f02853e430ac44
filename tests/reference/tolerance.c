/* The naive computation's error and the floor under it, made into a tolerance for each tensor. */
#include "reference/tolerance.h"

#include <math.h>
#include <stdlib.h>

#include "reference/element.h"
#include "reference/vectorize.h"

enum { LANES = 8 };

/* The floor is this multiple of a predicted error, which is a root mean square: rounding to u is off by 0.43 u in that
 * measure, and the largest of a million sums of such errors by about five times as much. In f64 the reference itself is
 * off by as much as the results under test. */
static double floor_factor(int32_t dtype)
{
    return dtype == MFA_F64 ? 3 : 2;
}

/* A query, and the keys in its band. */
struct position {
    int64_t b, h, i, first, end;
};

struct naive {
    const mfa_problem *problem;
    const mfa_buffers *buffers;
    struct reference_sequence seq;
    struct reference_view Q, K, V, mask, slopes, sinks, seed, map, dO, dL, dbias, dsinks;
    int backward;
    int32_t products;          /* the dtype to which P and dS are rounded where they enter a product */
    double unit, least_normal; /* one rounding of the working precision; its least normal number */
    double dbias_terms;        /* of which an element of dbias is the sum, at most */
    struct reference results;
    double *dbias_squares, *dsinks_squares;
    double O_off, L_off, dQ_off, dK_off, dV_off, dbias_off, dsinks_off; /* the errors of tolerance.h; without scale */
    double rounded_P_off;                                               /* what rounding P to bf16 does to O */
};

static double naive_unit(int32_t dtype)
{
    return element_ulp(dtype) / 2;
}

static double naive_mask(const struct naive *n, const struct position *at, int64_t j)
{
    return n->mask.values[at->b * n->mask.batch + at->h * n->mask.head + at->i * n->mask.row + j * n->mask.column];
}

/* What ALiBi adds to the score of key j; 0 without it. */
static double naive_alibi(const struct naive *n, const struct position *at, int64_t j)
{
    if (!n->problem->alibi)
        return 0;
    return reference_alibi(&n->seq, n->slopes.values[at->b * n->slopes.batch + at->h * n->slopes.head], at->i, j);
}

/* The query head's sink; -infinity without sinks. */
static double naive_sink(const struct naive *n, const struct position *at)
{
    return n->problem->sinks ? n->sinks.values[at->b * n->sinks.batch + at->h * n->sinks.head] : -INFINITY;
}

static double naive_dL(const struct naive *n, const struct position *at)
{
    return n->dL.values ? *reference_query(&n->seq, n->dL, at->h, at->i) : 0;
}

/* A P or dS of backward as kernels may have it: 0 where it would be subnormal. */
static double naive_normal(const struct naive *n, double x)
{
    return fabs(x) < n->least_normal ? 0 : x;
}

/* The error of a P that is normal in some kernels and 0 in others. */
static double naive_at_edge(const struct naive *n, double P)
{
    return fabs(P - n->least_normal) < 0.01 * n->least_normal ? P : 0;
}

/* `own` is this dS's error; beside it, all of the query's keys have P times `D_off` from D. Where dbias is
 * summed over keys the latter adds up instead of averaging out: the sum of all P is 1. */
static void naive_add_dbias(struct naive *n, const struct position *at, int64_t j, double dS, double own, double P,
                            double D_off)
{
    if (!n->results.dbias)
        return;
    const struct reference_view *view = &n->dbias;
    int64_t element = at->b * view->batch + at->h * view->head + at->i * view->row + j * view->column;
    double sum = n->results.dbias[element] + dS, rounded = n->unit * sum;
    n->results.dbias[element] = n->problem->dtype == MFA_F64 ? sum : (float)sum;
    n->dbias_squares[element] += own * own + (view->column ? P * P : P) * D_off * D_off + rounded * rounded;
    n->dbias_off = fmax(n->dbias_off, sqrt(n->dbias_squares[element]));
}

/* A query's part of dsink, -exp(sink - L) D, and its error: that of L counts as one of the exponent. */
static void naive_add_dsink(struct naive *n, const struct position *at, double L, double L_off, double D, double D_off)
{
    if (!n->results.dsinks || L == -INFINITY)
        return;
    const int64_t element = at->b * n->dsinks.batch + at->h * n->dsinks.head;
    const double sink = naive_sink(n, at), P = exp(sink - L);
    const double own = P * fabs(D) * (L_off + n->unit * (1 + fabs(sink))), sum = n->results.dsinks[element] - P * D;
    n->results.dsinks[element] = n->problem->dtype == MFA_F64 ? sum : (float)sum;
    n->dsinks_squares[element] += own * own + P * P * D_off * D_off + n->unit * sum * n->unit * sum;
    n->dsinks_off = fmax(n->dsinks_off, sqrt(n->dsinks_squares[element]));
}

static double largest(const double *values, int64_t count)
{
    double most = 0;
    for (int64_t at = 0; at < count; at++)
        if (isfinite(values[at]))
            most = fmax(most, fabs(values[at]));
    return most;
}

#define REAL float
#define NAIVE naive_float
#include "reference/naive.h"

#define REAL double
#define NAIVE naive_double
#include "reference/naive.h"

/* Twice naive's error, or `floor` and an ulp of the largest element. */
static double allow(const mfa_problem *p, enum reference_tensor tensor, const double *truth, const double *naive,
                    double floor)
{
    const int32_t dtype = reference_dtype(p, tensor);
    int64_t count = reference_count(p, tensor);
    double error = 0;
    if (!truth)
        return 0;
    for (int64_t at = 0; at < count; at++)
        if (isfinite(truth[at]))
            error = fmax(error, fabs(naive[at] - truth[at]));
    return fmax(2 * error, floor + fmax(element_ulp(dtype) * largest(truth, count), element_least(dtype)));
}

/* Of o + o_low: `floor` and the rounding of o_low, which may be subnormal. */
static double allow_low(const mfa_problem *p, const double *truth, double floor)
{
    const double ulp = element_ulp(p->dtype), least = element_least(p->dtype) / 2;
    return truth ? floor + ulp * ulp * largest(truth, reference_count(p, REFERENCE_O)) + least : 0;
}

void reference_tolerance(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *truth,
                         struct tolerance *tolerance)
{
    const mfa_problem *p = problem;
    struct naive n = {.problem = p, .buffers = buffers};
    n.products = reference_dtype(p, REFERENCE_O), n.unit = p->dtype == MFA_F64 ? 0x1p-53 : 0x1p-24;
    n.least_normal = p->dtype == MFA_F64 ? 0x1p-1022 : 0x1p-126;
    n.backward = truth->dQ || truth->dK || truth->dV || truth->dbias || truth->dsinks;
    struct {
        struct reference_view *view;
        enum reference_tensor tensor;
        int needed;
    } inputs[] = {{&n.Q, REFERENCE_Q, 1},
                  {&n.K, REFERENCE_K, 1},
                  {&n.V, REFERENCE_V, 1},
                  {&n.mask, REFERENCE_MASK, p->mask != MFA_MASK_NONE},
                  {&n.slopes, REFERENCE_SLOPES, p->alibi},
                  {&n.sinks, REFERENCE_SINKS, p->sinks},
                  {&n.seed, REFERENCE_SEED, p->dropout > 0},
                  {&n.map, REFERENCE_BLOCK_MAP, p->block_map_q > 0},
                  {&n.dO, REFERENCE_dO, n.backward},
                  {&n.dL, REFERENCE_dL, n.backward && buffers->dlse.base}};
    struct {
        double **values;
        enum reference_tensor tensor;
        int needed;
    } outputs[] = {{&n.results.O, REFERENCE_O, 1},
                   {&n.results.L, REFERENCE_L, 1},
                   {&n.results.dQ, REFERENCE_dQ, n.backward},
                   {&n.results.dK, REFERENCE_dK, n.backward},
                   {&n.results.dV, REFERENCE_dV, n.backward},
                   {&n.results.dbias, REFERENCE_DBIAS, truth->dbias != NULL},
                   {&n.dbias_squares, REFERENCE_DBIAS, truth->dbias != NULL},
                   {&n.results.dsinks, REFERENCE_DSINKS, truth->dsinks != NULL},
                   {&n.dsinks_squares, REFERENCE_DSINKS, truth->dsinks != NULL}};
    const size_t input_count = sizeof inputs / sizeof *inputs, output_count = sizeof outputs / sizeof *outputs;
    for (size_t at = 0; at < input_count; at++)
        if (inputs[at].needed)
            *inputs[at].view = reference_load(p, inputs[at].tensor, buffers);
    for (size_t at = 0; at < output_count; at++)
        if (outputs[at].needed)
            *outputs[at].values = reference_allocate(reference_count(p, outputs[at].tensor));
    if (truth->dbias) {
        const int64_t pairs = p->batch * p->q_heads * p->q_len * p->kv_len;
        n.dbias = reference_view(p, REFERENCE_DBIAS, n.results.dbias);
        n.dbias_terms = (double)pairs / (double)reference_count(p, REFERENCE_DBIAS);
    }
    if (truth->dsinks)
        n.dsinks = reference_view(p, REFERENCE_DSINKS, n.results.dsinks);

    reference_clear(p, buffers, &n.results);
    if (p->dtype == MFA_F64)
        naive_double(&n);
    else
        naive_float(&n);
    for (int64_t at = 0; at < reference_count(p, REFERENCE_DBIAS) && truth->dbias; at++)
        n.results.dbias[at] = element_round(p->mask_dtype, n.results.dbias[at]);

    double scale = fabs(p->scale);
    tolerance->O = allow(p, REFERENCE_O, truth->O, n.results.O, floor_factor(p->dtype) * n.O_off);
    tolerance->O_low = allow_low(p, truth->O, floor_factor(p->dtype) * n.O_off);
    tolerance->O_low_of_rounded_P = fmax(2 * n.rounded_P_off, tolerance->O_low);
    tolerance->O_of_rounded_P =
        allow(p, REFERENCE_O, truth->O, n.results.O, fmax(2 * n.rounded_P_off, floor_factor(p->dtype) * n.O_off));
    tolerance->L = allow(p, REFERENCE_L, truth->L, n.results.L, floor_factor(p->dtype) * n.L_off);
    tolerance->dQ = allow(p, REFERENCE_dQ, truth->dQ, n.results.dQ, floor_factor(p->dtype) * n.dQ_off * scale);
    tolerance->dK = allow(p, REFERENCE_dK, truth->dK, n.results.dK, floor_factor(p->dtype) * n.dK_off * scale);
    tolerance->dV = allow(p, REFERENCE_dV, truth->dV, n.results.dV, floor_factor(p->dtype) * n.dV_off);
    tolerance->dbias = allow(p, REFERENCE_DBIAS, truth->dbias, n.results.dbias, floor_factor(p->dtype) * n.dbias_off);
    tolerance->dsinks =
        allow(p, REFERENCE_DSINKS, truth->dsinks, n.results.dsinks, floor_factor(p->dtype) * n.dsinks_off);

    for (size_t at = 0; at < input_count; at++)
        free(inputs[at].view->values);
    for (size_t at = 0; at < output_count; at++)
        free(*outputs[at].values);
}

void reference_tolerance_of_rounded_P(const mfa_problem *problem, const mfa_buffers *buffers,
                                      const struct reference *truth, struct tolerance *tolerance)
{
    struct tolerance exact;
    mfa_problem same = *problem;
    same.out_type = MFA_OUT_SAME;
    reference_tolerance(&same, buffers, truth, tolerance);
    if (problem->out_type == MFA_OUT_SAME)
        return;
    reference_tolerance(problem, buffers, truth, &exact);
    tolerance->O_of_rounded_P = exact.O_of_rounded_P;
}
