/* K and V: the one place that knows where a row of them lies, how it becomes an operand, and what is read next. */

/* K or V of one KV head of a sequence. */
struct kv_source {
    const void *data;
    const struct mfa_strides *strides;
    int dtype;
    int64_t columns, kv_head;
    const struct mfa_cpu_sequence *seq;
    const char *block_table; /* of the sequence; NULL: no pages */
    int64_t table_stride, page_size;
    const float *scales; /* of codes, with their strides; NULL: 1 */
    const struct mfa_strides *scale_strides;
    int64_t group; /* columns that share one */
    int shrinks;   /* rows are multiplied by 2^-SHRINK_BITS */
};

static inline struct kv_source kv_source_of(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                                            int64_t kv_head, const void *data, const struct mfa_strides *strides,
                                            int dtype, int64_t columns)
{
    const struct mfa_args *a = &call->args;
    struct kv_source source = {
        .data = data, .strides = strides, .dtype = dtype, .columns = columns, .kv_head = kv_head, .seq = seq};
    if (call->features & CPU_PAGED) {
        source.block_table =
            (const char *)call->block_table + seq->batch * a->block_table.batch * (int64_t)sizeof(int32_t);
        source.table_stride = a->block_table.column * (int64_t)sizeof(int32_t);
        source.page_size = a->page_size;
    }
    return source;
}

static inline struct kv_source k_source(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                                        int64_t kv_head)
{
    const struct mfa_args *a = &call->args;
    struct kv_source source = kv_source_of(call, seq, kv_head, call->k, &a->k, call->k_dtype, a->head_dim);
    source.scales = call->k_scale, source.scale_strides = &a->k_scale;
    source.group = a->k_group ? a->k_group : a->head_dim;
    return source;
}

static inline struct kv_source v_source(const struct mfa_cpu_call *call, const struct mfa_cpu_sequence *seq,
                                        int64_t kv_head, int shrinks)
{
    const struct mfa_args *a = &call->args;
    struct kv_source source = kv_source_of(call, seq, kv_head, call->v, &a->v, call->v_dtype, a->value_dim);
    source.scales = call->v_scale, source.scale_strides = &a->v_scale;
    source.group = a->v_group ? a->v_group : a->value_dim;
    source.shrinks = shrinks;
    return source;
}

/* Where row `key` begins in a tensor with the rows of K or V, of elements of so many bytes. */
static inline const char *kv_row_in(const struct kv_source *source, const void *data, int64_t bytes,
                                    const struct mfa_strides *s, int64_t key)
{
    if (!source->block_table)
        return kv_row_of(source->seq, data, bytes, s, source->kv_head, key);
    key += source->seq->kv_row;
    const int32_t page =
        *(const int32_t *)(const void *)(source->block_table + key / source->page_size * source->table_stride);
    return (const char *)data +
           bytes * (page * s->batch + source->kv_head * s->head + key % source->page_size * s->row);
}

static inline const char *kv_row(const struct kv_source *source, int64_t key)
{
    return kv_row_in(source, source->data, bytes_of(source->dtype), source->strides, key);
}

/* The bytes of a row. */
static inline int64_t kv_row_bytes(const struct kv_source *source)
{
    return source->dtype >= CPU_INT4 && source->dtype <= CPU_NF4 ? source->columns / 2
                                                                 : source->columns * bytes_of(source->dtype);
}

/* How many of the n rows from `key` on lie one after another: up to the end of a page. */
static inline int64_t kv_run(const struct kv_source *source, int64_t key, int64_t n)
{
    if (!source->block_table)
        return n;
    const int64_t rest = source->page_size - (source->seq->kv_row + key) % source->page_size;
    return n < rest ? n : rest;
}

/* Rows of codes [key, key + n), which lie one after another, as reals. */
static void kv_copy_codes(const struct kv_source *source, int64_t key, int64_t n, packed *copy, int64_t stride)
{
#if K_PACK == 1
    static const float one = 1;
    const struct mfa_strides *s = source->strides, *of_scales = source->scale_strides;
    struct code_rows rows = {(const uint8_t *)kv_row(source, key),
                             source->dtype,
                             s->row,
                             s->column,
                             source->columns,
                             {&one, 0, source->group},
                             0};
    if (source->scales) {
        rows.scales.at = (const float *)(const void *)kv_row_in(source, source->scales, sizeof(float), of_scales, key);
        rows.scales.stride = of_scales->column, rows.scales_row = of_scales->row;
    }
    load_codes(copy, stride, rows, n);
#else
    (void)source, (void)key, (void)n, (void)copy, (void)stride; /* sets of bf16 pairs get no codes (program.c) */
#endif
}

/* Rows [key, key + n) as row-major packs, `stride` apart. */
static void kv_copy(const struct kv_source *source, int64_t key, int64_t n, packed *copy, int64_t stride)
{
    const struct mfa_strides *s = source->strides;
    const int64_t columns = source->columns, bytes = bytes_of(source->dtype);
    for (int64_t run; n > 0; key += run, n -= run, copy += run * stride) {
        const char *from = kv_row(source, key);
        run = kv_run(source, key, n);
        if (source->dtype > CPU_CODES)
            kv_copy_codes(source, key, run, copy, stride);
        else if (is_real(source->dtype) && s->row == 1 && s->column != 1)
            load_columns(copy, stride, (const real *)(const void *)from, s->column, run, columns);
        else
            for (int64_t r = 0; r < run; r++)
                load_packs(copy + r * stride, from + r * s->row * bytes, source->dtype, s->column, columns);
    }
}

