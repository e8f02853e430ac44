/* dbias = dS, summed over the dimensions along which its stride is 0. Each task owns one tile of it, PANEL
 * queries by block_kv keys, and recomputes dS for all that is summed into the tile: two products more than
 * backward alone, and no memory but the tile. */

/* dbias may be wanted in any element type; it is written once. */
static void store_dbias(const struct mfa_cpu_call *call, const struct panel *panel, int64_t head,
                        const struct keys *keys, const real *tile)
{
    const struct mfa_strides *s = &call->args.dbias;
    const int64_t bytes = bytes_of(call->mask_dtype);
    const int64_t rows = s->row ? panel->lanes : 1, columns = s->column ? keys->n : 1;
    const real unit = (real)(1 / (call->dS_factor * call->kept));
    for (int64_t i = 0; i < rows; i++) {
        char *to = (char *)score_row_of(panel->seq, call->dbias, bytes, s, head, panel->row[i]);
        for (int64_t k = 0; k < columns; k++)
            set_element(to, call->mask_dtype, (keys->first + k) * s->column, tile[k * PANEL + i] * unit);
    }
}

/* Adds dS of one (batch, query head, panel, block of keys) to the tile, for keys r of the block. */
static void add_dbias(const struct mfa_cpu_call *call, const struct backward_scratch *s, struct backward_step *step,
                      struct range r)
{
    const struct panel *panel = step->panel;
    step->r = r;
    if (step_start(call, s, step) == BLOCK_EMPTY)
        return;
    const struct matrix S = {GRADIENTS_IN_PLACE ? s->P : s->S, PANEL}, dP = {GRADIENTS_IN_PLACE ? s->dS : s->dP, PANEL};
    panel_scores(call, s, step, (struct band_part){r, 0, panel->vectors}, S, dP, step->bias, NULL);
    struct dropout dropout;
    if (has_dropout(call))
        dropout_start(&dropout, call, panel);
    for (int v = 0; v < panel->vectors && has_dropout(call); v++)
        drop_rows(&dropout, v, step->keys->first + r.from, r.to - r.from, matrix_from(dP, 0, v * LANES));
    for (int64_t k = r.from; k < r.to; k++) {
        real *to = s->dbias + (call->args.dbias.column ? k * PANEL : 0);
        for (int64_t i = 0; i < panel->vectors * LANES; i += LANES) {
            const int64_t at = (k - r.from) * PANEL + i;
            vec P = probabilities(vec_load(S.data + at), 1, vec_load(step->L + i));
            vec dS = score_gradient(P, vec_load(dP.data + at), vec_load(step->D + i), NULL);
            vec_store(to + i, vec_add(vec_load(to + i), dS));
        }
    }
}

/* Panel number n of a query head, of which each block of queries has `panels`. 0: it has no queries. */
static int q_panel_init(struct panel *panel, const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                        int64_t head, int64_t n)
{
    const struct q_block q = q_block_of(call, seq, head, n / call->panels);
    const int64_t first = n % call->panels * PANEL;
    if (first < q.rows)
        panel_of_head(panel, seq, &call->args, head, q.first + first, q.first + q.rows);
    return first < q.rows;
}

/* Adds dS of panel number p of a query head to the tile, for a block of keys. */
static void add_panel_dbias(const struct mfa_cpu_call *call, const struct backward_scratch *s, struct keys *keys,
                            int64_t head, int64_t p)
{
    struct panel panel;
    if (!q_panel_init(&panel, call, keys->seq, head, p))
        return;
    const struct q_block q = q_block_of(call, keys->seq, head, p / call->panels);
    const int64_t offset = p % call->panels * PANEL;
    struct backward_step step = {
        .panel = &panel, .first = 0, .keys = keys, .L = q_block_L(call, &q, offset), .D = q_block_D(call, &q, offset)};
    struct range r, rest = band_range(&panel, keys->first, keys->n, KEY_UNIT);
    for (; r = map_range(call, panel_queries(&panel), keys->first, rest, KEY_UNIT), r.from < r.to; rest.from = r.to)
        add_dbias(call, s, &step, r);
}

static void dbias(void *data, int64_t task, int worker)
{
    const struct mfa_cpu_call *call = data;
    const struct mfa_args *a = &call->args;
    struct backward_scratch s;
    backward_arena(call, call->scratch + (uint64_t)worker * call->scratch_bytes, &s);
    struct mfa_cpu_dbias_tiles t = mfa_cpu_dbias_tiles(call, PANEL);
    int64_t column = task % t.columns, row = task / t.columns % t.rows;
    int64_t head = task / t.columns / t.rows % t.heads, batch = task / t.columns / t.rows / t.heads;
    int64_t batches = a->dbias.batch ? 1 : a->batch, heads = a->dbias.head ? 1 : a->q_heads;
    int64_t rows = a->dbias.row ? 1 : mfa_cpu_q_panels(call, a->q_len, PANEL);
    int64_t columns = a->dbias.column ? 1 : mfa_cpu_ceil(a->kv_len, call->block_kv);
    /* The tile is that of the longest sequence that there may be: what others do not have adds nothing to it. */
    const struct mfa_cpu_sequence longest = {.batch = batch, .q_len = a->q_len, .kv_len = a->kv_len};
    const struct keys tile_keys = keys_of(call, &longest, 0, column);
    struct panel tile_panel = {.seq = &longest, .lanes = 0};
    if (a->q_len > 0 && !q_panel_init(&tile_panel, call, &longest, 0, row))
        return;
    gemm_begin();
    fill(s.dbias, (int64_t)call->block_kv * PANEL, 0);

    for (int64_t b = batch; b < batch + batches; b++) {
        const struct mfa_cpu_sequence seq = mfa_cpu_sequence_of(call, b);
        for (int64_t h = head; h < head + heads; h++)
            for (int64_t j = column; j < column + columns && j < seq.of_head[CPU_KV_BLOCKS]; j++) {
                struct keys keys = keys_of(call, &seq, h / a->q_heads_per_kv, j);
                const struct range see =
                    panels_of_keys(call, &seq, keys.first, keys.n, (struct range){row, row + rows});
                for (int64_t p = see.from; p < see.to; p++)
                    add_panel_dbias(call, &s, &keys, h, p);
            }
    }
    if (!a->dbias.row)
        for (int64_t k = 0; k < call->block_kv; k++)
            for (int64_t i = 1; i < PANEL; i++)
                s.dbias[k * PANEL] += s.dbias[k * PANEL + i];
    store_dbias(call, &tile_panel, head, &tile_keys, s.dbias);
    gemm_end();
}
