/* The same as attention_decode for one or two rows of queries, where matrices of 8 rows would be mostly empty. Lanes
 * lie along the columns: COLUMN_LANES of them share a key, so a simdgroup has several keys at once, and K and V are
 * read where they lie. There is no barrier but at the end.
 *
 *     for each key of the lane's:
 *         S = scale * Q K^T, summed over its lanes; softcap, mask, band
 *         where S exceeds m by more than 8 in some lane: m' = max(m, S), alpha = exp2(m - m'), m = m'
 *             l = alpha * l, O = alpha * O
 *         P = exp2(S - m)
 *         l = l + P, dropout of P
 *         O = O + P V
 *     m, l, O of all keys of a simdgroup are merged, and then those of all simdgroups
 *     O = O / l, L = ln(2) * (m + log2(l))
 *
 * A call with more than one split cuts the range of keys: then m, l and O themselves are stored for attention_merge. */
#include <metal_stdlib>
#include "core/args.h"
#include "metal/kernels/contract.h"
using namespace metal;

#define WIDER_DIM (HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM)
#define KEYS_OF_SIMDGROUP (BLOCK_KV / KEY_GROUPS) /* of a block */
#define COLUMN_LANES (WIDER_DIM > 128 ? 32 : WIDER_DIM > 64 ? 16 : WIDER_DIM > 32 ? 8 : 4)

#include "metal/kernels/element.h"
#include "metal/kernels/fragment.h"
#include "metal/kernels/codes.h"
#include "metal/kernels/gemm.h"
#include "metal/kernels/grid.h"
#include "metal/kernels/sequence.h"
#include "metal/kernels/kv_source.h"
#include "metal/kernels/simdgroup.h"
#include "metal/kernels/score.h"
#include "metal/kernels/softmax.h"
#include "metal/kernels/sinks.h"
#include "metal/kernels/block_range.h"
#include "metal/kernels/dropout.h"

/* A lane has runs of four columns of a row: the first at 4 times its number among COLUMN_LANES, then RUN_STRIDE apart,
 * so that the lanes of a key read neighbours. */
#define RUN_STRIDE (4 * COLUMN_LANES)
#define D_RUNS ((HEAD_DIM + RUN_STRIDE - 1) / RUN_STRIDE)
#define E_RUNS ((VALUE_DIM + RUN_STRIDE - 1) / RUN_STRIDE)
#define KEYS_AT_ONCE (32 / COLUMN_LANES)

struct accumulator {
    softmax_state state[LANE_ROWS];
    float O[LANE_ROWS * E_RUNS * 4];
};

/* Row t of the tile at the cursor, in f32; all 0 past the end. */
template <int RUNS, int TYPE>
METAL_FUNC void load_vector(thread float *x, thread const row_source<TYPE> &source,
                            thread const tile_cursor<TYPE> &cursor, int t, int first)
{
    bool valid = t < cursor.rows;
    if (source.regular) {
        typename row_type<TYPE>::run run[RUNS];
        typename row_type<TYPE>::place from =
            move_place(cursor.base, cursor.offset + (t * int(source.row_stride) + unit_of<TYPE>(first)));
        UNROLL
        for (int n = 0; n < RUNS; n++) {
            int column = first + n * RUN_STRIDE;
            clear_run(run[n]);
            if (valid && column < source.columns)
                load_regular_run(run[n], source, move_place(from, unit_of<TYPE>(n * RUN_STRIDE)), cursor.row + t,
                                 column);
        }
        UNROLL
        for (int n = 0; n < RUNS; n++) {
            float4 numbers = run_numbers(run[n]);
            UNROLL
            for (int i = 0; i < 4; i++)
                x[n * 4 + i] = numbers[i];
        }
        return;
    }
    UNROLL
    for (int n = 0; n < RUNS; n++) {
        tile_element4 elements = load_four(source, row_of_tile(source, cursor, t), first + n * RUN_STRIDE, valid);
        UNROLL
        for (int i = 0; i < 4; i++)
            x[n * 4 + i] = widen(tile_element(elements[i]));
    }
}

/* Where the simdgroup's keys of a block lie, if that has to be looked up. */
#if defined(PAGED)
template <int TYPE> using key_places = paged_rows<TYPE, KEYS_OF_SIMDGROUP>;

