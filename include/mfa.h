/* libmfa: exact attention, forward and backward, in O(N) memory.
 *
 *     S = scale * Q K^T, P = softmax(S), O = P V, L = log(sum(exp(S)))
 *
 * An mfa_problem describes what to compute, an mfa_plan holds what was decided for it (kernel, tiling, workspace), and
 * a backend runs it. A caller fills in an mfa_problem, and either creates a plan and runs it often, or calls
 * mfa_attention() once.
 *
 * Every function that can fail returns an mfa_status; results come through pointers and are written
 * only on success. mfa_last_error() then holds one sentence for the calling thread: the field, what
 * was given, what is accepted. The library never prints, exits, aborts or throws.
 *
 * All functions may be called from several threads at once, and in a child after fork(), where a Metal
 * device that the parent has opened is MFA_UNAVAILABLE; only mfa_context_destroy() and mfa_plan_destroy()
 * need the object to be idle. */
#ifndef MFA_H
#define MFA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MFA_VERSION_MAJOR 0
#define MFA_VERSION_MINOR 1
#define MFA_VERSION_PATCH 0

#if defined(__GNUC__)
#define MFA_API __attribute__((visibility("default")))
#else
#define MFA_API
#endif

typedef enum mfa_status {
    MFA_OK = 0,
    MFA_INVALID = 1,     /* a wrong argument: no backend will ever run this */
    MFA_UNSUPPORTED = 2, /* a valid problem that this library cannot run */
    MFA_UNAVAILABLE = 3, /* this machine does not have the device, or something that it needs */
    MFA_OUT_OF_MEMORY = 4,
    MFA_COMPILE_FAILED = 5, /* a kernel could not be compiled for the device */
    MFA_DEVICE_FAILED = 6,  /* the device reported an error while running */
    MFA_INTERNAL = 7        /* a bug in this library */
} mfa_status;

typedef enum mfa_pass { MFA_FORWARD = 0, MFA_BACKWARD = 1 } mfa_pass;

/* Where the operands lie. */
typedef enum mfa_device { MFA_DEVICE_CPU = 0, MFA_DEVICE_METAL = 1 } mfa_device;

/* Element types. Sums are accumulated in f32 (f64 for f64); gradients are rounded once, at the end. */
typedef enum mfa_dtype { MFA_F32 = 0, MFA_F16 = 1, MFA_BF16 = 2, MFA_F64 = 3 } mfa_dtype;

typedef enum mfa_mask {
    MFA_MASK_NONE = 0,
    MFA_MASK_BOOL = 1,    /* one byte per element; nonzero: the query attends to the key */
    MFA_MASK_ADDITIVE = 2 /* added to the score, as f32 unless q is f64; -inf masks the key */
} mfa_mask;

/* Types of k and v apart from q's, whose elements are codes: an element is code * scale in f32 (f64 for f64), for a
 * scale that the buffers give (k_scale, v_scale), or 1 without them. int8 is signed; e4m3 and e5m2 are the 8-bit floats
 * of the Open Compute Project (e4m3 without infinities, as torch.float8_e4m3fn; torch.float8_e5m2). Of the types of 4
 * bits a byte holds two, in blocks of 32 columns: columns c and c + 16 of the block are in its byte c, the low and the
 * high half. int4 is the code - 8; nf4 the number of that index among the 16 of QLoRA (Dettmers et al., 2023, appendix
 * E), which quantise a normal distribution. */
typedef enum mfa_kv_type {
    MFA_KV_SAME = 0, /* the problem's dtype */
    MFA_KV_INT8 = 1,
    MFA_KV_E4M3 = 2,
    MFA_KV_E5M2 = 3,
    MFA_KV_INT4 = 4,
    MFA_KV_NF4 = 5
} mfa_kv_type;

/* The type of o, in both passes, and of dq, dk and dv. */
typedef enum mfa_out_type {
    MFA_OUT_SAME = 0, /* the problem's dtype */
    MFA_OUT_F32 = 1   /* f32, also where the problem is f16 or bf16: sums are not rounded to the dtype. Not for f64 */
} mfa_out_type;

