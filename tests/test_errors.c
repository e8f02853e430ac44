/* Errors through the public ABI: each has its status and a message that names the field, and nothing is written. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <pthread.h>

#include <cmocka.h>

#include "support/context.h"
#include "support/report.h"

/* The call returned `status`, and the message of the error is one line that has `words`. */
static void assert_fails(mfa_status got, mfa_status status, const char *words)
{
    const char *sentence = mfa_last_error();
    print_message("%-15s %s\n", mfa_status_name(got), sentence);
    assert_string_equal(mfa_status_name(got), mfa_status_name(status));
    assert_non_null(strstr(sentence, words));
    assert_null(strchr(sentence, '\n'));
}

static mfa_problem parsed(const char *text)
{
    mfa_problem problem;
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    return problem;
}

/* clang-format off */
static void not_a_pass(mfa_problem *p) { p->pass = 2; }
static void not_a_device(mfa_problem *p) { p->device = 9; }
static void not_a_dtype(mfa_problem *p) { p->dtype = 4; }
static void not_a_mask(mfa_problem *p) { p->mask = 3; }
static void not_a_mask_dtype(mfa_problem *p) { p->mask = MFA_MASK_ADDITIVE; p->mask_dtype = -1; }
static void unknown_alibi(mfa_problem *p) { p->alibi = 2; }
static void unknown_sinks(mfa_problem *p) { p->sinks = 2; }
static void dropout_above_one(mfa_problem *p) { p->dropout = 1.5; }
static void dropout_negative(mfa_problem *p) { p->dropout = -0.1; }
static void dropout_of_long_rows(mfa_problem *p) { p->dropout = 0.1, p->kv_len = INT64_C(1) << 36; }
static void odd_block_map_q(mfa_problem *p) { p->block_map_q = 40; p->block_map_kv = 64; }
static void negative_block_map_kv(mfa_problem *p) { p->block_map_q = 64; p->block_map_kv = -16; }
static void half_a_block_map(mfa_problem *p) { p->block_map_kv = 64; }
static void block_map_without_layout(mfa_problem *p) { p->q_len = 200; p->block_map_q = p->block_map_kv = 16; }
static void block_map_overflows(mfa_problem *p) { block_map_without_layout(p); p->block_map_layout.row = INT64_MAX; }
static void unknown_varlen_q(mfa_problem *p) { p->varlen_q = 2; }
static void total_q_of_dense(mfa_problem *p) { p->total_q = 5; }
static void total_kv_of_dense(mfa_problem *p) { p->total_kv = 5; }
static void negative_total_q(mfa_problem *p) { p->varlen_q = 1; p->total_q = -1; }
static void packed_pages(mfa_problem *p) { p->varlen_kv = 1; p->page_size = 16; }
static void pages_by_index(mfa_problem *p) { p->cache_batch_idx = 1; p->page_size = 16; }
static void cache_without_index(mfa_problem *p) { p->kv_batch = 3; }
static void rows_without_entries(mfa_problem *p) { p->batch = 0; p->varlen_q = 1; p->total_q = 3; }
static void table_without_layout(mfa_problem *p) { p->kv_len = 40; p->page_size = 16; p->kv_batch = 3; }
static void gradient_of_pages(mfa_problem *p) { p->pass = MFA_BACKWARD; p->page_size = 16; }
static void unknown_k_type(mfa_problem *p) { p->k_type = 6; }
static void group_without_codes(mfa_problem *p) { p->v_group = 32; }
static void odd_group(mfa_problem *p) { p->k_type = MFA_KV_INT4; p->k_group = 16; }
static void odd_columns(mfa_problem *p) { p->v_type = MFA_KV_NF4; p->value_dim = 40; }
static void groups_of_rows(mfa_problem *p) { p->k_type = MFA_KV_INT8; p->k_group = 2; p->kv_len = 9; }
static void unknown_out_type(mfa_problem *p) { p->out_type = 2; }
static void out_f32_of_f64(mfa_problem *p) { p->dtype = MFA_F64; p->out_type = MFA_OUT_F32; }
static void gradient_of_codes(mfa_problem *p) { p->pass = MFA_BACKWARD; p->k_type = MFA_KV_E4M3; }
static void reserved(mfa_problem *p) { p->reserved = 1; }
static void unknown_fast(mfa_problem *p) { p->fast = 2; }
static void fast_without_codes(mfa_problem *p) { p->fast = MFA_FAST_INT8; p->k_type = MFA_KV_INT8; }
static void fast_groups(mfa_problem *p) { p->fast = p->v_group = p->kv_len = 1; p->k_type = p->v_type = MFA_KV_INT8; }
static void fast_gradient(mfa_problem *p) { p->pass = MFA_BACKWARD; p->fast = MFA_FAST_INT8; }
static void another_size(mfa_problem *p) { p->size = 24; }
static void size_of_the_future(mfa_problem *p) { p->size += 8; }
static void negative_batch(mfa_problem *p) { p->batch = -1; }
static void negative_q_len(mfa_problem *p) { p->q_len = -5; }
static void negative_kv_len(mfa_problem *p) { p->kv_len = -5; }
static void heads_do_not_divide(mfa_problem *p) { p->kv_heads = 3; }
static void no_kv_heads(mfa_problem *p) { p->kv_heads = 0; }
static void no_head_dim(mfa_problem *p) { p->head_dim = 0; }
static void large_head_dim(mfa_problem *p) { p->head_dim = 513; }
static void large_value_dim(mfa_problem *p) { p->value_dim = 513; }
static void scale_is_nan(mfa_problem *p) { p->scale = NAN; }
static void softcap_is_nan(mfa_problem *p) { p->softcap = NAN; }
static void negative_softcap(mfa_problem *p) { p->softcap = -1; }
static void infinite_softcap(mfa_problem *p) { p->softcap = INFINITY; }
static void sizes_overflow(mfa_problem *p) { p->batch = p->q_len = INT64_C(1) << 40; }
static void input_overflows(mfa_problem *p) { p->k_layout.row = INT64_MAX / 2; }
static void input_overflows_downward(mfa_problem *p) { p->v_layout.head = INT64_MIN; }
static void mask_overflows(mfa_problem *p) { p->mask = MFA_MASK_BOOL; p->mask_layout.row = INT64_MAX; }
static void o_lies_over_itself(mfa_problem *p) { p->o_layout.row = 0; }
static void lse_lies_over_itself(mfa_problem *p) { p->lse_layout.head = 0; }
static void no_backend(mfa_problem *p) { p->device = MFA_DEVICE_METAL; }
static void dq_lies_over_itself(mfa_problem *p) { p->pass = MFA_BACKWARD; p->dq_layout.column = 0; }
/* clang-format on */

