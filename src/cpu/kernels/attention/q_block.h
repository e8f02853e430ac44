/* Blocks of queries in backward: their D and L, and dQ, which blocks of keys add to one after another. */

/* Queries [first, first + rows) of one query head, and the blocks of keys that the band lets them see. */
struct q_block {
    const struct mfa_cpu_sequence *seq;
    int64_t head, index, first, rows;
    struct bounds kv_blocks;
};

static struct q_block q_block_of(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq, int64_t head,
                                 int64_t index)
{
    const struct mfa_cpu_queries rows = mfa_cpu_unit_of_head(call, seq->q_len, (int64_t)call->panels * PANEL, index);
    struct q_block q = {.seq = seq, .head = head, .index = index, .first = rows.first, .rows = rows.end - rows.first};
    q.kv_blocks = blocks_of_queries(call, seq, q.first, q.rows);
    return q;
}

static inline struct queries q_block_queries(const struct q_block *q)
{
    return (struct queries){q->seq, q->head, q->first, q->rows};
}

static inline int64_t q_block_index(const struct q_block *q)
{
    return q->seq->before[CPU_Q_BLOCKS] + q->head * q->seq->of_head[CPU_Q_BLOCKS] + q->index;
}

/* Its first row among those of D and L. */
static inline int64_t q_block_first_row(const struct mfa_cpu_call *call, const struct q_block *q)
{
    return q->seq->before[CPU_Q_ROWS] + q->head * q->seq->of_head[CPU_Q_ROWS] + q->index * call->panels * PANEL;
}

/* Where D of row `row` of the block lies. */
static inline real *q_block_D(const struct mfa_cpu_call *call, const struct q_block *q, int64_t row)
{
    return (real *)call->D + q_block_first_row(call, q) + row;
}

/* L, in the unit of S; +inf if the query saw nothing, so that its P is 0. */
static inline real *q_block_L(const struct mfa_cpu_call *call, const struct q_block *q, int64_t row)
{
    return (real *)call->L + q_block_first_row(call, q) + row;
}

static inline const char *q_block_row(const struct q_block *q, const void *data, int64_t bytes,
                                      const struct mfa_strides *s, int64_t row)
{
    return q_row_of(q->seq, data, bytes, s, q->head, q->first + row);
}

/* --- dQ --------------------------------------------------------------------------------------- */

/* Whether dQ^T[d][row] is summed up. Decode sums up dQ[row][d] always. */
static inline int dQ_is_transposed(const struct mfa_cpu_call *call)
{
    return !call->decode && prefers_transposed_c(call->args.head_dim);
}

/* Where dQ of the block is summed up, or dQ^T. */
static struct matrix q_block_dQ(const struct mfa_cpu_call *call, const struct q_block *q)
{
    const struct mfa_args *a = &call->args;
    if (!call->dq_sums)
        return (struct matrix){(real *)q_block_row(q, call->dq, sizeof(real), &a->dq, 0), a->dq.row};
    int64_t d = padded(a->head_dim), first = q_block_first_row(call, q);
    return (struct matrix){(real *)call->dq_sums + first * d,
                           dQ_is_transposed(call) ? mfa_cpu_ceil(q->rows, PANEL) * PANEL : d};
}

static void clear_dQ(const struct mfa_cpu_call *call, const struct q_block *q)
{
    const int64_t d = padded(call->args.head_dim);
    const struct matrix dQ = q_block_dQ(call, q);
    if (dQ_is_transposed(call))
        fill(dQ.data, d * dQ.stride, 0);
    else
        for (int64_t i = 0; i < q->rows; i++)
            fill(dQ.data + i * dQ.stride, d, 0);
}

/* What sums of dS are multiplied by where they are written. */
static inline double dS_scale(const struct mfa_cpu_call *call)
{
    return call->scale / (call->dS_factor * call->kept);
}

/* dQ = scale * dQ, written to the caller's. rows: room for LANES rows, if dQ is transposed. */
static void dQ_epilogue(const struct mfa_cpu_call *call, const struct q_block *q, real *rows)
{
    const struct mfa_args *a = &call->args;
    const int64_t d = padded(a->head_dim), bytes = bytes_of(call->out_dtype);
    const struct matrix dQ = q_block_dQ(call, q);
    const double scale = dS_scale(call);
    for (int64_t i = 0; i < q->rows; i++) {
        real *row = dQ.data + i * dQ.stride;
        if (dQ_is_transposed(call)) {
            if (i % LANES == 0)
                transpose(dQ.data + i, dQ.stride, rows, d, d, LANES);
            row = rows + i % LANES * d;
        }
        scale_vectors(row, d, scale);
        if (call->dq_sums)
            store_row((char *)q_block_row(q, call->dq, bytes, &a->dq, i), call->out_dtype, a->dq.column, row,
                      a->head_dim);
    }
}

/* Of the blocks of keys of which some are seen, the first after (step 1) or the last before (step -1) a block; beyond
 * kv_blocks: there is none. Decode passes through all that the band lets its queries see. */