/* What a forward pass may do with less precision where it then takes less time. MFA_FAST_INT8 is for k_type and v_type
 * MFA_KV_INT8 with one scale for a row (k_group and v_group 0, or all columns): Q K^T and P V may be products of
 * integers. Then each query is rounded to multiples of a 127th of its largest number, and the weights of a block of
 * keys, up to 512 neighbours, to 256 levels. With
 *     u_i  = max_c |Q_ic| / 254
 *     d_i  = max_j |scale| * u_i * sum_c |K_jc|, over the visible keys
 *     R_ij = the largest P_ik |v_scale_k| among the keys k of j's block
 * and the code C_jc of V_jc, results differ from exact ones, beside the usual roundings, by at most
 *     |dL_i|  <= d_i
 *     |dO_ic| <= (exp(2 d_i) - 1) * sum_j Z_ij P_ij |V_jc| + exp(2 d_i) / 510 * sum_j Z_ij R_ij |C_jc|
 * (Z as with dropout, else 1). A query whose largest number is below 2^-100 counts as zeros. It is a permission: where
 * a device, an instruction set or a case has no such kernels, results are those without it. mfa_plan_describe() says
 * which kernel runs; "forward_int8" is the one that multiplies integers. */
typedef enum mfa_fast { MFA_FAST_NONE = 0, MFA_FAST_INT8 = 1 } mfa_fast;

/* Strides of a (batch, head, row, column) tensor, in elements. An input may have any strides, 0 and negative ones
 * included; an output must not have stride 0 along a dimension longer than 1 (but see dbias). The rows of q, o, d_o,
 * dq, lse are queries, those of k, v, dk, dv are keys; a mask has queries as rows and keys as columns. lse and dlse
 * have no columns. */
typedef struct mfa_layout {
    int64_t batch, head, row, column;
} mfa_layout;

/* What to compute. The score of query i and key j, of query head h and KV head h / (q_heads / kv_heads):
 *
 *     s = scale * dot(Q_i, K_j)
 *     s = softcap * tanh(s / softcap)     if softcap > 0
 *     s = s + mask_ij                     if mask is MFA_MASK_ADDITIVE
 *     s = s - slope * |i + kv_len - q_len - j|     if alibi; slope of this batch entry and query head
 *     visible iff lower <= j - i <= upper, a bool mask allows it, and so does block (i / block_map_q, j / block_map_kv)
 *         of the block map
 *
 * With sinks, each query head has one more logit in the softmax, which has no key and no value: L_i = log(exp(sink) +
 * sum_j exp(s_ij)), and the P of a query add up to less than 1.
 *
 * With dropout, O = sum_j Z_ij P_ij V_j: Z_ij is 0 with the probability `dropout`, else 1 / (1 - dropout). L is that
 * without dropout. Z depends on the seed, the batch entry, the query head, i and j alone, and so is the same on every
 * device and in both passes: with x = Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11)
 * of the counter (j / 8, i, query head, batch entry) under the key (low, high word of the seed), key j has half j % 8
 * of x, the low half of x[0] first; it is dropped if that is below 2^16 * dropout, rounded to an integer, halves up,
 * which is at most 2^16 - 1 where dropout is below 1. mfa_problem_dropout_mask() gives Z != 0.
 *
 * The band expresses a causal mask (upper = 0; aligned to the last key: upper = kv_len - q_len), a sliding window of
 * the last W keys (lower = -(W - 1)), or both; MFA_BAND_OPEN_LOWER and MFA_BAND_OPEN_UPPER leave a side open. A query
 * with no visible key gets O = 0, L = -inf (with sinks: the sink) and zero gradients.
 *
 * A block map divides the scores of a head into blocks of block_map_q queries by block_map_kv keys, and has a bool for
 * each: where it is 0 the block is hidden. Hidden blocks are not visited, so their work is not done. Its tensor is
 * (batch, q_heads, ceil(q_len / block_map_q), ceil(kv_len / block_map_kv)).
 *
 * Lengths may differ from entry to entry of the batch. q_len and kv_len are then the most that an entry has; i and j
 * count from the first query and key of its sequence.
 *   - varlen_q: the sequences of q lie one after another, entry b in rows cu_seqlens_q[b] up to cu_seqlens_q[b + 1] of
 *     total_q (and so do o, lse, d_o, dlse, dq; the batch strides of their layouts are not used). Rows of no entry get
 *     O = 0 and zero gradients.
 *   - varlen_kv: the same of k, v, dk, dv, by cu_seqlens_k and total_kv.
 *   - seqused_k: only the first seqused_k[b] keys that an entry has count, as in a cache that is not full.
 *   - leftpad_k: the first leftpad_k[b] of these are padding: the sequence begins after them.
 *   - cache_batch_idx: k and v have kv_batch entries, of which entry b reads number cache_batch_idx[b].
 *   - page_size: k and v are kv_batch pages of page_size keys, (kv_batch, kv_heads, page_size, columns); key j of entry
 *     b, with its padding, is row j % page_size of page block_table[b][j / page_size]. Entries may share pages.
 * The last two have no backward pass, nor have k_type and v_type. bottom_right: the band is counted from the last query
 * and key: lower + kv - q <= j - i <= upper + kv - q for an entry of q queries and kv keys. And ALiBi's kv_len - q_len
 * is always that of the entry. Numbers that are wrong (that fall, reach outside of a tensor, or are more than q_len or
 * kv_len) are MFA_INVALID when a run on the CPU begins, and nothing has been written then; on Metal they are clamped.
 *
 * Backward takes o and lse from the caller, so they may be merged from several devices, and computes
 *     P = exp(S - L), D = rowsum(dO * O) - dL, dS = P * (Z * dP - D), dP = dO V^T        (Z = 1 without dropout)
 *     dbias = dS; then, with softcap, dS = dS * (1 - tanh^2)
 *     dV = (Z * P)^T dO, dK = scale * dS^T Q, dQ = scale * dS K
 *     dsink = -sum_i exp(sink - L_i) * D_i, over the queries of the head
 * D uses the o that the caller gives, which is rounded to f16 or bf16; where o_low is given, it uses o + o_low. With
 * MFA_OUT_F32 o is not rounded.
 * Results are bitwise the same for any number of threads, and in every run. */
