/* The reference, one row of S at a time:
 *
 *     S_j = scale * Q_i K_j, softcap, mask, ALiBi; hidden by the block map: -infinity
 *     P = softmax(S)      O_i = P V      L_i = log(sum(exp(S)))
 *     with a sink, L_i = log(exp(sink) + sum(exp(S))), P = exp(S - L_i), dsink -= exp(sink - L_i) D_i
 *     dP_j = dO_i V_j, D_i = sum_j P_j dP_j - dL_i, dS_j = P_j (dP_j - D_i)
 *     with dropout, Z_j P_j takes the place of P_j in O and dV, and Z_j dP_j that of dP_j, Z_j being 0 or 1 / (1 - p)
 *     dV_j += P_j dO_i      dbias_ij = dS_j      dQ_i = scale * dS K      dK_j += scale * dS_j Q_i
 *
 * where dS is taken through the softcap before dQ and dK. All inner loops run along memory. Sums along keys are made of
 * the sums of PART keys: in one plain sum of thousands of equal terms roundings go one way and add up to hundreds of u,
 * which is more than what the f64 kernels are off by. Other sums are plain ones, all are in ascending order. */
#include "reference/attention.h"

#include <math.h>
#include <stdlib.h>

#include "reference/vectorize.h"

enum { PART = 32 };

struct head { /* of one batch and KV head: keys and values, and sums for their gradients */
    double *K, *V, *K_transposed, *V_transposed, *dK, *dV;
    double *V_scale; /* sizes, with P_off */
};

struct row {
    double *S, *P, *Z, *dP, *dS, *dtanh; /* along keys; dtanh = dS after / dS before softcap */
    double *Q, *dO, *O, *dQ, *part;      /* along columns; part: of O or dQ */
    int64_t first, end;                  /* of the keys in the band; nothing else is touched */
    double L, sink;                      /* sink: -infinity without sinks */
    double dsink;                        /* what the row adds to it */
};

struct work {
    const mfa_problem *problem;
    const struct reference *results;
    struct reference_sequence seq;
    struct reference_view Q, K, V, mask, slopes, sinks, seed, map, dO, dL, dbias, dsinks;
    struct reference_view V_scale;
    double *P_off; /* reference_attention_int8; or NULL */
    int backward;
    struct head head;
    struct row row;
};

static void scores(struct work *w, int64_t b, int64_t h, int64_t i)
{
    const mfa_problem *p = w->problem;
    struct row *row = &w->row;
    for (int64_t j = row->first; j < row->end; j++)
        row->S[j] = 0;
    for (int64_t c = 0; c < p->head_dim; c++)
        for (int64_t j = row->first; j < row->end; j++)
            row->S[j] += row->Q[c] * w->head.K_transposed[c * w->seq.kv_len + j];
    for (int64_t j = row->first; j < row->end; j++) {
        double s = p->scale * row->S[j], tanh_x = 0;
        if (p->softcap > 0) {
            tanh_x = tanh(s / p->softcap);
            s = p->softcap * tanh_x;
        }
        row->dtanh[j] = 1 - tanh_x * tanh_x;
        if (p->mask != MFA_MASK_NONE) {
            double mask = w->mask.values[b * w->mask.batch + h * w->mask.head + i * w->mask.row + j * w->mask.column];
            if (p->mask == MFA_MASK_ADDITIVE)
                s += mask;
            else if (mask == 0)
                s = -INFINITY;
        }
        if (p->alibi)
            s += reference_alibi(&w->seq, w->slopes.values[b * w->slopes.batch + h * w->slopes.head], i, j);
        row->S[j] = reference_is_mapped(p, &w->map, b, h, i, j) ? s : -INFINITY;
    }
}

static int64_t end_of_part(const struct row *row, int64_t first)
{
    return first + PART < row->end ? first + PART : row->end;
}