static int64_t next_kv_block(const struct mfa_cpu_call *call, const struct q_block *q, int64_t block, int64_t step)
{
    const struct range all = {0, call->block_kv};
    for (block += step; !call->decode && q->kv_blocks.first <= block && block <= q->kv_blocks.last; block += step) {
        const int64_t key = block * call->block_kv, rest = q->seq->kv_len - key;
        const struct range keys = {0, rest < all.to ? rest : all.to},
                           r = map_range(call, q_block_queries(q), key, keys, 1);
        if (r.from < r.to)
            break;
    }
    return block;
}

/* Blocks of keys that are seen add to a block's dQ from the last to the first. Waits for the turn of this one. */
static void dq_wait_order(_Atomic int64_t *semaphore, int64_t block)
{
    for (unsigned spins = 0; atomic_load_explicit(semaphore, memory_order_acquire) != block; spins++)
        if (spins % 1024 == 1023)
            sched_yield();
}

static inline void dq_pass_order(_Atomic int64_t *semaphore, int64_t next)
{
    atomic_store_explicit(semaphore, next, memory_order_release);
}

/* --- Preprocess: D and L ---------------------------------------------------------------------- */

/* D, or dO where dP is made of it: dS is what both are multiplied by. Operands that are multiplied as given are not for
 * scales that need it. */
static void scale_gradients(const struct mfa_cpu_call *call, real *x, int64_t n)
{
    if (!OPERANDS_AS_GIVEN && call->dS_factor != 1)
        scale_vectors(x, n, call->dS_factor);
}

/* rowsum(dO * O) of `rows` rows, at most LANES, from `row` on; zeros after them. O is o + o_low, if that is there. */
static vec sum_rows(const struct mfa_cpu_call *call, const struct q_block *q, int64_t row, int64_t rows, real *room)
{
    const struct mfa_args *a = &call->args;
    const int64_t dO_bytes = bytes_of(call->dtype), O_bytes = bytes_of(call->out_dtype), e = padded(a->value_dim);
    real *sums = room + 2 * e, *transposed = sums + LANES * LANES;
    fill(sums, LANES * LANES, 0);
    for (int64_t i = 0; i < rows; i++) {
        const char *dO_row = q_block_row(q, call->d_o, dO_bytes, &a->d_o, row + i);
        const real *dO = row_of_reals(room + e, dO_row, call->dtype, a->d_o.column, a->value_dim);
        const void *parts[] = {call->o, call->o_low};
        vec sum = vec_set1(0);
        for (int part = 0; part < 2 && parts[part]; part++) {
            const char *O_row = q_block_row(q, parts[part], O_bytes, &a->o, row + i);
            const real *O = row_of_reals(room, O_row, call->out_dtype, a->o.column, a->value_dim);
            for (int64_t d = 0; d < e; d += LANES)
                sum = vec_fma(vec_load(O + d), vec_load(dO + d), sum);
        }
        vec_store(sums + i * LANES, sum);
    }
    vec_transpose(sums, LANES, transposed, LANES);
    vec total = vec_load(transposed);
    for (int64_t i = 1; i < LANES; i++)
        total = vec_add(total, vec_load(transposed + i * LANES));
    return total;
}

/* D = rowsum(dO * O) - dL and L of one block; the block's semaphore; and dQ, if no block of keys will add to it. room
 * is for two rows of O and a square of LANES x LANES reals twice; dQ_rows as in dQ_epilogue. */
static void preprocess_q_block(const struct mfa_cpu_call *call, const struct q_block *q, real *room, real *dQ_rows)
{
    const struct mfa_args *a = &call->args;
    const int64_t lanes = mfa_cpu_ceil(q->rows, PANEL) * PANEL;
    real *D = q_block_D(call, q, 0), *L = q_block_L(call, q, 0);
    fill(D, lanes, 0);
    fill(L, lanes, (real)INFINITY);
    for (int64_t i = 0; i < q->rows; i += LANES)
        vec_store(D + i, sum_rows(call, q, i, q->rows - i < LANES ? q->rows - i : LANES, room));
    for (int64_t i = 0; i < q->rows; i++) {
        const real l = *(const real *)q_block_row(q, call->lse, sizeof(real), &a->lse, i);
        if (call->dlse)
            D[i] -= *(const real *)q_block_row(q, call->dlse, sizeof(real), &a->dlse, i);
        L[i] = l == -(real)INFINITY ? (real)INFINITY : (real)((double)l * S_UNIT);
    }
    scale_gradients(call, D, lanes);
    if (call->kept != 1)
        scale_vectors(D, lanes, call->kept); /* dP is that before it is divided by `kept` */
    quiet_nans(D, lanes);
    quiet_nans(L, lanes);
    const int64_t last = next_kv_block(call, q, q->kv_blocks.last + 1, -1);
    atomic_store_explicit(&call->dq_semaphore[q_block_index(q)], last, memory_order_relaxed);
    if (call->dq && last < q->kv_blocks.first) {
        clear_dQ(call, q);
        dQ_epilogue(call, q, dQ_rows);
    }
}