typedef struct mfa_problem {
    uint64_t size; /* sizeof(mfa_problem), of the caller's header; mfa_problem_init sets it */
    int32_t pass, device, dtype, mask;
    int32_t mask_dtype; /* of an additive mask: any mfa_dtype. dbias has it too */
    int32_t alibi;      /* 1: ALiBi, with the slopes that the buffers give; 0: none */
    int64_t batch, q_heads, kv_heads, q_len, kv_len;
    int64_t head_dim, value_dim; /* columns of q and k; of v and o. 1 to 512 */
    int64_t lower, upper;
    double scale;   /* 0, or 1e-60 to 1e60 of either sign; on Metal 2^-100 to 2^100 */
    double softcap; /* 0: none; else 1e-30 to 1e30 */
    mfa_layout q_layout, k_layout, v_layout, o_layout, lse_layout, mask_layout;
    /* backward only: */
    mfa_layout d_o_layout, dlse_layout, dq_layout, dk_layout, dv_layout;
    mfa_layout dbias_layout; /* stride 0 along a dimension: the gradient is summed over it */

    mfa_layout slopes_layout; /* of a (batch, q_heads) tensor: its rows and columns are one */

    int32_t sinks;            /* 1: attention sinks, that the buffers give; 0: none */
    int32_t reserved;         /* 0 */
    mfa_layout sinks_layout;  /* of a (batch, q_heads) tensor */
    mfa_layout dsinks_layout; /* the same, backward only; stride 0 along the batch: the gradient is summed over it */

    double dropout;         /* the probability, 0 to 1, with which a P is dropped; 0: none */
    mfa_layout seed_layout; /* of a (batch) tensor; stride 0 along the batch: one seed for all */

    int64_t block_map_q, block_map_kv; /* queries and keys of a block of the map, multiples of 16; 0 and 0: no map */
    mfa_layout block_map_layout;       /* its rows are blocks of queries, its columns blocks of keys */

    int32_t varlen_q, varlen_kv;  /* 1: packed sequences; 0: q_len, kv_len rows of each batch entry */
    int32_t seqused_k, leftpad_k; /* 1: the buffers give them; 0: every key counts */
    int32_t cache_batch_idx;      /* 1: the buffers give it; 0: entry b reads entry b */
    int32_t bottom_right;         /* 1: the band is counted from the last query and key; 0: from the first */
    int64_t total_q, total_kv;    /* rows of packed sequences; else 0 */
    int64_t kv_batch;             /* entries, or pages, of k and v with cache_batch_idx or page_size; else 0 */
    int64_t page_size;            /* keys of a page, 1 or more; 0: no pages */
    mfa_layout cu_seqlens_q_layout, cu_seqlens_k_layout; /* of a (batch + 1) tensor: its batch stride */
    mfa_layout seqused_k_layout, leftpad_k_layout;       /* of a (batch) tensor */
    mfa_layout cache_batch_idx_layout;                   /* the same */
    mfa_layout block_table_layout; /* of a (batch, ceil(kv_len / page_size)) tensor: batch and column strides */

    int32_t k_type, v_type;   /* of enum mfa_kv_type */
    int64_t k_group, v_group; /* columns that share a scale, for 4 bits a multiple of 32; 0: all of a row */
    /* of (as k: batch, kv_heads, keys, ceil(head_dim / k_group)) tensors; stride 0 along a dimension: one for all */
    mfa_layout k_scale_layout, v_scale_layout;

    int32_t out_type; /* of enum mfa_out_type */
    int32_t fast;     /* of enum mfa_fast */
} mfa_problem;

