/* Dropout: which P are kept. Those that are dropped become 0; the others are multiplied by keep_scale at the end, with
 * O (softmax_end) and dV, and in dP at once. Without dropout, what is here is empty.
 *
 * A counter of the random numbers (core/philox.h) has those of a query and 8 keys, which are a row of a fragment, or a
 * column where keys are rows. Lanes that share it compute the counters of several fragments, one each, and exchange
 * single bits: a lane has one counter for each 8 of its elements. */

#if defined(DROPOUT)
#include "core/philox.h"

struct dropout {
    uint low, high; /* words of the seed */
    uint batch;
};

METAL_FUNC dropout dropout_of(thread const score_operands &in, constant mfa_metal_call &call,
                              thread const sequence &seq)
{
    device const uint *words = in.seed + 2 * (seq.batch * call.args.seed.batch);
    return dropout{words[0], words[1], uint(seq.batch)};
}

/* Which of keys 8 * group to 8 * group + 7 a query keeps, a bit each. */
METAL_FUNC uint kept_keys(thread const dropout &drop, constant mfa_args &args, int head, int i, int group)
{
    uint below = uint(args.drop_below);
    struct mfa_philox counter = {{uint(group), uint(i), uint(head), drop.batch}};
    struct mfa_philox random = mfa_philox(counter, drop.low, drop.high);
    uint kept = 0;
    UNROLL
    for (int n = 0; n < MFA_PHILOX_KEYS; n++) {
        uint number = n % 2 == 0 ? random.x[n / 2] & 0xffffu : random.x[n / 2] >> 16;
        kept |= number >= below ? 1u << n : 0u;
    }
    return kept;
}

/* A lane's elements of ROWS rows of FRAGMENTS fragments: bit KEPT_BIT(f, e) of bits[f / 4] says whether element e of
 * fragment f is kept. */
template <int ROWS, int FRAGMENTS> struct kept_tile {
    uint bits[(ROWS * FRAGMENTS + 3) / 4];
};
#if defined(KEYS_ARE_ROWS)
#define KEPT_BIT(f, e) (8 * ((f) % 4) + 4 * (e))
#else
#define KEPT_BIT(f, e) (8 * ((f) % 4) + (e))
#endif

template <int ROWS, int FRAGMENTS> METAL_FUNC bool is_kept(thread const kept_tile<ROWS, FRAGMENTS> &kept, int f, int e)
{
    return (kept.bits[f / 4] & 1u << KEPT_BIT(f, e)) != 0;
}

#if defined(KEYS_ARE_ROWS)
/* For queries from `first` on of a head, and the 8 keys of the simdgroup from `first_key` on. The 8 lanes of a column
 * share the counters of two queries of each fragment: the lane of row 4 * e + n has that of element e of fragment n,
 * and needs from each the bit of its own key. */
template <int FRAGMENTS>
METAL_FUNC void keep_queries(thread kept_tile<1, FRAGMENTS> &kept, thread const dropout &drop, constant mfa_args &args,
                             int head, int first, int first_key, lane_coord at)
{
    static_assert(FRAGMENTS == 1 || FRAGMENTS == 2 || FRAGMENTS == 4, "8 lanes have the counters of 4 fragments");
    int e = at.row / 4, n = at.row % FRAGMENTS, own_key = at.row % 4;
    uint own = kept_keys(drop, args, head, first + 8 * n + at.column + e, first_key / 8);
    uint other = simd_shuffle_xor(own, ushort(16));
    uint e0 = (e == 0 ? own : other) >> (4 * e), e1 = (e == 0 ? other : own) >> (4 * e);
    uint bits = ((e0 & 0xfu) | (e1 & 0xfu) << 4) << (8 * n);
    if (FRAGMENTS > 1)
        bits |= simd_shuffle_xor(bits, ushort(2));
    if (FRAGMENTS > 2)
        bits |= simd_shuffle_xor(bits, ushort(4));
    kept.bits[0] = bits >> own_key;
}
#else
/* For the lane's rows of queries and the keys from `first` on, a multiple of 8. Of every four fragments, or of all if
 * there are fewer, each of the four lanes of a row has the counter of one. */
template <int ROWS, int FRAGMENTS>
METAL_FUNC void keep_keys(thread kept_tile<ROWS, FRAGMENTS> &kept, thread const dropout &drop, constant mfa_args &args,
                          thread const query *own, int first, lane_coord at)
{
    constexpr int COUNT = ROWS * FRAGMENTS, SHARED = 1 + (COUNT > 1) + 2 * (COUNT > 3);
    static_assert(4 % SHARED == 0 && COUNT % SHARED == 0 && (COUNT <= 4 || FRAGMENTS % 4 == 0),
                  "lanes share the counters of 1, 2 or 4 fragments");
    int share = at.column / 2 % SHARED;
    UNROLL
    for (int f = 0; f < COUNT; f += SHARED) {
        int head = own[f / FRAGMENTS].head, i = own[f / FRAGMENTS].i;
        UNROLL
        for (int r = 1; r < SHARED / FRAGMENTS; r++) { /* the counters are those of several rows */
            head = share / FRAGMENTS == r ? own[r].head : head;
            i = share / FRAGMENTS == r ? own[r].i : i;
        }
        uint bits = kept_keys(drop, args, head, i, first / 8 + (f + share) % FRAGMENTS) << (8 * share);
        if (SHARED > 1)
            bits |= simd_shuffle_xor(bits, ushort(1));
        if (SHARED > 2)
            bits |= simd_shuffle_xor(bits, ushort(8));
        kept.bits[f / 4] = bits >> at.column;
    }
}
#endif