static const struct {
    void (*spoil)(mfa_problem *problem);
    mfa_status status;
    const char *words;
} rejected[] = {
    {not_a_pass, MFA_INVALID, "pass is 2"},
    {not_a_device, MFA_INVALID, "device is 9"},
    {not_a_dtype, MFA_INVALID, "dtype is 4"},
    {not_a_mask, MFA_INVALID, "mask is 3"},
    {not_a_mask_dtype, MFA_INVALID, "mask_dtype is -1"},
    {unknown_alibi, MFA_INVALID, "alibi is 2; it must be 0 (none) or 1 (by the slopes given)"},
    {dropout_above_one, MFA_INVALID, "dropout is 1.5; it must be 0 to 1"},
    {dropout_negative, MFA_INVALID, "dropout is -0.1; it must be 0 to 1"},
    {dropout_of_long_rows, MFA_UNSUPPORTED,
     "kv_len 68719476736; with dropout kernels exist for up to 2^32, and 2^35 keys"},
    {unknown_sinks, MFA_INVALID, "sinks is 2; it must be 0 (none) or 1 (those given)"},
    {odd_block_map_q, MFA_INVALID, "block_map_q is 40; it must be a multiple of 16, or 0 (no block map)"},
    {negative_block_map_kv, MFA_INVALID, "block_map_kv is -16; it must be a multiple of 16, or 0 (no block map)"},
    {half_a_block_map, MFA_INVALID, "block_map_q is 0 and block_map_kv is 64; both must be 0 (no block map), or"},
    {block_map_without_layout, MFA_INVALID, "block_map_layout.row and .column are 0 for 13 x"},
    {unknown_varlen_q, MFA_INVALID, "varlen_q is 2; it must be 0 (q_len queries in each batch entry) or 1"},
    {total_q_of_dense, MFA_INVALID, "total_q is 5 and varlen_q 0"},
    {total_kv_of_dense, MFA_INVALID, "total_kv is 5 and varlen_kv 0"},
    {negative_total_q, MFA_INVALID, "total_q is -1; it must be 0 or more"},
    {packed_pages, MFA_INVALID, "varlen_kv is 1, page_size 16 and cache_batch_idx 0; packed keys have neither"},
    {pages_by_index, MFA_INVALID, "page_size is 16 and cache_batch_idx 1"},
    {cache_without_index, MFA_INVALID, "kv_batch is 3; without page_size and cache_batch_idx it must be 0"},
    {rows_without_entries, MFA_INVALID, "batch is 0, total_q 3 and total_kv 0"},
    {table_without_layout, MFA_INVALID, "block_table_layout.column is 0 for 3 pages"},
    {unknown_k_type, MFA_INVALID, "k_type is 6; it must be 0 (as q), 1 (int8)"},
    {group_without_codes, MFA_INVALID, "v_group is 32 and v_type 0; only codes have scales"},
    {odd_group, MFA_INVALID, "k_group is 16; it must be 0 (one scale for a row) or a multiple of 32"},
    {odd_columns, MFA_UNSUPPORTED, "v_type is nf4 and value_dim 40; of 4 bits kernels exist for multiples of 32"},
    {groups_of_rows, MFA_INVALID, "k_scale_layout.row and .column are both 1 for k_group 2"},
    {unknown_out_type, MFA_INVALID, "out_type is 2; it must be 0 (o, dq, dk and dv have the dtype of q) or 1 (f32)"},
    {out_f32_of_f64, MFA_INVALID, "out_type is 1 (f32) and dtype 3 (f64); of f64 it must be 0 (as q)"},
    {gradient_of_codes, MFA_UNSUPPORTED, "k_type is e4m3 in the backward pass"},
    {gradient_of_pages, MFA_UNSUPPORTED, "page_size is 16 and cache_batch_idx 0 in the backward pass"},
    {block_map_overflows, MFA_INVALID, "block_map_layout is 0, 0, 9223372036854775807, 0 for sizes"},
    {reserved, MFA_INVALID, "reserved is 1; it must be 0"},
    {unknown_fast, MFA_INVALID, "fast is 2; it must be 0 (none) or 1 (products of int8)"},
    {fast_without_codes, MFA_INVALID,
     "fast is 1 (products of int8), k_type int8 with k_group 0 of 16 columns, v_type same"},
    {fast_groups, MFA_INVALID, "v_type int8 with v_group 1 of 16; both must be int8 with one scale for each row"},
    {fast_gradient, MFA_UNSUPPORTED, "fast is 1 (products of int8) in the backward pass; kernels exist for 0"},
    {another_size, MFA_INVALID, "size"},
    {size_of_the_future, MFA_INVALID, "size"},
    {negative_batch, MFA_INVALID, "batch is -1"},
    {negative_q_len, MFA_INVALID, "q_len is -5"},
    {negative_kv_len, MFA_INVALID, "kv_len is -5"},
    {heads_do_not_divide, MFA_INVALID, "q_heads is 4 and kv_heads is 3"},
    {no_kv_heads, MFA_INVALID, "kv_heads is 0"},
    {no_head_dim, MFA_UNSUPPORTED, "head_dim is 0"},
    {large_head_dim, MFA_UNSUPPORTED, "head_dim is 513"},
    {large_value_dim, MFA_UNSUPPORTED, "value_dim is 513"},
    {scale_is_nan, MFA_INVALID, "scale is nan"},
    {softcap_is_nan, MFA_INVALID, "softcap is"},
    {negative_softcap, MFA_INVALID, "softcap is -1"},
    {infinite_softcap, MFA_INVALID, "softcap is inf"},
    {sizes_overflow, MFA_INVALID, "q_len"},
    {input_overflows, MFA_INVALID, "k_layout"},
    {input_overflows_downward, MFA_INVALID, "v_layout"},
    {mask_overflows, MFA_INVALID, "mask_layout"},
    {o_lies_over_itself, MFA_INVALID, "o_layout.row"},
    {lse_lies_over_itself, MFA_INVALID, "lse_layout.head"},
    {dq_lies_over_itself, MFA_INVALID, "dq_layout.column"},
    {no_backend, MFA_UNAVAILABLE, "device"},
};