static void forward_row(struct work *w)
{
    const mfa_problem *p = w->problem;
    struct row *row = &w->row;
    double largest = row->sink, sum;
    for (int64_t j = row->first; j < row->end; j++)
        largest = fmax(largest, row->S[j]);
    sum = largest == -INFINITY ? 0 : exp(row->sink - largest);
    for (int64_t j = row->first, end; j < row->end; j = end) {
        double part = 0;
        for (end = end_of_part(row, j); j < end; j++) {
            row->P[j] = largest == -INFINITY ? 0 : exp(row->S[j] - largest);
            part += row->P[j];
        }
        sum += part;
    }
    row->L = sum > 0 ? largest + log(sum) : -INFINITY;
    for (int64_t c = 0; c < p->value_dim; c++)
        row->O[c] = 0;
    for (int64_t j = row->first, end; j < row->end; j = end) {
        for (int64_t c = 0; c < p->value_dim; c++)
            row->part[c] = 0;
        for (end = end_of_part(row, j); j < end; j++) {
            if (sum > 0)
                row->P[j] /= sum;
            for (int64_t c = 0; c < p->value_dim; c++)
                row->part[c] += row->Z[j] * row->P[j] * w->head.V[j * p->value_dim + c];
        }
        for (int64_t c = 0; c < p->value_dim; c++)
            row->O[c] += row->part[c];
    }
}

/* What rounding P does at most to an element of O: P_j V_scale_j is off by 1 / 510 of the largest one, of each key that
 * is not dropped. */
static void add_P_off(struct work *w)
{
    const int64_t columns = w->problem->value_dim;
    const struct row *row = &w->row;
    double most = 0;
    for (int64_t j = row->first; j < row->end; j++)
        most = fmax(most, row->P[j] * w->head.V_scale[j]);
    for (int64_t c = 0; c < columns; c++) {
        double codes = 0;
        for (int64_t j = row->first; j < row->end; j++)
            if (row->P[j] > 0 && w->head.V_scale[j] > 0)
                codes += row->Z[j] * fabs(w->head.V[j * columns + c]) / w->head.V_scale[j];
        *w->P_off = fmax(*w->P_off, codes * most / 510);
    }
}

static void backward_row(struct work *w, double dL)
{
    const mfa_problem *p = w->problem;
    struct row *row = &w->row;
    struct head *head = &w->head;
    double D = -dL;
    for (int64_t j = row->first; j < row->end; j++)
        row->dP[j] = 0;
    for (int64_t c = 0; c < p->value_dim; c++)
        for (int64_t j = row->first; j < row->end; j++)
            row->dP[j] += row->dO[c] * head->V_transposed[c * w->seq.kv_len + j];
    for (int64_t j = row->first, end; j < row->end; j = end) {
        double part = 0;
        for (end = end_of_part(row, j); j < end; j++) {
            row->dP[j] *= row->Z[j];
            part += row->P[j] * row->dP[j];
        }
        D += part;
    }
    row->dsink = row->L == -INFINITY ? 0 : -exp(row->sink - row->L) * D;
    for (int64_t c = 0; c < p->head_dim; c++)
        row->dQ[c] = 0;
    for (int64_t j = row->first, end; j < row->end; j = end) {
        for (int64_t c = 0; c < p->head_dim; c++)
            row->part[c] = 0;
        for (end = end_of_part(row, j); j < end; j++) {
            row->dS[j] = row->P[j] * (row->dP[j] - D);
            double dQK = p->scale * row->dtanh[j] * row->dS[j];
            for (int64_t c = 0; c < p->head_dim; c++) {
                row->part[c] += dQK * head->K[j * p->head_dim + c];
                head->dK[j * p->head_dim + c] += dQK * row->Q[c];
            }
            for (int64_t c = 0; c < p->value_dim; c++)
                head->dV[j * p->value_dim + c] += row->Z[j] * row->P[j] * row->dO[c];
        }
        for (int64_t c = 0; c < p->head_dim; c++)
            row->dQ[c] += row->part[c];
    }
}

/* to[0], to[step] ... = a row. */
static void gather(const double *row, int64_t stride, int64_t columns, double *to, int64_t step)
{
    for (int64_t c = 0; c < columns; c++)
        to[c * step] = row[c * stride];
}

