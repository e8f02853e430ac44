/* The naive computation in a working precision: included by tolerance.c once for each REAL, with NAIVE the
 * prefix of its functions. With each result it sums up the squared errors from which the floor of the tolerance
 * is computed. Dot products run in LANES partial sums and sums over keys descend, so that they differ from the
 * reference's order (and the compiler may use vectors). */

#define JOIN_NAMES(a, b) a##_##b
#define JOIN(a, b) JOIN_NAMES(a, b)
#define LOCAL(name) JOIN(NAIVE, name)

struct LOCAL(head) {
    struct position at;
    REAL *K, *V, *dK, *dV;                                    /* of all keys */
    REAL *P, *dtanh, *Q, *dO, *O, *dQ;                        /* of query i */
    double Q_norm, *K_norm, *V_norm;                          /* of query i, and of each key */
    double *O_squares, *dQ_squares, *dK_squares, *dV_squares; /* of the errors of each element */
    double *rounding;                                         /* of O, by that of P */
    double *Z;                                                /* of dropout, of query i */
    double *off, L_off;                                       /* errors of S_ij, of L_i */
    REAL L;                                                   /* L_i */
};

static REAL LOCAL(dot)(const REAL *a, const REAL *b, int64_t length)
{
    REAL part[LANES] = {0}, sum = 0;
    int64_t at = 0;
    for (; at + LANES <= length; at += LANES)
        for (int lane = 0; lane < LANES; lane++)
            part[lane] += a[at + lane] * b[at + lane];
    for (; at < length; at++)
        sum += a[at] * b[at];
    for (int lane = 0; lane < LANES; lane++)
        sum += part[lane];
    return sum;
}

static double LOCAL(norm)(const REAL *row, int64_t length)
{
    return sqrt((double)LOCAL(dot)(row, row, length));
}

static void LOCAL(gather)(const double *row, int64_t stride, int64_t columns, REAL *out)
{
    for (int64_t c = 0; c < columns; c++)
        out[c] = (REAL)row[c * stride];
}

/* sum += factor * row. The error of a term is `off` times the row; the sum adds its own rounding. */
static void LOCAL(add)(REAL *sum, double *squares, REAL factor, double off, const REAL *row, int64_t length,
                       double unit)
{
    for (int64_t c = 0; c < length; c++) {
        sum[c] += factor * row[c];
        double added = off * (double)row[c], rounded = unit * (double)sum[c];
        squares[c] += added * added + rounded * rounded;
    }
}

/* The error of a score, from its dot product `sum`, its value `s` and what is added to it. The dot product is rounded
 * after each term: the partial sum there is a part of the whole, plus a random walk of the terms. */
static double LOCAL(score_off)(const struct naive *n, const struct LOCAL(head) *head, int64_t j, double sum, double s,
                               double mask, double alibi)
{
    double terms = (double)n->problem->head_dim, wander = head->Q_norm * head->K_norm[j];
    double sum_off = sqrt(terms * sum * sum / 3 + wander * wander / 6);
    return n->unit *
           (1 + fabs(n->problem->scale) * sum_off + fabs(s) + (isfinite(mask) ? fabs(mask) : 0) + fabs(alibi));
}