static void test_rejected_problems(void **state)
{
    (void)state;
    static float memory[4 * 8 * 16];
    static unsigned char o[sizeof memory], untouched[sizeof memory];
    memset(untouched, 0xa5, sizeof untouched);
    memcpy(o, untouched, sizeof o);
    for (size_t n = 0; n < sizeof rejected / sizeof *rejected; n++) {
        mfa_problem problem = parsed("forward f32 b1 h4/2 q8 kv8 d16");
        mfa_plan *const nowhere = (mfa_plan *)untouched, *plan = nowhere;
        mfa_buffers buffers = {.size = sizeof buffers,
                               .q = {memory, 0},
                               .k = {memory, 0},
                               .v = {memory, 0},
                               .o = {o, 0},
                               .mask = {memory, 0}};
        rejected[n].spoil(&problem);
        assert_fails(mfa_problem_supported(test_context, &problem), rejected[n].status, rejected[n].words);
        assert_int_equal(mfa_plan_create(test_context, &problem, &plan), rejected[n].status);
        assert_non_null(strstr(mfa_last_error(), rejected[n].words));
        assert_ptr_equal(plan, nowhere);
        assert_int_equal(mfa_attention(test_context, &problem, &buffers, NULL), rejected[n].status);
        assert_non_null(strstr(mfa_last_error(), rejected[n].words));
        assert_memory_equal(o, untouched, sizeof o);
    }
}