template <int TYPE>
METAL_FUNC void find_keys(thread key_places<TYPE> &places, thread const kv_source<TYPE> &source,
                          thread const kv_cursor<TYPE> &cursor, thread const simdgroup_coord &sg)
{
    look_up_rows(places, source, cursor.key + sg.key_group * KEYS_OF_SIMDGROUP, sg.lane);
}

template <int RUNS, int TYPE>
METAL_FUNC void load_key(thread float *x, thread const kv_source<TYPE> &source, thread const kv_cursor<TYPE> &cursor,
                         thread const key_places<TYPE> &places, int t, int first)
{
    typename row_type<TYPE>::place row = place_of_row(places, source, t % KEYS_OF_SIMDGROUP);
    int rows = cursor.key + t < source.page.rows ? 1 : 0;
    load_vector<RUNS>(x, source.page, tile_cursor<TYPE>{row, 0, rows, 0, 0}, 0, first);
}
#else
template <int TYPE> struct key_places {
};

template <int TYPE>
METAL_FUNC void find_keys(thread key_places<TYPE> &, thread const kv_source<TYPE> &, thread const kv_cursor<TYPE> &,
                          thread const simdgroup_coord &)
{
}

template <int RUNS, int TYPE>
METAL_FUNC void load_key(thread float *x, thread const kv_source<TYPE> &source, thread const kv_cursor<TYPE> &cursor,
                         thread const key_places<TYPE> &, int t, int first)
{
    load_vector<RUNS>(x, source, cursor, t, first);
}
#endif

/* Updates m, l and O of the first rows for the scores of the lane's key, number `key` of the simdgroup's. */
METAL_FUNC void add_key(thread accumulator &acc, thread const float *S, thread const float *V,
                        thread const kept_rows &kept, int key, int rows)
{
    bool rescales = false;
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++)
        rescales = rescales || softmax_rescales(acc.state[r], S[r]);
    if (simd_any(rescales)) {
        UNROLL
        for (int r = 0; r < LANE_ROWS; r++) {
            float top = max(acc.state[r].m, S[r]), alpha = softmax_rescale(acc.state[r].m, top);
            acc.state[r] = softmax_state{top, acc.state[r].l * alpha};
            UNROLL
            for (int e = 0; e < E_RUNS * 4; e++)
                acc.O[r * E_RUNS * 4 + e] *= alpha;
        }
    }
    UNROLL
    for (int r = 0; r < LANE_ROWS && (r == 0 || rows > r); r++) {
        float P = fast::exp2(S[r] - acc.state[r].m);
        acc.state[r].l += P;
        P = kept_of(P, kept, r, key);
        UNROLL
        for (int e = 0; e < E_RUNS * 4; e++)
            acc.O[r * E_RUNS * 4 + e] = fma(P, V[e], acc.O[r * E_RUNS * 4 + e]);
    }
}