/* P and the softcap's derivative; returns L. */
static REAL LOCAL(softmax)(const struct naive *n, struct LOCAL(head) *head)
{
    const mfa_problem *p = n->problem;
    const REAL sink = (REAL)naive_sink(n, &head->at);
    REAL largest = sink, sum, *P = head->P;
    for (int64_t j = head->at.first; j < head->at.end; j++) {
        REAL z = LOCAL(dot)(head->Q, head->K + j * p->head_dim, p->head_dim), s = (REAL)p->scale * z;
        REAL tanh_x = p->softcap > 0 ? (REAL)tanh(s / (REAL)p->softcap) : 0;
        if (p->softcap > 0)
            s = (REAL)p->softcap * tanh_x;
        head->dtanh[j] = 1 - tanh_x * tanh_x;
        double mask = p->mask == MFA_MASK_NONE ? 1 : naive_mask(n, &head->at, j);
        const double alibi = naive_alibi(n, &head->at, j);
        head->off[j] = LOCAL(score_off)(n, head, j, (double)z, (double)s, mask, alibi);
        if (p->mask == MFA_MASK_ADDITIVE)
            s += (REAL)mask;
        else if (mask == 0)
            s = (REAL)-INFINITY;
        s += (REAL)alibi;
        if (!reference_is_mapped(p, &n->map, head->at.b, head->at.h, head->at.i, j))
            s = (REAL)-INFINITY;
        P[j] = s;
        largest = s > largest ? s : largest;
    }
    const double sink_off = largest == sink && isfinite(sink) ? n->unit * fabs((double)sink) : 0;
    sum = largest == (REAL)-INFINITY ? 0 : (REAL)exp(sink - largest);
    for (int64_t j = head->at.end - 1; j >= head->at.first; j--) {
        head->off[j] += sink_off;
        P[j] = largest == (REAL)-INFINITY ? 0 : (REAL)exp(P[j] - largest);
        sum += P[j];
    }
    for (int64_t j = head->at.first; j < head->at.end && sum > 0; j++)
        P[j] /= sum;
    return sum > 0 ? largest + (REAL)log(sum) : (REAL)-INFINITY;
}

/* The largest error of O_i when P is rounded to the dtype as multiples of `unit`. */
static double LOCAL(rounded_P_off)(const struct naive *n, struct LOCAL(head) *head, double unit)
{
    const mfa_problem *p = n->problem;
    for (int64_t c = 0; c < p->value_dim; c++)
        head->rounding[c] = 0;
    for (int64_t j = head->at.first; j < head->at.end; j++) {
        const double P = (double)head->P[j], rest = element_round(p->dtype, P / unit) * unit - P;
        for (int64_t c = 0; c < p->value_dim; c++)
            head->rounding[c] += rest * head->Z[j] * (double)head->V[j * p->value_dim + c];
    }
    return largest(head->rounding, p->value_dim);
}

static void LOCAL(forward_row)(struct naive *n, struct LOCAL(head) *head)
{
    const mfa_problem *p = n->problem;
    const int64_t at = reference_query_index(p, &n->seq, head->at.h, head->at.i);
    LOCAL(gather)(reference_query(&n->seq, n->Q, head->at.h, head->at.i), n->Q.column, p->head_dim, head->Q);
    head->Q_norm = LOCAL(norm)(head->Q, p->head_dim);
    REAL L = LOCAL(softmax)(n, head);
    const uint64_t seed = p->dropout > 0 ? (uint64_t)n->seed.values[head->at.b * n->seed.batch] : 0;
    reference_dropout(p, seed, head->at.b, head->at.h, head->at.i, head->at.first, head->at.end, head->Z);
    double L_squares = 0;
    for (int64_t c = 0; c < p->value_dim; c++)
        head->O[c] = 0, head->O_squares[c] = 0;
    for (int64_t j = head->at.end - 1; j >= head->at.first; j--) {
        REAL P = (REAL)element_round(n->products, head->P[j]);
        double P_off = head->off[j] * (double)head->P[j];
        const double Z = head->Z[j];
        LOCAL(add)(head->O, head->O_squares, (REAL)Z * P, Z * P_off, head->V + j * p->value_dim, p->value_dim, n->unit);
        L_squares += P_off * P_off;
    }
    n->O_off = fmax(n->O_off, sqrt(largest(head->O_squares, p->value_dim)));
    for (int quarter = 0; quarter < 4 && p->dtype == MFA_BF16; quarter++)
        n->rounded_P_off = fmax(n->rounded_P_off, LOCAL(rounded_P_off)(n, head, exp2(0.25 * quarter)));
    head->L_off = sqrt(L_squares) + n->unit * (isfinite(L) ? fabs((double)L) : 0);
    n->L_off = fmax(n->L_off, head->L_off);
    head->L = L;
    n->results.L[at] = element_round(reference_dtype(p, REFERENCE_L), L);
    for (int64_t c = 0; c < p->value_dim; c++)
        n->results.O[at * p->value_dim + c] = element_round(reference_dtype(p, REFERENCE_O), head->O[c]);
}