/* clang-format off */
static void no_q(mfa_buffers *b) { b->q.base = NULL; }
static void no_k(mfa_buffers *b) { b->k.base = NULL; }
static void no_v(mfa_buffers *b) { b->v.base = NULL; }
static void no_mask(mfa_buffers *b) { b->mask.base = NULL; }
static void no_o(mfa_buffers *b) { b->o.base = NULL; }
static void no_lse(mfa_buffers *b) { b->lse.base = NULL; }
static void no_d_o(mfa_buffers *b) { b->d_o.base = NULL; }
static void small_buffers(mfa_buffers *b) { b->size = offsetof(mfa_buffers, o_low) - 1; }
static void q_off_by_a_byte(mfa_buffers *b) { b->q.offset = 1; }
static void mask_off_by_a_byte(mfa_buffers *b) { b->mask.offset = 3; }
static void lse_off_by_two(mfa_buffers *b) { b->lse.offset = 2; }
static void o_off_by_two(mfa_buffers *b) { b->o.offset = 2; }
static void dk_off_by_two(mfa_buffers *b) { b->dk.offset = 2; }
static void dq_off_by_a_byte(mfa_buffers *b) { b->dq.base = (char *)b->dq.base + 1; }
static void workspace_off(mfa_buffers *b) { b->workspace.offset = 32; }
static void unused_dq(mfa_buffers *b) { b->dq = b->o; }
static void no_slopes(mfa_buffers *b) { b->slopes.base = NULL; }
static void no_sinks(mfa_buffers *b) { b->sinks.base = NULL; }
static void no_seed(mfa_buffers *b) { b->seed.base = NULL; }
static void no_block_map(mfa_buffers *b) { b->block_map.base = NULL; }
static void some_block_map(mfa_buffers *b) { b->block_map = b->q; }
static void some_slopes(mfa_buffers *b) { b->slopes = b->q; }
static void slopes_off_by_two(mfa_buffers *b) { b->slopes.base = b->q.base, b->slopes.offset = 2; }
static void some_o_low(mfa_buffers *b) { b->o_low = b->workspace; }
static void o_low_off_by_a_byte(mfa_buffers *b) { b->o_low.base = b->o.base, b->o_low.offset = 1; }
/* clang-format on */