/* Computes m, l and O over the lane's keys; returns how many blocks of keys were visited. */
METAL_FUNC int attend(thread accumulator &acc, thread const q_block &q, device const storage *Q_base,
                      thread const kv_operands &kv, thread const score_operands &in, constant mfa_metal_call &call,
                      thread const simdgroup_coord &sg)
{
    kv_source<K_TYPE> K = k_source(kv, call, q.seq, q.kv_head);
    kv_source<V_TYPE> V = v_source(kv, call, q.seq, q.kv_head);
    int column = sg.lane % COLUMN_LANES * 4, visited = 0, rows = q.seq.q_len * int(call.pack_gqa) - q.first;
    int first_key = sg.key_group * KEYS_OF_SIMDGROUP + sg.lane / COLUMN_LANES;
    float Q[LANE_ROWS * D_RUNS * 4];
    mask_range bands[LANE_ROWS];
    map_walk map = map_walk_init();
    dropout dropped = dropout_of(in, call, q.seq);
    kept_ahead ahead = kept_ahead_init();
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        row_source<KV_SAME> source = q_source(Q_base, call, q.seq, q.own[r].head);
        tile_cursor<KV_SAME> own = tile_cursor_of<1>(source, q.own[r].i);
        load_vector<D_RUNS>(Q + r * D_RUNS * 4, source, own, 0, column);
        mask_range_of_query(bands[r], in, call, q.seq, q.own[r]);
        acc.state[r] = softmax_init();
        UNROLL
        for (int e = 0; e < E_RUNS * 4; e++)
            acc.O[r * E_RUNS * 4 + e] = 0.0f;
    }

    for (int first = q.kv_blocks.begin; first < q.kv_blocks.end; first += STRETCH_BLOCKS) {
        kv_cursor<K_TYPE> K_at = tile_cursor_of<BLOCK_KV>(K, first * BLOCK_KV);
        kv_cursor<V_TYPE> V_at = tile_cursor_of<BLOCK_KV>(V, first * BLOCK_KV);
        int end = stretch_end(first, q.kv_blocks.end);
        for (int block = first; block < end;
             block++, tile_cursor_advance<BLOCK_KV>(K_at), tile_cursor_advance<BLOCK_KV>(V_at)) {
            mask_range ranges[LANE_ROWS];
            if (!visit_kv_block(ranges, bands, map, block, q, in, call, sg.lane))
                continue;
            visited++;
            kept_rows kept;
            keep_rows(kept, ahead, dropped, call.args, q, block, sg);
            key_places<K_TYPE> K_places;
            key_places<V_TYPE> V_places;
            find_keys(K_places, K, K_at, sg);
            find_keys(V_places, V, V_at, sg);
            bool full = mask_ranges_are_full<LANE_ROWS>(ranges, BLOCK_KV);
            for (int t = first_key; t < first_key + KEYS_OF_SIMDGROUP; t += KEYS_AT_ONCE) {
                float k[D_RUNS * 4], v[E_RUNS * 4], S[LANE_ROWS];
                load_key<D_RUNS>(k, K, K_at, K_places, t, column);
                load_key<E_RUNS>(v, V, V_at, V_places, t, column);
                UNROLL
                for (int r = 0; r < LANE_ROWS; r++) {
                    S[r] = SCORE_MASKED;
                    if (r > 0 && r >= rows)
                        continue;
                    float product = 0.0f, dtanh;
                    UNROLL
                    for (int d = 0; d < D_RUNS * 4; d++)
                        product = fma(Q[r * D_RUNS * 4 + d], k[d], product);
                    UNROLL
                    for (int apart = 1; apart < COLUMN_LANES; apart *= 2)
                        product += simd_shuffle_xor(product, ushort(apart));
                    S[r] = score(product, t, ranges[r], call, dtanh);
                    if (!full)
                        S[r] = masked_score(S[r], t, ranges[r], call);
                }
                add_key(acc, S, v, kept, t - sg.key_group * KEYS_OF_SIMDGROUP, rows);
            }
        }
    }
    return visited;
}

/* Merges the sums of the keys that the simdgroup has at once: afterwards each lane has those of its columns. */
METAL_FUNC void merge_keys(thread accumulator &acc)
{
    UNROLL
    for (int apart = COLUMN_LANES; apart < 32; apart *= 2) {
        UNROLL
        for (int r = 0; r < LANE_ROWS; r++) {
            softmax_state own = acc.state[r];
            float m = max(own.m, simd_shuffle_xor(own.m, ushort(apart))), alpha = softmax_rescale(own.m, m);
            float l = own.l * alpha;
            acc.state[r] = softmax_state{m, l + simd_shuffle_xor(l, ushort(apart))};
            UNROLL
            for (int e = 0; e < E_RUNS * 4; e++) {
                float O = acc.O[r * E_RUNS * 4 + e] * alpha;
                acc.O[r * E_RUNS * 4 + e] = O + simd_shuffle_xor(O, ushort(apart));
            }
        }
    }
}

/* What a simdgroup has of a row, in threadgroup memory: m, l, and O of its columns, padded. */
#define SUM_STRIDE (2 + VALUE_DIM)
#define SUM_OF(key_group, row) (((key_group) * BLOCK_Q + (row)) * SUM_STRIDE)