/* P, or the gradient of what is dropped, of a fragment. */
template <int ROWS, int FRAGMENTS>
METAL_FUNC float2 kept_of(float2 x, thread const kept_tile<ROWS, FRAGMENTS> &kept, int f)
{
    return float2{is_kept(kept, f, 0) ? x[0] : 0.0f, is_kept(kept, f, 1) ? x[1] : 0.0f};
}

template <int ROWS, int FRAGMENTS> METAL_FUNC void drop(thread float2 *P, thread const kept_tile<ROWS, FRAGMENTS> &kept)
{
    UNROLL
    for (int f = 0; f < ROWS * FRAGMENTS; f++)
        P[f] = kept_of(P[f], kept, f);
}

/* dP of what is not dropped yet, from that of a fragment f of Z P. */
template <int ROWS, int FRAGMENTS>
METAL_FUNC float2 dropout_gradient(float2 dP, constant mfa_args &args, thread const kept_tile<ROWS, FRAGMENTS> &kept,
                                   int f)
{
    return kept_of(dP, kept, f) * args.keep_scale;
}

/* What is left to do to a sum with P that were dropped or kept. */
METAL_FUNC float dropout_scale(constant mfa_args &args)
{
    return args.keep_scale;
}

#if defined(COLUMN_LANES)
/* attention_decode_vector: a simdgroup has 8 keys, or 16, of a block. Its lanes compute their counters for the rows of
 * several blocks at once. */
#define KEPT_GROUPS (KEYS_OF_SIMDGROUP / 8)
#define KEPT_BLOCKS (32 / (LANE_ROWS * KEPT_GROUPS))

struct kept_ahead {
    uint bits;
    int end; /* of the blocks, of which there are KEPT_BLOCKS */
};

METAL_FUNC kept_ahead kept_ahead_init()
{
    return kept_ahead{0, 0};
}

/* Bit n of bits[r]: whether row r keeps key n of the simdgroup's in a block. */
struct kept_rows {
    uint bits[LANE_ROWS];
};

METAL_FUNC void keep_rows(thread kept_rows &kept, thread kept_ahead &ahead, thread const dropout &drop,
                          constant mfa_args &args, thread const q_block &q, int block, thread const simdgroup_coord &sg)
{
    if (block >= ahead.end) {
        int number = sg.lane / LANE_ROWS, head = q.own[0].head, i = q.own[0].i;
        UNROLL
        for (int r = 1; r < LANE_ROWS; r++) {
            head = sg.lane % LANE_ROWS == r ? q.own[r].head : head;
            i = sg.lane % LANE_ROWS == r ? q.own[r].i : i;
        }
        int first = (block + number / KEPT_GROUPS) * BLOCK_KV + sg.key_group * KEYS_OF_SIMDGROUP;
        ahead = kept_ahead{kept_keys(drop, args, head, i, first / 8 + number % KEPT_GROUPS), block + KEPT_BLOCKS};
    }
    int number = (block - (ahead.end - KEPT_BLOCKS)) * KEPT_GROUPS;
    UNROLL
    for (int r = 0; r < LANE_ROWS; r++) {
        kept.bits[r] = 0;
        UNROLL
        for (int g = 0; g < KEPT_GROUPS; g++)
            kept.bits[r] |= simd_shuffle(ahead.bits, ushort((number + g) * LANE_ROWS + r)) << (8 * g);
    }
}

METAL_FUNC float kept_of(float P, thread const kept_rows &kept, int r, int key)
{
    return (kept.bits[r] >> key & 1u) != 0 ? P : 0.0f;
}
#endif

#else

struct dropout {
};
template <int ROWS, int FRAGMENTS> struct kept_tile {
};

METAL_FUNC dropout dropout_of(thread const score_operands &, constant mfa_metal_call &, thread const sequence &)
{
    return dropout{};
}

#if defined(KEYS_ARE_ROWS)
template <int FRAGMENTS>
METAL_FUNC void keep_queries(thread kept_tile<1, FRAGMENTS> &, thread const dropout &, constant mfa_args &, int, int,
                             int, lane_coord)
{
}
#else
template <int ROWS, int FRAGMENTS>
METAL_FUNC void keep_keys(thread kept_tile<ROWS, FRAGMENTS> &, thread const dropout &, constant mfa_args &,
                          thread const query *, int, lane_coord)
{
}
#endif

template <int ROWS, int FRAGMENTS> METAL_FUNC void drop(thread float2 *, thread const kept_tile<ROWS, FRAGMENTS> &)
{
}

template <int ROWS, int FRAGMENTS>
METAL_FUNC float2 dropout_gradient(float2 dP, constant mfa_args &, thread const kept_tile<ROWS, FRAGMENTS> &, int)
{
    return dP;
}

METAL_FUNC float dropout_scale(constant mfa_args &)
{
    return 1.0f;
}

#if defined(COLUMN_LANES)
struct kept_ahead {
};
struct kept_rows {
};

METAL_FUNC kept_ahead kept_ahead_init()
{
    return kept_ahead{};
}

METAL_FUNC void keep_rows(thread kept_rows &, thread kept_ahead &, thread const dropout &, constant mfa_args &,
                          thread const q_block &, int, thread const simdgroup_coord &)
{
}

METAL_FUNC float kept_of(float P, thread const kept_rows &, int, int)
{
    return P;
}
#endif
#endif
