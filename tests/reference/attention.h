/* Naive attention in double, forward and backward: the reference that tests compare with. It materialises
 * all scores of a row, and includes nothing of the library but mfa.h.
 *
 * Results are dense doubles, (batch, head, row, column). Wherever this folder has an array of a problem's
 * tensor, reference_shape says its extents. */
#ifndef REFERENCE_ATTENTION_H
#define REFERENCE_ATTENTION_H

#include <stdint.h>

#include "mfa.h"

enum reference_tensor {
    /* Inputs. */
    REFERENCE_Q,
    REFERENCE_K,
    REFERENCE_V,
    REFERENCE_MASK,
    REFERENCE_SLOPES,
    REFERENCE_SINKS,
    REFERENCE_SEED,
    REFERENCE_BLOCK_MAP,
    REFERENCE_CU_SEQLENS_Q,
    REFERENCE_CU_SEQLENS_K,
    REFERENCE_SEQUSED_K,
    REFERENCE_LEFTPAD_K,
    REFERENCE_CACHE_BATCH_IDX,
    REFERENCE_BLOCK_TABLE,
    REFERENCE_K_SCALE,
    REFERENCE_V_SCALE,
    REFERENCE_dO,
    REFERENCE_dL,
    /* Results. */
    REFERENCE_O,
    REFERENCE_L,
    REFERENCE_O_LOW,
    REFERENCE_dQ,
    REFERENCE_dK,
    REFERENCE_dV,
    REFERENCE_DBIAS,
    REFERENCE_DSINKS,
    REFERENCE_TENSORS
};

struct reference {
    double *O, *L, *O_low, *dQ, *dK, *dV, *dbias, *dsinks; /* NULL: not computed. O_low is never computed here */
};

/* Extents of a tensor. One whose layout has stride 0 along a dimension has one element along it: for an
 * input all its indices hold the same, for dbias and dsinks the gradient is summed. */
void reference_shape(const mfa_problem *problem, enum reference_tensor tensor, int64_t shape[4]);

/* Elements of that shape. */
int64_t reference_count(const mfa_problem *problem, enum reference_tensor tensor);

/* Reads q, k, v and what else the problem has, and for gradients d_o, and dlse if given. It computes O and L itself. */
void reference_attention(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results);

/* The same of a forward problem with products of int8 (mfa_fast): exact but for Q, which is rounded as the library
 * rounds it. P_off: the most by which an element of O may be off because P is rounded as well. */
void reference_attention_int8(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results,
                              double *P_off);

/* A tensor as doubles of reference_shape, with strides that are 0 along a dimension of one element. */
struct reference_view {
    double *values;
    int64_t batch, head, row, column;
};

/* Views `values`; views a copy of the operand in `buffers`, which the caller frees: of quantised K and V as numbers, of
 * head_dim or value_dim columns. */
struct reference_view reference_view(const mfa_problem *problem, enum reference_tensor tensor, double *values);
struct reference_view reference_load(const mfa_problem *problem, enum reference_tensor tensor,
                                     const mfa_buffers *buffers);

/* The number that a code of a type stands for (codes.c): of 4 bits its low half. */
double reference_code(int32_t type, uint8_t code);

/* A batch entry: its lengths, its band, and where its rows lie in tensors of queries and of keys. */
struct reference_sequence {
    int64_t batch, q_len, kv_len, lower, upper;
    int64_t q_batch, q_row;   /* where its first query lies */
    int64_t kv_batch, kv_row; /* where its first key lies; with pages the row counts from its first page */
    const int32_t *table;     /* of its pages; NULL: none */
    int64_t table_stride, page_size;
};

/* The numbers in the buffers must be right. */
struct reference_sequence reference_sequence(const mfa_problem *problem, const mfa_buffers *buffers, int64_t b);

/* Where query i and key j of a head lie: in views; and the number of their row in dense results of reference_shape. */
const double *reference_query(const struct reference_sequence *seq, struct reference_view view, int64_t h, int64_t i);
const double *reference_key(const struct reference_sequence *seq, struct reference_view view, int64_t h, int64_t j);
int64_t reference_query_index(const mfa_problem *problem, const struct reference_sequence *seq, int64_t h, int64_t i);
int64_t reference_key_index(const mfa_problem *problem, const struct reference_sequence *seq, int64_t h, int64_t j);

/* Fills O and gradients with zeros, L with -infinity or, with sinks, the first batch entry's: what rows get that belong
 * to no sequence. NULL members of `results` are left alone. */
void reference_clear(const mfa_problem *problem, const mfa_buffers *buffers, const struct reference *results);

/* Layout, operand and element type of a tensor. */
const mfa_layout *reference_layout(const mfa_problem *problem, enum reference_tensor tensor);
const mfa_buffer *reference_buffer(const mfa_buffers *buffers, enum reference_tensor tensor);
int32_t reference_dtype(const mfa_problem *problem, enum reference_tensor tensor);

/* First key of query i's band, and the one after its last: an empty range if nothing is visible. */
void reference_band(const struct reference_sequence *seq, int64_t i, int64_t *first, int64_t *end);

/* Whether the block map, loaded as `map`, shows key j to query i of head h; 1 without a map. */
int reference_is_mapped(const mfa_problem *problem, const struct reference_view *map, int64_t b, int64_t h, int64_t i,
                        int64_t j);

/* What ALiBi adds to the score of query i and key j, for a slope. */
double reference_alibi(const struct reference_sequence *seq, double slope, int64_t i, int64_t j);

/* What dropout multiplies P of a query and its keys [first, end) by: 0, or 1 / (1 - dropout); 1 without dropout. */
void reference_dropout(const mfa_problem *problem, uint64_t seed, int64_t b, int64_t h, int64_t i, int64_t first,
                       int64_t end, double *Z);

/* The four words of Philox4x32-10 of a counter under a key of two words. */
void reference_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);

/* calloc of `count` doubles, at least one; ends the program if there is no memory. */
double *reference_allocate(int64_t count);

#endif