static const struct {
    const char *problem;
    void (*spoil)(mfa_buffers *buffers);
    const char *words;
} faults[] = {
    {"forward f32 b1 h2 q8 kv8 d16", no_q, "q is NULL"},
    {"forward f32 b1 h2 q8 kv8 d16", no_k, "k is NULL"},
    {"forward f32 b1 h2 q8 kv8 d16", no_v, "v is NULL"},
    {"forward f32 b1 h2 q8 kv8 d16", no_o, "o is NULL"},
    {"forward f32 b1 h2 q8 kv8 d16 mask_f32", no_mask, "mask is NULL"},
    {"backward f32 b1 h2 q8 kv8 d16", no_lse, "lse is NULL"},
    {"backward f32 b1 h2 q8 kv8 d16", no_o, "o is NULL"},
    {"backward f32 b1 h2 q8 kv8 d16", no_d_o, "d_o is NULL"},
    {"forward f32 b1 h2 q8 kv8 d16", small_buffers, "size of mfa_buffers"},
    {"forward f16 b1 h2 q8 kv8 d16", q_off_by_a_byte, "q begins at"},
    {"forward f32 b1 h2 q8 kv8 d16 mask_f64", mask_off_by_a_byte, "mask begins at"},
    {"forward f16 b1 h2 q8 kv8 d16", lse_off_by_two, "lse begins at"},
    {"backward bf16 b1 h2 q8 kv8 d16", dq_off_by_a_byte, "dq begins at"},
    {"forward f32 b1 h2 q8 kv8 d16", workspace_off, "workspace begins at"},
    {"forward f32 b1 h2 q8 kv8 d16", unused_dq, "dq is given; the forward pass has none"},
    {"forward f32 b1 h2 q8 kv8 d16", some_o_low, "o_low is given; only problems in f16 and bf16 with out_type 0"},
    {"backward f64 b1 h2 q8 kv8 d16", some_o_low, "o_low is given; only problems in f16 and bf16"},
    {"forward bf16 b1 h2 q8 kv8 d16 out_f32", some_o_low, "in f16 and bf16 with out_type 0 have it"},
    {"backward f16 b1 h2 q8 kv8 d16 out_f32", some_o_low, "in f16 and bf16 with out_type 0 have it"},
    {"backward f16 b1 h2 q8 kv8 d16 out_f32", o_off_by_two, "o begins at"},
    {"backward f16 b1 h2 q8 kv8 d16 out_f32", dk_off_by_two, "dk begins at"},
    {"forward f16 b1 h2 q8 kv8 d16 alibi", no_slopes, "slopes is NULL; the forward pass needs it"},
    {"backward f64 b1 h2 q8 kv8 d16 alibi", no_slopes, "slopes is NULL; the backward pass needs it"},
    {"backward f64 b1 h2 q8 kv8 d16 alibi", slopes_off_by_two, "slopes begins at"},
    {"backward f32 b1 h2 q8 kv8 d16 sinks", no_sinks, "sinks is NULL; the backward pass needs it"},
    {"forward f32 b1 h2 q8 kv8 d16 dropout0.1", no_seed, "seed is NULL; the forward pass needs it"},
    {"forward f32 b1 h2 q8 kv8 d16 block_map_q16 block_map_kv16", no_block_map, "block_map is NULL; the forward pass"},
    {"backward f32 b1 h2 q8 kv8 d16 block_map_q16 block_map_kv16", no_block_map, "block_map is NULL; the backward"},
    {"forward f16 b1 h2 q8 kv8 d16", some_block_map, "block_map is given; only problems with a block map have it"},
    {"forward f16 b1 h2 q8 kv8 d16 mask_f16", some_slopes, "slopes is given; only problems with alibi have it"},
    {"forward f16 b1 h2 q8 kv8 d16", o_low_off_by_a_byte, "o_low begins at"},
    {"backward bf16 b1 h2 q8 kv8 d16", o_low_off_by_a_byte, "o_low begins at"},
};