/* Rows [key, key + n) as a left operand: the caller's own memory where it can be used as it lies, else a copy. */
static struct kv_block kv_load(const struct kv_source *source, int64_t key, int64_t n, int must_copy, packed *copy)
{
    const struct mfa_strides *s = source->strides;
    const int64_t columns = source->columns, stride = row_packs(columns);
    const char *from = kv_row(source, key);
    if (!must_copy && !source->shrinks && kv_run(source, key, n) == n &&
        is_packed_in_place(from, source->dtype, s, columns))
        return (struct kv_block){(const packed *)(const void *)from, s->row / PACK_ELEMENTS, NULL};
    kv_copy(source, key, n, copy, stride);
    if (source->shrinks)
        shrink_packs(copy, n * stride);
    return (struct kv_block){copy, stride, NULL};
}

/* Whether decode widens codes of these rows in registers: in whole vectors, each with one scale. */
static inline int widens_codes(const struct kv_source *source)
{
    const int64_t group = source->group < source->columns ? source->group : 0;
    return WIDENS_CODES && is_codes(source->dtype) && !source->shrinks && source->strides->column == 1 &&
           source->columns % LANES == 0 && group % LANES == 0;
}

/* Such rows from `key` on. */
static struct kv_rows kv_code_rows(const struct kv_source *source, int64_t key)
{
    static const float one = 1;
    struct kv_rows rows = {kv_row(source, key),
                           source->strides->row,
                           source->dtype,
                           &one,
                           0,
                           0,
                           source->group,
                           source->dtype == CPU_NF4 ? nf4_values : int4_values,
                           source->group >= source->columns};
    if (source->scales) {
        const struct mfa_strides *s = source->scale_strides;
        rows.scales = (const float *)(const void *)kv_row_in(source, source->scales, sizeof(float), s, key);
        rows.scale_step = s->row, rows.scale_column = s->column;
    }
    return rows;
}

/* Rows [key, key + n) for decode, read where they lie if they are whole vectors, else copied; those from n up to
 * `whole` are zeros. */
static struct kv_rows kv_load_rows(const struct kv_source *source, int64_t key, int64_t n, int64_t whole, int must_copy,
                                   packed *copy)
{
    const struct mfa_strides *s = source->strides;
    const int64_t columns = source->columns, stride = row_packs(columns), bytes = bytes_of(source->dtype);
    if (!must_copy && widens_codes(source) && n == whole && kv_run(source, key, n) == n)
        return kv_code_rows(source, key);
    if (!must_copy && !source->shrinks && source->dtype < CPU_CODES && s->column == 1 &&
        columns == interleaved_columns(columns) && n == whole && kv_run(source, key, n) == n)
        return (struct kv_rows){.rows = kv_row(source, key), .step = s->row * bytes, .dtype = source->dtype};
    kv_copy(source, key, n, copy, stride);
    fill(copy + n * stride, (whole - n) * stride, 0);
    if (source->shrinks)
        shrink_packs(copy, n * stride);
    return (struct kv_rows){.rows = (const char *)copy,
                            .step = stride * (int64_t)sizeof(packed),
                            .dtype = OPERANDS_AS_GIVEN ? source->dtype : CPU_REAL};
}

/* --- Prefetching ------------------------------------------------------------------------------ */

/* Rows from `key` on, one of their packs for each pack of A that is read. */
static struct prefetch_cursor kv_cursor(const struct kv_source *source, int64_t key)
{
    const int64_t each = bytes_of(source->dtype), bytes = kv_row_bytes(source);
    const char *at = kv_row(source, key);
    return (struct prefetch_cursor){at, at + bytes, bytes, source->strides->row * each - bytes, PACK_ELEMENTS * each};
}

/* A share of the n rows from `key` on, the one of number `part` of `parts`, a line or more for each of `keys` steps. */
static struct prefetch_cursor kv_cursor_share(const struct kv_source *source, int64_t key, int64_t n, int64_t part,
                                              int64_t parts, int64_t keys)
{
    struct prefetch_cursor cursor = kv_cursor(source, key + n * part / parts);
    int64_t each = mfa_cpu_ceil(mfa_cpu_ceil(n, parts) * cursor.bytes, keys);
    each = each < 64 ? 64 : each;
    cursor.bytes_per_pack = each < cursor.bytes ? each : cursor.bytes;
    return cursor;
}

/* Keys of a chunk, a part of a decode block: about KV_CHUNK_BYTES; or all, where tiles take packs from many rows in
 * turn. */