static void query_row(struct work *w, int64_t b, int64_t h, int64_t i)
{
    const mfa_problem *p = w->problem;
    const struct reference *results = w->results;
    struct row *row = &w->row;
    int64_t at = reference_query_index(p, &w->seq, h, i);
    reference_band(&w->seq, i, &row->first, &row->end);
    gather(reference_query(&w->seq, w->Q, h, i), w->Q.column, p->head_dim, row->Q, 1);
    row->sink = p->sinks ? w->sinks.values[b * w->sinks.batch + h * w->sinks.head] : -INFINITY;
    const uint64_t seed = p->dropout > 0 ? (uint64_t)w->seed.values[b * w->seed.batch] : 0;
    reference_dropout(p, seed, b, h, i, row->first, row->end, row->Z);
    scores(w, b, h, i);
    forward_row(w);
    if (w->P_off)
        add_P_off(w);
    for (int64_t c = 0; c < p->value_dim && results->O; c++)
        results->O[at * p->value_dim + c] = row->O[c];
    if (results->L)
        results->L[at] = row->L;
    if (!w->backward)
        return;

    gather(reference_query(&w->seq, w->dO, h, i), w->dO.column, p->value_dim, row->dO, 1);
    backward_row(w, w->dL.values ? *reference_query(&w->seq, w->dL, h, i) : 0);
    for (int64_t c = 0; c < p->head_dim && results->dQ; c++)
        results->dQ[at * p->head_dim + c] = row->dQ[c];
    if (results->dsinks)
        results->dsinks[b * w->dsinks.batch + h * w->dsinks.head] += row->dsink;
    if (results->dbias) {
        double *dbias = results->dbias + b * w->dbias.batch + h * w->dbias.head + i * w->dbias.row;
        for (int64_t j = row->first; j < row->end; j++)
            dbias[j * w->dbias.column] += row->dS[j];
    }
}

VECTORIZE static void kv_head(struct work *w, int64_t b, int64_t h)
{
    const mfa_problem *p = w->problem;
    struct head *head = &w->head;
    int64_t group = p->q_heads / p->kv_heads;
    const int64_t kv_len = w->seq.kv_len, columns = p->head_dim, values = p->value_dim;
    for (int64_t j = 0; j < kv_len; j++) {
        const double *K = reference_key(&w->seq, w->K, h, j), *V = reference_key(&w->seq, w->V, h, j);
        gather(K, w->K.column, columns, head->K + j * columns, 1);
        gather(K, w->K.column, columns, head->K_transposed + j, kv_len);
        gather(V, w->V.column, values, head->V + j * values, 1);
        gather(V, w->V.column, values, head->V_transposed + j, kv_len);
    }
    for (int64_t j = 0; j < kv_len && w->P_off; j++)
        head->V_scale[j] = w->V_scale.values ? fabs(*reference_key(&w->seq, w->V_scale, h, j)) : 1;
    for (int64_t at = 0; at < kv_len * columns; at++)
        head->dK[at] = 0;
    for (int64_t at = 0; at < kv_len * values; at++)
        head->dV[at] = 0;
    for (int64_t member = 0; member < group; member++)
        for (int64_t i = 0; i < w->seq.q_len; i++)
            query_row(w, b, h * group + member, i);
    const int64_t first = reference_key_index(p, &w->seq, h, 0);
    for (int64_t at = 0; at < kv_len * columns && w->results->dK; at++)
        w->results->dK[first * columns + at] = head->dK[at];
    for (int64_t at = 0; at < kv_len * values && w->results->dV; at++)
        w->results->dV[first * values + at] = head->dV[at];
}

/* Q as products of int8 have it, with the roundings of f32 by which the library makes it. */
static void round_queries(const mfa_problem *p, struct reference_view *Q)
{
    int64_t shape[4];
    reference_shape(p, REFERENCE_Q, shape);
    for (int64_t row = 0; row < shape[0] * shape[1] * shape[2]; row++) {
        double *at = Q->values + row * shape[3], largest = 0;
        for (int64_t c = 0; c < shape[3]; c++)
            largest = fmax(largest, fabs(at[c]));
        const int counts = largest >= 0x1p-100;
        const float inverse = counts ? (float)(127 / largest) : 0;
        for (int64_t c = 0; c < shape[3]; c++)
            at[c] = counts ? (rintf(fmaf((float)at[c], inverse, 128)) - 128) * (largest / 127) : 0;
    }
}