static void test_rejected_buffers(void **state)
{
    (void)state;
    static _Alignas(64) unsigned char input[4096], output[6][4096], untouched[sizeof output], workspace[1 << 22];
    memset(untouched, 0xa5, sizeof untouched);
    memcpy(output, untouched, sizeof output);
    for (size_t n = 0; n < sizeof faults / sizeof *faults; n++) {
        mfa_problem problem = parsed(faults[n].problem);
        mfa_plan *plan;
        int backward = problem.pass == MFA_BACKWARD;
        mfa_buffers buffers = {.size = sizeof buffers,
                               .q = {input, 0},
                               .k = {input, 0},
                               .v = {input, 0},
                               .o = {output[0], 0},
                               .lse = {output[1], 0},
                               .workspace = {workspace, 0},
                               .workspace_size = sizeof workspace};
        if (problem.mask)
            buffers.mask.base = input;
        if (backward) {
            buffers.d_o.base = input;
            buffers.dq.base = output[2];
            buffers.dk.base = output[3];
            buffers.dv.base = output[4];
        }
        faults[n].spoil(&buffers);
        assert_fails(mfa_attention(test_context, &problem, &buffers, NULL), MFA_INVALID, faults[n].words);
        assert_int_equal(mfa_plan_create(test_context, &problem, &plan), MFA_OK);
        assert_true(mfa_plan_workspace(plan) <= sizeof workspace);
        assert_int_equal(mfa_plan_run(plan, &buffers, NULL), MFA_INVALID);
        assert_non_null(strstr(mfa_last_error(), faults[n].words));
        mfa_plan_destroy(plan);
        assert_memory_equal(output, untouched, sizeof output);
    }
}

static void test_null_arguments(void **state)
{
    (void)state;
    mfa_problem problem = parsed("forward f32 b1 h1 q1 kv1 d1");
    mfa_buffers buffers = {.size = sizeof buffers};
    mfa_plan *plan;
    char text[256];
    assert_fails(mfa_context_create(NULL, NULL), MFA_INVALID, "context is NULL");
    assert_fails(mfa_context_set_threads(NULL, 1), MFA_INVALID, "context is NULL");
    assert_fails(mfa_problem_print(NULL, text, sizeof text), MFA_INVALID, "problem is NULL");
    assert_fails(mfa_problem_print(&problem, NULL, 10), MFA_INVALID, "text is NULL");
    assert_fails(mfa_problem_parse(NULL, &problem), MFA_INVALID, "text is NULL");
    assert_fails(mfa_problem_parse("forward", NULL), MFA_INVALID, "problem is NULL");
    assert_fails(mfa_problem_supported(NULL, &problem), MFA_INVALID, "context is NULL");
    assert_fails(mfa_problem_supported(test_context, NULL), MFA_INVALID, "problem is NULL");
    assert_fails(mfa_plan_create(NULL, &problem, &plan), MFA_INVALID, "context is NULL");
    assert_fails(mfa_plan_create(test_context, NULL, &plan), MFA_INVALID, "problem is NULL");
    assert_fails(mfa_plan_create(test_context, &problem, NULL), MFA_INVALID, "plan is NULL");
    assert_fails(mfa_plan_describe(NULL, text, sizeof text), MFA_INVALID, "plan is NULL");
    assert_fails(mfa_plan_run(NULL, &buffers, NULL), MFA_INVALID, "plan is NULL");
    assert_fails(mfa_attention(NULL, &problem, &buffers, NULL), MFA_INVALID, "context is NULL");
    assert_fails(mfa_attention(test_context, NULL, &buffers, NULL), MFA_INVALID, "problem is NULL");
    assert_fails(mfa_attention(test_context, &problem, NULL, NULL), MFA_INVALID, "buffers is NULL");
    assert_int_equal(mfa_plan_create(test_context, &problem, &plan), MFA_OK);
    assert_fails(mfa_plan_describe(plan, NULL, 10), MFA_INVALID, "text is NULL");
    assert_fails(mfa_plan_run(plan, NULL, NULL), MFA_INVALID, "buffers is NULL");
    mfa_plan_destroy(plan);
    mfa_context_destroy(NULL);
    mfa_problem_init(NULL, 1, 1, 1, 1, 1, 1, 1);
}