static int64_t kv_chunk_keys(const struct kv_source *source, int R)
{
    const int copies = source->dtype > CPU_CODES && !widens_codes(source);
    const int64_t each = copies ? (int64_t)sizeof(real) : bytes_of(source->dtype);
    int64_t n = DECODE_KEYS;
    while (decode_has_whole_vectors(R) && n > decode_key_unit(R) && n * source->columns * each > KV_CHUNK_BYTES)
        n /= 2;
    return n;
}

/* Decode's walk over a block of K, then of V, or the other way round. */
struct decode_walk {
    const struct kv_source *source, *after; /* which is read, and which after this block */
    int64_t key, block, then;               /* the block's first key and its keys; of `after`, the first key */
    int R;
    const struct int16_queries *int16; /* of K: the queries for products of integers; NULL: none */
    int int16_values;                  /* of V: whether its products may be of integers */
};

/* What is prefetched while keys [k, k + n) of the block are read: as many rows a chunk further on, and past the block
 * those of what is read after it. If nothing follows, a row that there is, again and again. Of pages, a line of a row
 * further on is fetched now: to translate the address of a page that was not used lately takes long. */
static struct prefetch_cursor decode_cursor(const struct decode_walk *w, int64_t k, int64_t n)
{
    k += kv_chunk_keys(w->source, w->R);
    const struct kv_source *next = k < w->block ? w->source : w->after;
    const int64_t from = k < w->block ? w->key + k : w->then + k - w->block;
    const int last = from + mfa_cpu_ceil(n * w->source->columns, next->columns) > next->seq->kv_len ||
                     next->strides->column != 1 || (next->dtype > CPU_CODES && !widens_codes(next));
    struct prefetch_cursor cursor = kv_cursor(next, last ? w->key : from);
    if (last)
        cursor.gap = -cursor.bytes;
    else if (next->block_table && from + DECODE_ACCUMULATORS < next->seq->kv_len)
        __builtin_prefetch(kv_row(next, from + DECODE_ACCUMULATORS), 0, 3);
    return cursor;
}

/* A panel's rows of a tensor of queries, evenly while n keys are multiplied with as many columns. */
static struct prefetch_cursor panel_cursor(const struct panel *panel, int64_t n, const void *data, int dtype,
                                           const struct mfa_strides *s, int64_t columns)
{
    const int64_t each = bytes_of(dtype), bytes = columns * each;
    const char *at = panel_row(panel, data, each, s, 0);
    const int64_t per_pack = mfa_cpu_ceil(panel->lanes * bytes, n * k_packs(columns));
    return (struct prefetch_cursor){at, at + bytes, bytes, s->row * each - bytes, per_pack};
}

/* A panel's visit of keys of a block, in the walk of a chunk. */
struct visit {
    int first_of_block, first_of_panel, last_of_panel;
    int writes_O;             /* after it, and does not only leave accumulators */
    int64_t panel, panels;    /* its number, and how many the chunk has */
    int64_t keys, next_block; /* how many; the first key of the next block, or -1: there is none */
};

/* What products with K and V prefetch in a visit: the next block, once for all panels of the chunk; else Q of the next
 * panel; and O of this panel, before it is written. With AMX only exponentials leave time for it, a line for each key:
 * each panel fetches a share of the next block, of K with the first half of the panels, of V with the others. */
static void visit_prefetch(const struct mfa_cpu_call *call, const struct panel *panels, struct visit visit,
                           const struct kv_source sources[2], struct prefetch_cursor next[2],
                           struct prefetch_cursor *by_product[2])
{
    const struct mfa_args *a = &call->args;
    const struct panel *panel = &panels[visit.panel];
    const int dense = a->k.column == 1 && a->v.column == 1 && !(call->features & CPU_PAGED) &&
                      call->k_dtype < CPU_CODES && call->v_dtype < CPU_CODES;
    by_product[0] = by_product[1] = NULL;
    if (!PREFETCH_BY_PACK) {
        const int64_t half = mfa_cpu_ceil(visit.panels, 2), rest = panel->seq->kv_len - visit.next_block;
        const int64_t n = rest < call->block_kv ? rest : call->block_kv;
        const int of_V = visit.panel >= half;
        if (visit.next_block < 0 || !dense)
            return;
        next[0] = kv_cursor_share(&sources[of_V], visit.next_block, n, visit.panel - (of_V ? half : 0),
                                  of_V ? visit.panels - half : half, visit.keys);
        by_product[0] = &next[0];
        return;
    }
    if (visit.first_of_block && visit.next_block >= 0 && dense) {
        next[0] = kv_cursor(&sources[0], visit.next_block);
        next[1] = kv_cursor(&sources[1], visit.next_block);
        by_product[0] = &next[0], by_product[1] = &next[1];
    } else if (visit.first_of_panel && visit.panel + 1 < visit.panels && a->q.column == 1) {
        next[0] = panel_cursor(panel + 1, visit.keys, call->q, call->dtype, &a->q, a->head_dim);
        by_product[0] = &next[0];
    }
    if (PREFETCH_O && visit.last_of_panel && visit.writes_O && a->o.column == 1) {
        next[1] = panel_cursor(panel, visit.keys, call->o, call->out_dtype, &a->o, a->value_dim);
        by_product[1] = &next[1];
    }
}