METAL_FUNC void store_sums(thread const accumulator &acc, threadgroup float *sums, thread const simdgroup_coord &sg)
{
    int column = sg.lane % COLUMN_LANES * 4;
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        threadgroup float *to = sums + SUM_OF(sg.key_group, r);
        if (sg.lane == 0) {
            to[0] = acc.state[r].m;
            to[1] = acc.state[r].l;
        }
        UNROLL
        for (int e = 0; e < E_RUNS * 4; e++) {
            int at = column + e / 4 * RUN_STRIDE + e % 4;
            if (sg.lane < COLUMN_LANES && at < VALUE_DIM)
                to[2 + at] = acc.O[r * E_RUNS * 4 + e];
        }
    }
}

struct results {
    device out_storage *O, *O_low;
    device uint *L;
    device const float *sinks;
    device float *partials;
};

/* Merges the simdgroups' sums of a row, and stores the row or a split of it. The threads take its columns in turn. */
METAL_FUNC void merge_row(threadgroup const float *sums, thread const q_block &q, int r, int split,
                          constant mfa_metal_call &call, int thread_index, thread const results &out)
{
    constant mfa_args &args = call.args;
    query own = q.own[r];
    softmax_state all = softmax_init();
    for (int g = 0; g < KEY_GROUPS; g++)
        all.m = max(all.m, sums[SUM_OF(g, r)]);
    for (int g = 0; g < KEY_GROUPS; g++)
        all.l += softmax_rescale(sums[SUM_OF(g, r)], all.m) * sums[SUM_OF(g, r) + 1];
    softmax_state end = all;
    float inverse = softmax_end(end, out.sinks, args, q.seq, own.head);
    long row = packed_row_index(call, q.seq, q.kv_head, q.row[r]);
    device float *partial = out.partials + (row * call.splits + split) * (args.value_dim + 2);
    long O_row = q_offset(q.seq, args.o, own.head, own.i);
    for (int e = thread_index; e < int(args.value_dim); e += THREADS) {
        float O = 0.0f;
        for (int g = 0; g < KEY_GROUPS; g++)
            O += softmax_rescale(sums[SUM_OF(g, r)], all.m) * sums[SUM_OF(g, r) + 2 + e];
        if (call.splits > 1) {
            partial[2 + e] = O;
            continue;
        }
        out.O[O_row + e * args.o.column] = narrow_out(O * inverse);
        if (call.present >> MFA_METAL_BUFFER_O_LOW & 1)
            out.O_low[O_row + e * args.o.column] = narrow_rest(O * inverse);
    }
    if (thread_index == 0 && call.splits > 1) {
        partial[0] = all.m;
        partial[1] = all.l;
    } else if (thread_index == 0 && (call.present >> MFA_METAL_BUFFER_LSE & 1)) {
        out.L[q_offset(q.seq, args.lse, own.head, own.i)] = log_sum_exp(end.m, end.l);
    }
}

[[max_total_threads_per_threadgroup(THREADS)]] kernel void
attention_decode_vector(constant mfa_metal_call &call [[buffer(0)]] INDEX_BUFFERS,
                        device const storage *Q [[buffer(6)]] KV_BUFFERS, SCORE_BUFFERS,
                        device out_storage *O [[buffer(10)]], device uint *L [[buffer(11)]],
                        device out_storage *O_low [[buffer(18)]], device const float *sinks [[buffer(20)]],
                        device float *partials [[buffer(2)]],
#if defined(COUNT_TILES)
                        device uint *visited [[buffer(5)]],
#endif
                        uint group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]])
{
    THREADGROUP_ARRAY(float, sums, TILE_BYTES / sizeof(float));
    simdgroup_coord sg = simdgroup_coord_of(index, simdgroup, lane);
    grid_coord coord = threadgroup_coord(call, group);
    q_block q = q_block_of(call, INDEX_OPERANDS, coord, sg);
    if (!is_past_end(call, q)) {
        accumulator acc;
        int count = attend(acc, q, Q, KV_OPERANDS, SCORE_OPERANDS, call, sg);
#if defined(COUNT_TILES)
        if (index == 0)
            visited[call.first_group + group] = uint(count);
#else
        (void)count;
#endif
        merge_keys(acc);
        store_sums(acc, sums, sg);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int r = 0; r < LANE_ROWS; r++)
            if (q.own[r].valid)
                merge_row(sums, q, r, coord.column, call, int(index), results{O, O_low, L, sinks, partials});
    }
}
