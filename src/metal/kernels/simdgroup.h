/* How the simdgroups of a threadgroup share its work, and what they exchange through threadgroup memory.
 *
 * The host defines the sizes of a block and how simdgroups share it:
 *     BLOCK_Q, BLOCK_KV    rows of queries and of keys
 *     HEAD_DIM, VALUE_DIM  columns, padded to whole fragments for each of SPLIT
 *     ROW_GROUPS           simdgroups along the rows that the threadgroup owns; each has 8 rows, or a multiple of 8
 *     SPLIT                simdgroups that share these rows; each takes a slice of the columns, so that its
 *                          registers hold it. Their partial sums of S are reduced through threadgroup memory
 *     KEY_GROUPS           simdgroups with the same rows and columns, and different keys of each tile (decode)
 *     SHARED_TILE          1: the two operands that are loaded as tiles share the memory of one tile; 0: they do not
 *     THREADS              32 for each of these simdgroups
 *     TILE_BYTES           of the tiles in threadgroup memory, or of the sums of attention_decode_vector
 *     EXCHANGE_BYTES       of the partial sums there */

#define D_SLICE (HEAD_DIM / SPLIT)
#define E_SLICE (VALUE_DIM / SPLIT)
#define D_FRAGMENTS (D_SLICE / 8)
#define E_FRAGMENTS (E_SLICE / 8)
#define D_STRIDE PAIR_STRIDE(HEAD_DIM)
#define E_STRIDE PAIR_STRIDE(VALUE_DIM)
#define SECOND_TILE(rows) (SHARED_TILE ? 0 : TILE_ROW(rows, HEAD_DIM)) /* where the second tile begins */

/* A simdgroup's part of the work, and the calling lane in it. */
struct simdgroup_coord {
    lane_coord at;
    int row_group, slice, key_group;
    int lane;
    uint thread_index; /* in the threadgroup */
};

METAL_FUNC simdgroup_coord simdgroup_coord_of(uint thread_index, uint simdgroup, uint lane)
{
    return simdgroup_coord{lane_coord_of(lane),
                           int(simdgroup / SPLIT % ROW_GROUPS),
                           int(simdgroup % SPLIT),
                           int(simdgroup / (SPLIT * ROW_GROUPS)),
                           int(lane),
                           thread_index};
}

/* The first of the lane's columns of a row of head_dim, or value_dim, elements of an accumulator. */
#define D_COLUMN(sg) ((sg).slice * D_SLICE + (sg).at.column)
#define E_COLUMN(sg) ((sg).slice * E_SLICE + (sg).at.column)

/* Where the simdgroup's slice of row `row` of a tile begins; `row` is even. */
#define D_TILE_SLICE(sg, row) (TILE_ROW(row, HEAD_DIM) + TILE_COLUMN((sg).slice * D_SLICE))
#define E_TILE_SLICE(sg, row) (TILE_ROW(row, VALUE_DIM) + TILE_COLUMN((sg).slice * E_SLICE))

/* The arrays in threadgroup memory that a kernel declares: one or two tiles, and the partial sums that simdgroups
 * exchange. */
struct threadgroup_memory {
    threadgroup tile_element *tiles;
    threadgroup float2 *exchange;
};

/* Where columns are split, S of a slice becomes S: each simdgroup stores its partial sums, and after a barrier reduces
 * those of all simdgroups that share its rows, in the order of the slices. SLOTS fragments of a slice lie one after
 * another, and then those of the next slice; exchange_slot is the lane's element in the first fragment of slice 0. */
template <int SLOTS>
METAL_FUNC threadgroup float2 *exchange_slot(threadgroup float2 *exchange, thread const simdgroup_coord &sg)
{
    return exchange + (sg.key_group * ROW_GROUPS + sg.row_group) * SPLIT * SLOTS * 32 + sg.lane;
}

template <int FRAGMENTS, int SLOTS>
METAL_FUNC void store_partial(thread const float2 *S, threadgroup float2 *slot, int slice)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++)
        slot[(slice * SLOTS + n) * 32] = S[n];
}

template <int FRAGMENTS, int SLOTS> METAL_FUNC void reduce_partials(thread float2 *S, threadgroup const float2 *slot)
{
    UNROLL
    for (int n = 0; n < FRAGMENTS; n++) {
        S[n] = slot[n * 32];
        for (int slice = 1; slice < SPLIT; slice++)
            S[n] += slot[(slice * SLOTS + n) * 32];
    }
}

/* The same for S and dP, which the backward pass exchanges together. */
template <int FRAGMENTS>
METAL_FUNC void store_partial_pair(thread const float2 *S, thread const float2 *dP, threadgroup float2 *exchange,
                                   thread const simdgroup_coord &sg)
{
    threadgroup float2 *slot = exchange_slot<2 * FRAGMENTS>(exchange, sg);
    store_partial<FRAGMENTS, 2 * FRAGMENTS>(S, slot, sg.slice);
    store_partial<FRAGMENTS, 2 * FRAGMENTS>(dP, slot + FRAGMENTS * 32, sg.slice);
}

template <int FRAGMENTS>
METAL_FUNC void reduce_partial_pair(thread float2 *S, thread float2 *dP, threadgroup float2 *exchange,
                                    thread const simdgroup_coord &sg)
{
    threadgroup float2 *slot = exchange_slot<2 * FRAGMENTS>(exchange, sg);
    reduce_partials<FRAGMENTS, 2 * FRAGMENTS>(S, slot);
    reduce_partials<FRAGMENTS, 2 * FRAGMENTS>(dP, slot + FRAGMENTS * 32);
}
