/* dbias = dS, summed over the dimensions along which its stride is 0. Each task owns one tile of it, PANEL
 * queries by block_kv keys, and recomputes dS for all that is summed into the tile: two products more than
 * backward alone, and no memory but the tile. */

/* dbias may be wanted in any element type; it is written once. */
static void store_bias(const struct mfa_cpu_call *call, const struct panel *panel, int64_t batch, int64_t head,
                       const struct keys *keys, const real *tile)
{
    const struct mfa_strides *s = &call->args.dbias;
    int64_t bytes = bytes_of(call->mask_dtype);
    int64_t rows = s->row ? panel->lanes : 1, columns = s->column ? keys->n : 1;
    const real unit = (real)(1 / call->dS_factor);
    for (int64_t i = 0; i < rows; i++) {
        char *to = (char *)row_at(call->dbias, bytes, s, batch, head, panel->row[i]);
        for (int64_t k = 0; k < columns; k++)
            set_element(to, call->mask_dtype, (keys->first + k) * s->column, tile[k * PANEL + i] * unit);
    }
}

/* Adds dS of one (batch, query head, panel, block of keys) to the tile. */
static void add_bias(const struct mfa_cpu_call *call, struct backward_scratch *s, const struct panel *panel,
                     const struct q_block *g, int64_t offset, struct keys *keys, real *tile)
{
    const struct mfa_args *a = &call->args;
    struct range r = band_range(panel, keys->first, keys->n, KEY_UNIT);
    if (r.from >= r.to)
        return;
    enum block_mask seen = panel_meets(call, s, panel, 0, keys, r);
    if (seen == BLOCK_EMPTY)
        return;
    real *S = K_PACK > 1 ? s->S : s->P, *dP = K_PACK > 1 ? s->dP : s->dS;
    struct part all = {r, 0, panel->vectors};
    panel_scores(call, s, panel, keys, all, S, dP, PANEL, seen == BLOCK_MASKED ? s->mask_tile : NULL, NULL);
    const real *L = q_block_L(call, g, offset), *D = q_block_D(call, g, offset);
    for (int64_t k = r.from; k < r.to; k++) {
        real *to = tile + (a->dbias.column ? k * PANEL : 0);
        for (int64_t i = 0; i < panel->vectors * LANES; i += LANES) {
            int64_t at = (k - r.from) * PANEL + i;
            vec P = probabilities(S + at, 1, vec_load(L + i));
            vec dS = score_gradients(P, vec_load(dP + at), vec_load(D + i), NULL);
            vec_store(to + i, vec_add(vec_load(to + i), dS));
        }
    }
}

/* The panels among [from, to) with a query to which the band shows a key of the block. */
static struct range panels_that_see(const struct mfa_args *a, const struct keys *keys, int64_t from, int64_t to)
{
    int64_t first = keys->first - a->upper, last = keys->first + keys->n - 1 - a->lower; /* queries */
    first = first < 0 ? 0 : first / PANEL;
    last = last < 0 ? -1 : last / PANEL;
    return (struct range){first > from ? first : from, last + 1 < to ? last + 1 : to};
}

static void dbias(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    gemm_begin();
    struct mfa_cpu_dbias_tiles t = mfa_cpu_dbias_tiles(call, PANEL);
    int64_t column = task % t.columns, row = task / t.columns % t.rows;
    int64_t head = task / t.columns / t.rows % t.heads, batch = task / t.columns / t.rows / t.heads;
    int64_t batches = a->dbias.batch ? 1 : a->batch, heads = a->dbias.head ? 1 : a->q_heads;
    int64_t rows = a->dbias.row ? 1 : mfa_cpu_ceil(a->q_len, PANEL);
    int64_t columns = a->dbias.column ? 1 : mfa_cpu_ceil(a->kv_len, call->block_kv);
    struct keys keys = keys_of(call, batch, 0, column); /* where the tile is, should nothing be summed into it */
    struct panel panel = {.lanes = 0};
    if (a->q_len > 0)
        panel_init(&panel, a, 0, row * PANEL, a->q_len - row * PANEL < PANEL ? a->q_len - row * PANEL : PANEL);
    fill(s.dbias, (int64_t)call->block_kv * PANEL, 0);

    for (int64_t b = batch; b < batch + batches; b++)
        for (int64_t h = head; h < head + heads; h++)
            for (int64_t j = column; j < column + columns; j++) {
                keys = keys_of(call, b, h / a->group, j);
                struct range see = panels_that_see(a, &keys, row, row + rows);
                for (int64_t p = see.from; p < see.to; p++) {
                    struct q_block g = q_block_of(call, b, h, p / call->panels);
                    panel_of_head(&panel, a, h, p * PANEL);
                    add_bias(call, &s, &panel, &g, p % call->panels * PANEL, &keys, s.dbias);
                }
            }
    if (!a->dbias.row)
        for (int64_t k = 0; k < call->block_kv; k++)
            for (int64_t i = 1; i < PANEL; i++)
                s.dbias[k * PANEL] += s.dbias[k * PANEL + i];
    store_bias(call, &panel, batch, head, &keys, s.dbias);
    gemm_end();
}