#define MFA_BAND_OPEN_LOWER INT64_MIN
#define MFA_BAND_OPEN_UPPER INT64_MAX

/* An operand. On the CPU the elements begin at (char *)base + offset; on Metal base is the MTLBuffer.
 * The offset is in bytes. Elements must be aligned to their size. */
typedef struct mfa_buffer {
    void *base;
    uint64_t offset;
} mfa_buffer;

/* What a run reads and writes. Unused members are zero.
 * forward:  reads q, k, v and what else the problem has; writes o, and lse (f32; f64 for f64) and o_low if given.
 * backward: reads the same, o, lse, d_o, and dlse (like lse) and o_low if given; writes those of dq, dk, dv, dbias,
 *           dsinks that are given. Outputs must not overlap anything.
 * An operand without elements needs no base. */
typedef struct mfa_buffers {
    uint64_t size; /* sizeof(mfa_buffers) */
    mfa_buffer q, k, v, mask, o, lse, d_o, dlse, dq, dk, dv, dbias;
    mfa_buffer workspace;    /* 64-byte aligned, on Metal an MTLBuffer; without a base: the context's own is used */
    uint64_t workspace_size; /* its bytes: mfa_plan_workspace() or more */
    /* Optional, for f16 and bf16 with MFA_OUT_SAME only; MFA_INVALID if it is given for others. It has the shape, dtype
     * and layout of o. Forward writes O - o, the rounding error of o, rounded to the dtype (0 where o is not finite),
     * so that o + o_low has about twice the digits of o. Backward reads it and computes D from o + o_low. */
    mfa_buffer o_low;
    mfa_buffer slopes;        /* of ALiBi: f32, whatever the dtype. They are constants: they get no gradient */
    mfa_buffer sinks, dsinks; /* f32, whatever the dtype */
    mfa_buffer seed;          /* of dropout: 64-bit integers, any; in backward those of forward */
    mfa_buffer block_map;     /* one byte per block; nonzero: it is visible */
    mfa_buffer cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, cache_batch_idx, block_table; /* 32-bit integers */
    mfa_buffer k_scale, v_scale; /* f32, whatever the dtype; of problems with a k_type, v_type; optional: 1 */
} mfa_buffers;

/* Runs worker(begin, end, argument) over all of [begin, end), cut into ranges of at least `grain`, on
 * any threads and in any order; returns 0 when all have returned. Not 0: no range is running or will run, and the
 * library computes what is left in the calling thread. */
typedef int32_t (*mfa_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                    void (*worker)(int64_t begin, int64_t end, void *argument), void *argument);

typedef struct mfa_context_options {
    uint64_t size;         /* sizeof(mfa_context_options) */
    int32_t threads;       /* maximum number of threads of a run; 0: as many as this process may use */
    int32_t reserved;      /* 0 */
    const char *isa;       /* CPU: highest instruction set to use, a name as of mfa_isa_name(). NULL: the environment's
                              MFA_ISA, else the best of this machine */
    const char *cache;     /* folder for compiled kernels. NULL: MFA_CACHE, else the user's cache folder */
    mfa_parallel_for host; /* the host's thread pool; NULL: the library's own, which also runs while others' threads
                              keep the host's from ending runs in time */
} mfa_context_options;