static void test_context_options(void **state)
{
    (void)state;
    mfa_context *const nowhere = (mfa_context *)rejected, *made = nowhere;
#if defined(__aarch64__)
    const char *elsewhere = "avx2";
#else
    const char *elsewhere = "neon";
#endif
    const struct {
        mfa_context_options options;
        mfa_status status;
        const char *words;
    } wrong[] = {
        {{.size = 8}, MFA_INVALID, "size of mfa_context_options"},
        {{.size = sizeof(mfa_context_options), .threads = -1}, MFA_INVALID, "threads is -1"},
        {{.size = sizeof(mfa_context_options), .reserved = 1}, MFA_INVALID, "reserved is 1"},
        {{.size = sizeof(mfa_context_options), .isa = "sse9"}, MFA_INVALID, "sse9"},
        {{.size = sizeof(mfa_context_options), .isa = elsewhere}, MFA_UNAVAILABLE, elsewhere},
    };
    for (size_t n = 0; n < sizeof wrong / sizeof *wrong; n++) {
        assert_fails(mfa_context_create(&wrong[n].options, &made), wrong[n].status, wrong[n].words);
        assert_ptr_equal(made, nowhere);
    }
    assert_fails(mfa_context_set_threads(test_context, -2), MFA_INVALID, "threads is -2");

    mfa_context_options scalar = {.size = sizeof scalar, .isa = "scalar", .threads = 2};
    mfa_problem problem = parsed("forward f32 b1 h1 q4 kv4 d4");
    mfa_plan *plan;
    char text[256];
    assert_int_equal(mfa_context_create(&scalar, &made), MFA_OK);
    assert_int_equal(mfa_plan_create(made, &problem, &plan), MFA_OK);
    assert_int_equal(mfa_plan_describe(plan, text, sizeof text), MFA_OK);
    assert_non_null(strstr(text, "_scalar threads "));
    mfa_plan_destroy(plan);
    mfa_context_destroy(made);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
/* Sanitizers abort at such a request unless an option disables that. */
const char *__asan_default_options(void);
const char *__tsan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}
const char *__tsan_default_options(void)
{
    return "allocator_may_return_null=1";
}
#endif

/* A workspace that exceeds any address space. The buffers are not read. */
static void test_out_of_memory(void **state)
{
    (void)state;
    mfa_problem problem;
    double element = 0, untouched = 0;
    mfa_problem_init(&problem, 1, 1, 1, INT64_C(1) << 43, 1, 1, 1);
    problem.pass = MFA_BACKWARD;
    problem.dtype = MFA_F64;
    mfa_buffers buffers = {.size = sizeof buffers,
                           .q = {&element, 0},
                           .k = {&element, 0},
                           .v = {&element, 0},
                           .o = {&element, 0},
                           .lse = {&element, 0},
                           .d_o = {&element, 0},
                           .dq = {&element, 0}};
    assert_fails(mfa_attention(test_context, &problem, &buffers, NULL), MFA_OUT_OF_MEMORY, "workspace");
    assert_true(element == untouched);
}

static void *error_of_another_thread(void *sentence)
{
    mfa_problem problem;
    *(int *)sentence = *mfa_last_error() == 0; /* nothing has failed in this thread */
    mfa_problem_parse("nonsense", &problem);
    return NULL;
}

static void test_last_error_is_of_its_thread(void **state)
{
    (void)state;
    pthread_t thread;
    int empty = 0;
    assert_fails(mfa_context_set_threads(test_context, -3), MFA_INVALID, "-3");
    assert_int_equal(pthread_create(&thread, NULL, error_of_another_thread, &empty), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(empty);
    assert_non_null(strstr(mfa_last_error(), "-3"));
}

static void test_status_names(void **state)
{
    (void)state;
    static const char *const names[] = {"MFA_OK",
                                        "MFA_INVALID",
                                        "MFA_UNSUPPORTED",
                                        "MFA_UNAVAILABLE",
                                        "MFA_OUT_OF_MEMORY",
                                        "MFA_COMPILE_FAILED",
                                        "MFA_DEVICE_FAILED",
                                        "MFA_INTERNAL"};
    for (int status = 0; status < 8; status++)
        assert_string_equal(mfa_status_name((mfa_status)status), names[status]);
    assert_string_equal(mfa_status_name((mfa_status)8), "unknown status");
    assert_string_equal(mfa_status_name((mfa_status)-1), "unknown status");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rejected_problems), cmocka_unit_test(test_rejected_buffers),
        cmocka_unit_test(test_null_arguments),    cmocka_unit_test(test_context_options),
        cmocka_unit_test(test_out_of_memory),     cmocka_unit_test(test_last_error_is_of_its_thread),
        cmocka_unit_test(test_status_names),
    };
    report_begin("test_errors", 0);
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