static void LOCAL(backward_row)(struct naive *n, struct LOCAL(head) *head)
{
    const mfa_problem *p = n->problem;
    const int64_t columns = p->head_dim, values = p->value_dim;
    const int64_t at = reference_query_index(p, &n->seq, head->at.h, head->at.i);
    REAL *dQ = head->dQ, *dO = head->dO;
    LOCAL(gather)(reference_query(&n->seq, n->dO, head->at.h, head->at.i), n->dO.column, values, dO);
    double dL = naive_dL(n, &head->at);
    REAL D = LOCAL(dot)(dO, head->O, values) - (REAL)dL;
    double dO_norm = LOCAL(norm)(dO, values), O_norm = LOCAL(norm)(head->O, values);
    double O_squares = 0; /* of what the error of O does to D */
    for (int64_t c = 0; c < values; c++)
        O_squares += (double)dO[c] * (double)dO[c] * head->O_squares[c];
    double D_off = n->unit * (dO_norm * O_norm + fabs(dL)) + sqrt(O_squares) +
                   naive_unit(reference_dtype(p, REFERENCE_O)) * dO_norm * O_norm / sqrt((double)values);
    naive_add_dsink(n, &head->at, (double)head->L, head->L_off, (double)D, D_off);
    const double keys = (double)(head->at.end - head->at.first);
    const double queries = (double)(n->seq.q_len * (p->q_heads / p->kv_heads));
    for (int64_t c = 0; c < columns; c++)
        dQ[c] = 0, head->dQ_squares[c] = 0;
    for (int64_t j = head->at.end - 1; j >= head->at.first; j--) {
        const double Z = head->Z[j];
        REAL dP = (REAL)Z * LOCAL(dot)(dO, head->V + j * values, values);
        const double all = head->P[j], at_edge = naive_at_edge(n, all);
        REAL normal = (REAL)naive_normal(n, all), dS = (REAL)naive_normal(n, normal * (dP - D));
        REAL P = (REAL)element_round(n->products, normal), dQK = (REAL)element_round(n->products, dS * head->dtanh[j]);

        double dtanh = head->dtanh[j], P_off = (head->off[j] + head->L_off) * all;
        double own_off = P_off * fabs((double)(dP - D)) + n->unit * all * Z * dO_norm * head->V_norm[j];
        double dtanh_off = p->softcap > 0 ? n->unit + 2 * dtanh * head->off[j] / p->softcap : 0;
        double dQK_off = (own_off + all * D_off) * dtanh + fabs((double)dS) * dtanh_off;
        const double edge = at_edge * fabs((double)(dP - D)), edge_QK = edge * dtanh;
        LOCAL(add)(dQ, head->dQ_squares, dQK, dQK_off + edge_QK * sqrt(keys), head->K + j * columns, columns, n->unit);
        LOCAL(add)(head->dK + j * columns, head->dK_squares + j * columns, dQK, dQK_off + edge_QK * sqrt(queries),
                   head->Q, columns, n->unit);
        LOCAL(add)(head->dV + j * values, head->dV_squares + j * values, (REAL)Z * P,
                   Z * (P_off + at_edge * sqrt(queries)), dO, values, n->unit);
        naive_add_dbias(n, &head->at, j, dS, own_off + edge * sqrt(n->dbias_terms), all, D_off);
    }
    n->dQ_off = fmax(n->dQ_off, sqrt(largest(head->dQ_squares, columns)));
    for (int64_t c = 0; c < columns; c++)
        n->results.dQ[at * columns + c] = element_round(reference_dtype(p, REFERENCE_dQ), (REAL)p->scale * dQ[c]);
}