/* Compiles `count` texts, files in the device's language, into the file `library`, which serves any device;
 * returns 0 if it did. On Metal: xcrun metal -std=metal3.1 -fno-fast-math -o LIBRARY TEXT... */
typedef int32_t (*mfa_compiler)(const char *const *texts, int32_t count, const char *library, void *argument);

typedef struct mfa_context mfa_context; /* devices, threads, kernels: what is kept between calls */
typedef struct mfa_plan mfa_plan;       /* what was decided for one problem; never changes */

/* "0.1.0". */
MFA_API const char *mfa_version(void);

/* Why this thread's last failed call failed; "" if none did. Valid until its next call. */
MFA_API const char *mfa_last_error(void);

/* "MFA_INVALID" and so on; "unknown status" for anything else. */
MFA_API const char *mfa_status_name(mfa_status status);

/* The CPU's instruction set number n, from 0, as this library knows them, on whatever machine: "scalar", "avx2" and so
 * on, in each family the lowest first. NULL: there is none of that number. */
MFA_API const char *mfa_isa_name(int32_t n);

/* MFA_OK if a context can be created with this instruction set; MFA_UNAVAILABLE: this machine or this build of the
 * library does not have it; MFA_INVALID: there is no such name. */
MFA_API mfa_status mfa_isa_supported(const char *isa);

/* options may be NULL: all defaults. MFA_INVALID, MFA_UNAVAILABLE (no such instruction set), MFA_OUT_OF_MEMORY. */
MFA_API mfa_status mfa_context_create(const mfa_context_options *options, mfa_context **context);
MFA_API void mfa_context_destroy(mfa_context *context); /* NULL is a no-op; destroy its plans first */

/* Maximum number of threads of runs that begin from now on; 0: as many as this process may use. A plan never uses more
 * than the maximum at its creation. */
MFA_API mfa_status mfa_context_set_threads(mfa_context *context, int32_t threads);

/* Fills in a forward problem in f32 on the CPU: dense (batch, head, row, column) layouts for all
 * operands, no mask (its layout is that of a dense one), open band, scale 1/sqrt(head_dim), no softcap, no ALiBi,
 * no sinks, no dropout, MFA_OUT_SAME, no block map, whose layout is zeros: it is for the caller to set. `size` is
 * the caller's sizeof(mfa_problem), of which no byte more is written. */
MFA_API void mfa_problem_init_sized(mfa_problem *problem, size_t size, int64_t batch, int64_t q_heads, int64_t kv_heads,
                                    int64_t q_len, int64_t kv_len, int64_t head_dim, int64_t value_dim);
static inline void mfa_problem_init(mfa_problem *problem, int64_t batch, int64_t q_heads, int64_t kv_heads,
                                    int64_t q_len, int64_t kv_len, int64_t head_dim, int64_t value_dim)
{
    mfa_problem_init_sized(problem, sizeof *problem, batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim);
}

/* One line of text for logs and case lists, and back; docs/abi.md has the grammar. For example
 * "forward f16 b2 h8/2 q512 kv512 d64 causal softcap30 mask_bool". Layouts are not in it: parsing gives dense ones.
 * print writes at most `capacity` bytes. MFA_INVALID: the line does not fit, or the problem has none, as with a
 * negative size or a NaN; parsing, also a line with an option that a caller's mfa_problem of `size` bytes lacks. */
MFA_API mfa_status mfa_problem_print(const mfa_problem *problem, char *text, size_t capacity);
MFA_API mfa_status mfa_problem_parse_sized(const char *text, mfa_problem *problem, size_t size);
static inline mfa_status mfa_problem_parse(const char *text, mfa_problem *problem)
{
    return mfa_problem_parse_sized(text, problem, sizeof *problem);
}

/* Which P dropout keeps: kept[batch][q_heads][q_len][kv_len], dense, 1 where P is kept and 0 where it is dropped, by
 * the problem's sizes, dropout and seed_layout, from seeds in this process's memory. MFA_INVALID, MFA_UNSUPPORTED. */
