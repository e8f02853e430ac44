/* Problems: made, checked and brought into canonical form, printed and parsed. */
#ifndef MFA_CORE_PROBLEM_H
#define MFA_CORE_PROBLEM_H

#include <stddef.h>
#include <stdint.h>

#include "core/args.h"
#include "mfa.h"

#define MFA_DIM_MAX 512 /* of head_dim and value_dim, in all our kernels */

/* "forward", "f16": the words of problem lines and kernel keys. NULL: there is no such pass or dtype. */
const char *mfa_pass_name(int32_t pass);
const char *mfa_dtype_name(int32_t dtype);

/* Bytes of one element. */
size_t mfa_dtype_size(int32_t dtype);

/* "int8", of enum mfa_kv_type, "same" for 0; NULL: there is no such type. */
const char *mfa_kv_type_name(int32_t type);

/* The elements of a row of so many columns as they lie in memory: of 4 bits, bytes of two. */
int64_t mfa_kv_type_columns(int32_t type, int64_t columns);

/* The body of mfa_kv_quantize (quantize.c). */
mfa_status mfa_kv_quantize_rows(int32_t type, int32_t dtype, int64_t rows, int64_t columns, int64_t group,
                                const void *numbers, int64_t numbers_row, void *codes, int64_t codes_row, float *scales,
                                int64_t scales_row);

/* Whether lengths or places of sequences are given by tensors, so that they may differ from entry to entry. */
int mfa_problem_is_varlen(const mfa_problem *problem);

/* The sizes of k and v along the batch and along rows: of packed sequences, a cache or pages, if they are that. */
int64_t mfa_problem_kv_entries(const mfa_problem *problem);
int64_t mfa_problem_kv_rows(const mfa_problem *problem);

/* The scale that a problem has if nothing else is said: 1/sqrt(head_dim). */
double mfa_problem_scale(int64_t head_dim);

/* The bodies of mfa_problem_init_sized (for the size of this library), mfa_problem_print, mfa_problem_parse_sized. */
void mfa_problem_make(mfa_problem *problem, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t q_len,
                      int64_t kv_len, int64_t head_dim, int64_t value_dim);
mfa_status mfa_problem_write(const mfa_problem *problem, char *text, size_t capacity);
mfa_status mfa_problem_read(const char *text, mfa_problem *problem, size_t size);

/* Gives each tensor a dense layout, (batch, head, row, column); a block map or table that there is not gets zeros. */
void mfa_problem_make_dense(mfa_problem *problem);

/* Copies the caller's struct, which may be that of an older version. After it, the enums of the copy are valid.
 * MFA_INVALID: its size or one of its enums is wrong. */
mfa_status mfa_problem_copy(const mfa_problem *given, mfa_problem *copy);

/* MFA_INVALID if a size is negative. */
mfa_status mfa_problem_check_signs(const mfa_problem *problem);

/* MFA_INVALID: no backend could ever run the problem. MFA_UNSUPPORTED: no kernel has these columns or this scale. After
 * it
 *   - every enum names something, every size is 0 or more, head_dim and value_dim are 1 to MFA_DIM_MAX,
 *     and kv_heads divides q_heads (it may be 0 if q_heads is);
 *   - batch * q_heads * q_len and batch * kv_heads * kv_len, with 1 in place of 0, are at most 2^43;
 *   - the bytes from an operand's lowest element to its highest fit in an int64_t;
 *   - lower and upper are within [-q_len, kv_len], and so i + lower and i + upper fit too; with bottom_right within
 *     [-q_len - kv_len, q_len + kv_len];
 *   - bottom_right is 0 where all entries have the same lengths: lower and upper count from the first query and key;
 *   - block_map_q and block_map_kv are multiples of 16, not above the lengths in such units, or both 0;
 *   - mask_dtype is dtype unless the mask is additive;
 *   - out_type is 0 where dtype is f32 or f64. */
mfa_status mfa_problem_check(const mfa_problem *given, mfa_problem *canonical);

/* The arguments of the kernels for a canonical problem. Without heads, group is 1. */
struct mfa_args mfa_problem_args(const mfa_problem *canonical);

#endif