static void attend(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results,
                   double *P_off)
{
    const mfa_problem *p = problem;
    struct work w = {.problem = p, .results = results, .P_off = P_off};
    w.backward = results->dQ || results->dK || results->dV || results->dbias || results->dsinks;
    w.Q = reference_load(p, REFERENCE_Q, buffers);
    w.K = reference_load(p, REFERENCE_K, buffers);
    w.V = reference_load(p, REFERENCE_V, buffers);
    if (P_off)
        round_queries(p, &w.Q);
    if (P_off && buffers->v_scale.base)
        w.V_scale = reference_load(p, REFERENCE_V_SCALE, buffers);
    if (p->mask != MFA_MASK_NONE)
        w.mask = reference_load(p, REFERENCE_MASK, buffers);
    if (p->alibi)
        w.slopes = reference_load(p, REFERENCE_SLOPES, buffers);
    if (p->sinks)
        w.sinks = reference_load(p, REFERENCE_SINKS, buffers);
    if (p->dropout > 0)
        w.seed = reference_load(p, REFERENCE_SEED, buffers);
    if (p->block_map_q)
        w.map = reference_load(p, REFERENCE_BLOCK_MAP, buffers);
    if (w.backward)
        w.dO = reference_load(p, REFERENCE_dO, buffers);
    if (w.backward && buffers->dlse.base)
        w.dL = reference_load(p, REFERENCE_dL, buffers);
    if (results->dbias)
        w.dbias = reference_view(p, REFERENCE_DBIAS, results->dbias);
    if (results->dsinks)
        w.dsinks = reference_view(p, REFERENCE_DSINKS, results->dsinks);
    reference_clear(p, buffers, results);
    double **along_keys[] = {&w.row.S, &w.row.P, &w.row.Z, &w.row.dP, &w.row.dS, &w.row.dtanh};
    double **along_columns[] = {&w.row.Q, &w.row.dO, &w.row.O, &w.row.dQ, &w.row.part};
    double **of_head[] = {&w.head.K,  &w.head.V,  &w.head.K_transposed, &w.head.V_transposed,
                          &w.head.dK, &w.head.dV, &w.head.V_scale};
    int64_t widest = p->head_dim > p->value_dim ? p->head_dim : p->value_dim;
    for (size_t n = 0; n < sizeof along_keys / sizeof *along_keys; n++)
        *along_keys[n] = reference_allocate(p->kv_len);
    for (size_t n = 0; n < sizeof along_columns / sizeof *along_columns; n++)
        *along_columns[n] = reference_allocate(widest);
    for (size_t n = 0; n < sizeof of_head / sizeof *of_head; n++)
        *of_head[n] = reference_allocate(p->kv_len * widest);

    for (int64_t b = 0; b < p->batch; b++) {
        w.seq = reference_sequence(p, buffers, b);
        for (int64_t h = 0; h < p->kv_heads; h++)
            kv_head(&w, b, h);
    }

    for (size_t n = 0; n < sizeof along_keys / sizeof *along_keys; n++)
        free(*along_keys[n]);
    for (size_t n = 0; n < sizeof along_columns / sizeof *along_columns; n++)
        free(*along_columns[n]);
    for (size_t n = 0; n < sizeof of_head / sizeof *of_head; n++)
        free(*of_head[n]);
    struct reference_view *views[] = {&w.Q,    &w.K,   &w.V,  &w.mask, &w.slopes, &w.sinks,
                                      &w.seed, &w.map, &w.dO, &w.dL,   &w.V_scale};
    for (size_t n = 0; n < sizeof views / sizeof *views; n++)
        free(views[n]->values);
}

void reference_attention(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results)
{
    attend(problem, buffers, results, NULL);
}

void reference_attention_int8(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results,
                              double *P_off)
{
    *P_off = 0;
    attend(problem, buffers, results, P_off);
}