MFA_API mfa_status mfa_problem_dropout_mask(const mfa_problem *problem, const uint64_t *seed, uint8_t *kept);

/* Quantises `rows` rows of `columns` numbers of an mfa_dtype to codes of a type other than MFA_KV_SAME, and writes a
 * scale for each group of columns (0: one for each row): the largest size in the group becomes the largest code, or
 * int4's -8. Rows of numbers, codes and scales are so many of their elements apart, and dense within; a row of 4-bit
 * codes has columns / 2 bytes, and needs whole blocks of 32 columns. A group of zeros gets the scale 0. A NaN or an
 * infinity is MFA_INVALID, as are sizes that do not fit; then nothing has been written. */
MFA_API mfa_status mfa_kv_quantize(int32_t type, int32_t dtype, int64_t rows, int64_t columns, int64_t group,
                                   const void *numbers, int64_t numbers_row, void *codes, int64_t codes_row,
                                   float *scales, int64_t scales_row);

/* MFA_OK if a backend of this context runs it; else MFA_INVALID or MFA_UNSUPPORTED or MFA_UNAVAILABLE. */
MFA_API mfa_status mfa_problem_supported(mfa_context *context, const mfa_problem *problem);

/* Decides once how to run the problem. The plan copies what it needs of `problem`, and refers to `context`. */
MFA_API mfa_status mfa_plan_create(mfa_context *context, const mfa_problem *problem, mfa_plan **plan);
MFA_API void mfa_plan_destroy(mfa_plan *plan); /* NULL is a no-op */

/* Bytes of scratch memory that a run uses beside the operands. */
MFA_API size_t mfa_plan_workspace(const mfa_plan *plan);

/* "cpu forward_f32_d64_q48_k192_band_avx512 threads 2 workspace 393216". MFA_INVALID if it does not fit. */
MFA_API mfa_status mfa_plan_describe(const mfa_plan *plan, char *text, size_t capacity);

/* `stream` is where the device's commands go. On the CPU it is NULL. On Metal:
 *     NULL              a queue of the context's own; the call returns when the results are there
 *     MFA_STREAM_TORCH  the stream of PyTorch in this process; the call returns when the commands are
 *                       encoded, in the order of PyTorch's own. MFA_UNAVAILABLE if there is none;
 *                       MFA_DEVICE_FAILED if the GPU did not complete the commands of an earlier run
 *     anything else     an MTLCommandBuffer without an open encoder; the call returns when the commands
 *                       are encoded, and the caller commits. Without a workspace each run allocates one */
#define MFA_STREAM_TORCH ((void *)1)
MFA_API mfa_status mfa_plan_run(const mfa_plan *plan, const mfa_buffers *buffers, void *stream);

/* Plan and run in one call, for problems that change with each call (a decode loop with a growing
 * kv_len). Kernels and workspace are kept in the context, so a later call of the kind neither compiles nor
 * allocates. */
MFA_API mfa_status mfa_attention(mfa_context *context, const mfa_problem *problem, const mfa_buffers *buffers,
                                 void *stream);

/* Compiles the kernel that a problem needs, without running it, and keeps it in `folder`; NULL: in the
 * context's cache. Valid files that are there already are kept. Files in a folder `kernels` beside this library are
 * found like those in the cache, so they can be shipped: a device's own files serve that device and system, a library
 * serves any. `compiler` makes libraries; NULL: none are made. It is called with `argument`, and must not call this
 * library. A backend whose kernels are built in has nothing to do. MFA_COMPILE_FAILED;
 * MFA_INVALID if the folder cannot be written. */
MFA_API mfa_status mfa_precompile(mfa_context *context, const mfa_problem *problem, const char *folder,
                                  mfa_compiler compiler, void *argument);

/* A handler of XLA's FFI (version 0.3 of its xla/ffi/api/c_api.h), to be registered for the platform "cpu", as with
 * jax.ffi.register_ffi_target(); docs/abi.md describes its attributes. It takes an XLA_FFI_CallFrame, and returns an
 * XLA_FFI_Error or NULL. It runs in one context of the process, with as many threads as the process may use. */
MFA_API void *mfa_xla_attention(void *call_frame);

#ifdef __cplusplus
}
#endif
#endif