/* All queries that read one KV head. */
static void LOCAL(rows)(struct naive *n, struct LOCAL(head) *head, int64_t b, int64_t kv_head)
{
    const mfa_problem *p = n->problem;
    const int64_t columns = p->head_dim, values = p->value_dim, group = p->q_heads / p->kv_heads;
    const int64_t kv_len = n->seq.kv_len;
    const int32_t of_K = reference_dtype(p, REFERENCE_dK), of_V = reference_dtype(p, REFERENCE_dV);
    for (int64_t j = 0; j < kv_len; j++) {
        LOCAL(gather)(reference_key(&n->seq, n->K, kv_head, j), n->K.column, columns, head->K + j * columns);
        LOCAL(gather)(reference_key(&n->seq, n->V, kv_head, j), n->V.column, values, head->V + j * values);
        head->V_norm[j] = LOCAL(norm)(head->V + j * values, values);
        head->K_norm[j] = LOCAL(norm)(head->K + j * columns, columns);
    }
    head->at.b = b;
    for (head->at.h = kv_head * group; head->at.h < (kv_head + 1) * group; head->at.h++)
        for (head->at.i = 0; head->at.i < n->seq.q_len; head->at.i++) {
            reference_band(&n->seq, head->at.i, &head->at.first, &head->at.end);
            LOCAL(forward_row)(n, head);
            if (n->backward)
                LOCAL(backward_row)(n, head);
        }
    n->dK_off = fmax(n->dK_off, sqrt(largest(head->dK_squares, kv_len * columns)));
    n->dV_off = fmax(n->dV_off, sqrt(largest(head->dV_squares, kv_len * values)));
    for (int64_t j = 0; j < kv_len && n->backward; j++) {
        const int64_t key = reference_key_index(p, &n->seq, kv_head, j);
        for (int64_t c = 0; c < columns; c++)
            n->results.dK[key * columns + c] = element_round(of_K, (REAL)p->scale * head->dK[j * columns + c]);
        for (int64_t c = 0; c < values; c++)
            n->results.dV[key * values + c] = element_round(of_V, head->dV[j * values + c]);
    }
}

VECTORIZE static void NAIVE(struct naive *n)
{
    const mfa_problem *p = n->problem;
    const int64_t keys = p->kv_len, columns = p->head_dim, values = p->value_dim;
    for (int64_t head = 0; head < p->batch * p->kv_heads; head++) {
        struct LOCAL(head) h = {0};
        struct {
            REAL **row;
            int64_t count;
        } reals[] = {{&h.K, keys * columns}, {&h.V, keys * values}, {&h.dK, keys * columns}, {&h.dV, keys * values},
                     {&h.P, keys},           {&h.dtanh, keys},      {&h.Q, columns},         {&h.dO, values},
                     {&h.O, values},         {&h.dQ, columns}};
        struct {
            double **row;
            int64_t count;
        } doubles[] = {{&h.K_norm, keys},
                       {&h.V_norm, keys},
                       {&h.off, keys},
                       {&h.O_squares, values},
                       {&h.dQ_squares, columns},
                       {&h.dK_squares, keys * columns},
                       {&h.dV_squares, keys * values},
                       {&h.rounding, values},
                       {&h.Z, keys}};
        const size_t count = sizeof reals / sizeof *reals, double_count = sizeof doubles / sizeof *doubles;
        for (size_t at = 0; at < count; at++)
            *reals[at].row = (REAL *)reference_allocate(reals[at].count);
        for (size_t at = 0; at < double_count; at++)
            *doubles[at].row = reference_allocate(doubles[at].count);
        n->seq = reference_sequence(p, n->buffers, head / p->kv_heads);
        LOCAL(rows)(n, &h, head / p->kv_heads, head % p->kv_heads);
        for (size_t at = 0; at < count; at++)
            free(*reals[at].row);
        for (size_t at = 0; at < double_count; at++)
            free(*doubles[at].row);
    }
}

#undef LOCAL
#undef JOIN
#undef JOIN_NAMES
#undef NAIVE
#undef REAL
