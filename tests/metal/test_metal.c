/* The parts of the Metal backend that need no GPU: tiles are within Metal's limits for every problem, texts are
 * complete, unsupported keys and problems fail with a sentence, and lists of dispatches are as expected. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/problem.h"
#include "metal/dispatch.h"
#include "metal/source.h"
#include "metal/tiles.h"
#include "mfa.h"
#include "support/report.h"

static const enum mfa_metal_kernel tiled[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_DECODE_VECTOR,
                                              MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV};
static const int families[] = {7, 9};

static struct mfa_key key_of(int pass, int dtype, int head_dim, int value_dim, int family)
{
    struct mfa_key key = {.pass = pass, .dtype = dtype, .head_dim = head_dim, .value_dim = value_dim};
    snprintf(key.machine, sizeof key.machine, "apple%d", family);
    return key;
}

static void check_tile(enum mfa_metal_kernel kernel, const struct mfa_key *key)
{
    const struct mfa_metal_tile *tile = mfa_metal_tiles_find(kernel, key);
    int32_t bytes[2];
    assert_non_null(tile);
    mfa_metal_tiles_memory(kernel, tile, key, bytes);
    const int32_t threads = mfa_metal_tiles_threads(tile);
    const int keys_are_rows = kernel == MFA_METAL_BACKWARD_DKV;
    const int rows = keys_are_rows ? tile->block_kv : tile->block_q,
              walked = keys_are_rows ? tile->block_q : tile->block_kv;
    assert_true(bytes[0] > 0 && bytes[0] % 16 == 0 && bytes[1] > 0 && bytes[1] % 16 == 0);
    assert_in_range(bytes[0] + bytes[1], 32, 32768);
    assert_in_range(threads, 32, 512);
    assert_int_equal(threads % 32, 0);
    assert_true(rows == 8 * tile->row_groups || (rows == 16 * tile->row_groups && kernel == MFA_METAL_FORWARD) ||
                (rows == 2 && kernel == MFA_METAL_DECODE_VECTOR));
    assert_int_equal(walked % (8 * tile->key_groups), 0);
    assert_true(mfa_metal_tiles_columns(tile, key->head_dim) >= key->head_dim);
    assert_int_equal(mfa_metal_tiles_columns(tile, key->head_dim) % (8 * tile->split), 0);
    assert_true(!tile->shared || tile->split > 1); /* the kernels' barriers depend on it */
    const int decodes = kernel == MFA_METAL_DECODE || kernel == MFA_METAL_DECODE_VECTOR;
    assert_true(tile->key_groups == 1 || (decodes && tile->row_groups == 1));
}

/* Both tiles of a row, usual and halved. */
static void check_tiles(struct mfa_key key)
{
    for (size_t n = 0; n < sizeof tiled / sizeof *tiled; n++) {
        key.pass = tiled[n] >= MFA_METAL_BACKWARD_DQ ? MFA_BACKWARD : MFA_FORWARD;
        if (key.pass == MFA_BACKWARD && key.v_type)
            continue;
        key.block_q = 0;
        check_tile(tiled[n], &key);
        key.block_q = 1; /* less than any of the usual ones */
        check_tile(tiled[n], &key);
    }
}

/* Every head_dim with every value_dim: threadgroup memory is the sum of theirs, so multiples of 8 cover all. */
static void test_limits(void **state)
{
    (void)state;
    for (size_t f = 0; f < 2; f++)
        for (int dtype = MFA_F32; dtype <= MFA_BF16; dtype++)
            for (int d = 8; d <= MFA_DIM_MAX; d += 8)
                for (int e = 8; e <= MFA_DIM_MAX; e += 8)
                    for (int type = MFA_KV_SAME; type <= MFA_KV_INT8; type++) {
                        struct mfa_key key = key_of(MFA_FORWARD, dtype, d, e, families[f]);
                        key.v_type = type;
                        check_tiles(key);
                    }
}

static void test_families(void **state)
{
    (void)state;
    assert_int_equal(mfa_metal_tiles_family(6), 0);
    assert_int_equal(mfa_metal_tiles_family(7), 7);
    assert_int_equal(mfa_metal_tiles_family(8), 7);
    assert_int_equal(mfa_metal_tiles_family(9), 9);
    assert_int_equal(mfa_metal_tiles_family(10), 9);
    const struct mfa_key cpu = {.machine = "avx512"}, key = key_of(MFA_FORWARD, MFA_F16, 64, 64, 9);
    assert_int_equal(mfa_metal_tiles_family_of(&cpu), 0);
    assert_int_equal(mfa_metal_tiles_family_of(&key), 9);
    assert_null(mfa_metal_tiles_find(MFA_METAL_MERGE, &key));
    assert_null(mfa_metal_tiles_find(MFA_METAL_FORWARD, &cpu));
}

static struct mfa_key chosen(const mfa_problem *problem)
{
    struct mfa_choice choice;
    mfa_problem canonical;
    assert_int_equal(mfa_problem_check(problem, &canonical), MFA_OK);
    mfa_metal_tiles_choose(9, &canonical, &choice);
    return choice.key;
}

/* Lengths, strides, numbers of heads, bands and scalars do not change the key. */
static void test_keys(void **state)
{
    mfa_problem p;
    struct mfa_key first, key;
    (void)state;
    mfa_problem_init(&p, 1, 4, 4, 512, 512, 72, 72);
    p.upper = 0, p.softcap = 30;
    first = chosen(&p);
    mfa_problem_init(&p, 3, 8, 2, 7, 100000, 65, 66);
    p.lower = -1000, p.upper = 5, p.softcap = 0.5, p.scale = -3;
    p.q_layout = (mfa_layout){0, -7, 1, 3};
    key = chosen(&p);
    assert_memory_equal(&key, &first, sizeof key);
}

/* A decode step has a key of its own, and so has its halved tile; its backward has not. */
static void test_decode_keys(void **state)
{
    struct mfa_choice choice;
    mfa_problem p;
    char text[MFA_KEY_TEXT];
    (void)state;
    mfa_problem_init(&p, 1, 8, 2, 2, 4096, 64, 64);
    p.dtype = MFA_F16;
    assert_int_equal(mfa_problem_check(&p, &p), MFA_OK);
    mfa_metal_tiles_choose(9, &p, &choice);
    mfa_key_print(&choice.key, text);
    assert_string_equal(text, "decode_f16_d64_q8_k64_apple9");
    assert_int_equal(mfa_metal_tiles_find(MFA_METAL_DECODE, &choice.key)->key_groups, 4);
    mfa_metal_tiles_halve(&p, &choice);
    mfa_key_print(&choice.key, text);
    assert_string_equal(text, "decode_f16_d64_q8_k32_apple9");
    assert_int_equal(mfa_metal_tiles_find(MFA_METAL_DECODE, &choice.key)->key_groups, 2);
    p.q_len = 1, p.kv_heads = 4; /* two rows for each KV head */
    assert_int_equal(mfa_problem_check(&p, &p), MFA_OK);
    mfa_metal_tiles_choose(9, &p, &choice);
    mfa_key_print(&choice.key, text);
    assert_string_equal(text, "decode_vector_f16_d64_q2_k64_apple9");
    mfa_metal_tiles_halve(&p, &choice);
    mfa_key_print(&choice.key, text);
    assert_string_equal(text, "decode_vector_f16_d64_q2_k32_apple9");
    assert_int_equal(mfa_metal_tiles_find(MFA_METAL_DECODE_VECTOR, &choice.key)->key_groups, 4);
    p.pass = MFA_BACKWARD;
    assert_int_equal(chosen(&p).variant, MFA_VARIANT_TILED);
}

/* --- Texts ---------------------------------------------------------------------------------------- */

static size_t count(const char *text, const char *words)
{
    size_t found = 0;
    for (; (text = strstr(text, words)); text++)
        found++;
    return found;
}

static void test_text(void **state)
{
    struct mfa_key key = key_of(MFA_FORWARD, MFA_BF16, 72, 40, 9);
    char *text;
    (void)state;
    key.features = MFA_FEATURE_BAND | MFA_FEATURE_MASK_ADDITIVE | MFA_FEATURE_SOFTCAP, key.mask_dtype = MFA_F16;
    key.v_type = MFA_KV_INT4;
    assert_int_equal(mfa_metal_source_write(&key, MFA_METAL_FORWARD, "#define FIRST\n", &text), MFA_OK);
    assert_memory_equal(text, "#define FIRST\n", 14);
    static const char *const once[] = {"#define DTYPE_BF16\n",
                                       "#define BF16_NATIVE\n",
                                       "#define K_TYPE KV_SAME\n",
                                       "#define V_TYPE KV_INT4\n",
                                       "#define MASK_F16\n",
                                       "#define BAND\n",
                                       "#define SOFTCAP\n",
                                       "#define HEAD_DIM 72\n",
                                       "#define VALUE_DIM 40\n",
                                       "#define BLOCK_Q 32\n",
                                       "#define SHARED_TILE 0\n",
                                       "#include <metal_stdlib>",
                                       "struct mfa_args {",
                                       "struct mfa_metal_call {",
                                       "#line 1 \"core/args.h\"",
                                       "#line 1 \"core/codes.h\"",
                                       "#line 1 \"metal/kernels/fragment.h\"",
                                       "\nattention_forward("};
    for (size_t n = 0; n < sizeof once / sizeof *once; n++)
        assert_int_equal(count(text, once[n]), 1);
    assert_int_equal(count(text, "#include \""), 0);
    free(text);
}

/* Texts of a key are compiled together into one library, so no two have the same kernel. */
static void test_one_kernel(void **state)
{
    static const enum mfa_metal_kernel kernels[][2] = {{MFA_METAL_DBIAS, MFA_METAL_DBIAS_SUM},
                                                       {MFA_METAL_UNUSED_QUERIES, MFA_METAL_UNUSED_KEYS}};
    struct mfa_key key = key_of(MFA_BACKWARD, MFA_F16, 64, 64, 7);
    (void)state;
    key.features = MFA_FEATURE_MASK_ADDITIVE | MFA_FEATURE_VARLEN, key.mask_dtype = MFA_F16;
    for (int n = 0; n < 4; n++) {
        char *text, guard[64];
        const char *own = mfa_metal_source_function(kernels[n / 2][n % 2]);
        const char *other = mfa_metal_source_function(kernels[n / 2][1 - n % 2]);
        assert_int_equal(mfa_metal_source_write(&key, kernels[n / 2][n % 2], NULL, &text), MFA_OK);
        snprintf(guard, sizeof guard, "#define KERNEL_%s\n", own);
        assert_int_equal(count(text, guard), 1);
        snprintf(guard, sizeof guard, "#define KERNEL_%s\n", other);
        assert_int_equal(count(text, guard), 0);
        snprintf(guard, sizeof guard, "#if defined(KERNEL_%s)\nkernel void %s(", other, other);
        assert_int_equal(count(text, guard), 1);
        free(text);
    }
}

static void expect_unsupported(const struct mfa_key *key, int kernel, const char *words)
{
    char *text = NULL;
    assert_int_equal(mfa_metal_source_write(key, (enum mfa_metal_kernel)kernel, NULL, &text), MFA_UNSUPPORTED);
    assert_null(text);
    if (!strstr(mfa_last_error(), words))
        fail_msg("\"%s\" does not say \"%s\"", mfa_last_error(), words);
}

static void test_unsupported_keys(void **state)
{
    const struct mfa_key good = key_of(MFA_FORWARD, MFA_F16, 64, 64, 7);
    struct mfa_key key = good;
    (void)state;
    expect_unsupported(&good, MFA_METAL_KERNELS, "kernel is 14");
    expect_unsupported(&good, -1, "kernel is -1");
    expect_unsupported(&good, MFA_METAL_BACKWARD_DQ, "pass is 0; attention_backward_dq");
    expect_unsupported(&good, MFA_METAL_BLOCK_MASK, "no mask; block_mask");
    key.pass = MFA_BACKWARD, key.features = MFA_FEATURE_MASK_BOOL;
    expect_unsupported(&key, MFA_METAL_DBIAS, "bool mask; attention_dbias is for those with an additive one");
    key.features |= MFA_FEATURE_VARLEN | MFA_FEATURE_PAGED;
    expect_unsupported(&key, MFA_METAL_BACKWARD_DQ, "pages; attention_backward_dq exists for none");
    expect_unsupported(&good, MFA_METAL_UNUSED_QUERIES, "no varlen; unused_queries");
    key = good, key.k_type = 6;
    expect_unsupported(&key, MFA_METAL_FORWARD, "k_type is 6 and its v_type 0; attention_forward exists for 0 to 5");
    key = good, key.pass = MFA_BACKWARD, key.v_type = MFA_KV_NF4;
    expect_unsupported(&key, MFA_METAL_BACKWARD_DQ, "k_type is same and its v_type nf4; attention_backward_dq exists");
    key = good, key.pass = 7;
    expect_unsupported(&key, MFA_METAL_FORWARD, "pass is 7");
    key = good, key.dtype = MFA_F64;
    expect_unsupported(&key, MFA_METAL_FORWARD, "dtype is 3");
    key = good, key.features = MFA_FEATURE_MASK_ADDITIVE, key.mask_dtype = MFA_F64;
    expect_unsupported(&key, MFA_METAL_FORWARD, "mask_dtype is 3");
    key = good, key.head_dim = 520;
    expect_unsupported(&key, MFA_METAL_FORWARD, "head_dim is 520");
    key = good, key.value_dim = 0;
    expect_unsupported(&key, MFA_METAL_FORWARD, "value_dim 0");
    key = good, memcpy(key.machine, "apple8", 7);
    expect_unsupported(&key, MFA_METAL_FORWARD, "machine is apple8");
    assert_null(mfa_metal_source_function(MFA_METAL_KERNELS));
}

static void test_unsupported_problems(void **state)
{
    mfa_problem p;
    (void)state;
    mfa_problem_init(&p, 1, 2, 1, 5, 5, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_OK);
    p.dtype = MFA_F64;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_string_equal(mfa_last_error(), "dtype is f64; Metal kernels exist for f32, f16 and bf16");
    p.dtype = MFA_F16, p.mask = MFA_MASK_ADDITIVE, p.mask_dtype = MFA_F64;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_string_equal(mfa_last_error(), "mask_dtype is f64; Metal kernels exist for f32, f16 and bf16");
}

/* Kernels count rows, keys and blocks in 32 bits. */
static void test_unsupported_sizes(void **state)
{
    mfa_problem p;
    (void)state;
    mfa_problem_init(&p, 1, 4, 1, 1 << 28, 1 << 30, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_OK);
    p.q_len++;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_non_null(strstr(mfa_last_error(), "q_len is 268435457"));
    mfa_problem_init(&p, 1, 4, 1, 1, (1 << 30) + 1, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_non_null(strstr(mfa_last_error(), "kv_len is 1073741825"));
    mfa_problem_init(&p, 1 << 30, 4, 4, 1, 1, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_non_null(strstr(mfa_last_error(), "batch is 1073741824"));
    mfa_problem_init(&p, 1, 1, 1, 1 << 20, 1 << 20, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_OK);
    p.mask = MFA_MASK_BOOL; /* 2^34 blocks of it */
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    mfa_problem_init(&p, 1 << 30, 4, 4, 0, 0, 8, 8);
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_OK);
    p.sinks = 1; /* dsinks has an element for each head, with or without queries */
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    mfa_problem_init(&p, 1 << 14, 4, 4, 1 << 17, 1, 8,
                     8); /* packed, the longest may be long, as far as the grid goes */
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    p.varlen_q = 1, p.total_q = 1 << 20;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_OK);
    p.total_q = (1 << 30) + 1;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    p.total_q = 1, p.q_heads = p.kv_heads = 1, p.varlen_kv = 1, p.total_kv = (1 << 30) + 1;
    assert_int_equal(mfa_metal_tiles_supports(&p), MFA_UNSUPPORTED);
    assert_non_null(strstr(mfa_last_error(), "total_kv is 1073741825"));
}

/* --- Dispatches ----------------------------------------------------------------------------------- */

struct listed {
    struct mfa_choice choice;
    struct mfa_metal_dispatch list[MFA_METAL_DISPATCHES];
    int count;
};

/* With all buffers given. */
static void list(const mfa_problem *problem, struct listed *l)
{
    static char memory;
    const mfa_buffer b = {&memory, 0};
    const mfa_buffers buffers = {.size = sizeof buffers,
                                 .q = b,
                                 .k = b,
                                 .v = b,
                                 .mask = b,
                                 .o = b,
                                 .lse = b,
                                 .d_o = b,
                                 .dlse = b,
                                 .dq = b,
                                 .dk = b,
                                 .dv = b,
                                 .dbias = b,
                                 .o_low = b,
                                 .sinks = {problem->sinks ? &memory : NULL, 0},
                                 .dsinks = {problem->sinks ? &memory : NULL, 0}};
    mfa_problem canonical;
    assert_int_equal(mfa_problem_check(problem, &canonical), MFA_OK);
    mfa_metal_tiles_choose(7, &canonical, &l->choice);
    mfa_metal_dispatch_measure(&canonical, &l->choice);
    l->count = mfa_metal_dispatch_list(&canonical, &l->choice, &buffers, l->list);
    for (int n = 0; n < l->count; n++) {
        const struct mfa_metal_dispatch *d = &l->list[n];
        assert_true(d->groups > 0 && d->chunk > 0 && d->call.first_group == 0);
        assert_in_range(d->binding_count, 1, MFA_METAL_BUFFERS);
        for (int i = 0; i < d->binding_count; i++)
            assert_true(d->bindings[i].operand >= 0 || d->bindings[i].offset <= l->choice.shared);
    }
}

static void expect_kernels(const mfa_problem *problem, int count_expected, ...)
{
    struct listed l;
    va_list kernels;
    list(problem, &l);
    assert_int_equal(l.count, count_expected);
    va_start(kernels, count_expected);
    for (int n = 0; n < l.count; n++)
        assert_int_equal(l.list[n].kernel, va_arg(kernels, int));
    va_end(kernels);
}

static void test_lists(void **state)
{
    mfa_problem p;
    (void)state;
    mfa_problem_init(&p, 4, 32, 32, 512, 512, 64, 64);
    expect_kernels(&p, 1, MFA_METAL_FORWARD);
    p.mask = MFA_MASK_BOOL;
    expect_kernels(&p, 2, MFA_METAL_BLOCK_MASK, MFA_METAL_FORWARD);
    p.pass = MFA_BACKWARD;
    expect_kernels(&p, 6, MFA_METAL_BACKWARD_PREPROCESS, MFA_METAL_BLOCK_MASK, MFA_METAL_BACKWARD_DQ,
                   MFA_METAL_BLOCK_MASK, MFA_METAL_BACKWARD_DKV, MFA_METAL_DBIAS);
    p.q_len = p.kv_len = 0, p.mask = MFA_MASK_NONE, p.sinks = 1;
    expect_kernels(&p, 1, MFA_METAL_DSINKS); /* dsinks is 0, and must be written */
    mfa_problem_init(&p, 1, 8, 2, 2, 4096, 64, 64);
    expect_kernels(&p, 2, MFA_METAL_DECODE, MFA_METAL_MERGE);
    p.q_len = 3; /* 12 rows: more than a block of 8 */
    expect_kernels(&p, 2, MFA_METAL_FORWARD, MFA_METAL_MERGE);
    p.kv_len = 0;
    expect_kernels(&p, 1, MFA_METAL_FORWARD); /* O is 0, and must be written */
    p.q_len = 0;
    expect_kernels(&p, 0);
}

/* Rows of no sequence are a kernel's own, where there may be any; the workspace is that of the rows there are. */
static void test_lengths(void **state)
{
    mfa_problem p;
    struct listed l;
    (void)state;
    mfa_problem_init(&p, 8, 8, 2, 1, 4096, 64, 64);
    p.seqused_k = 1;
    expect_kernels(&p, 2, MFA_METAL_DECODE, MFA_METAL_MERGE);
    p.varlen_q = 1, p.total_q = 8;
    expect_kernels(&p, 3, MFA_METAL_DECODE, MFA_METAL_MERGE, MFA_METAL_UNUSED_QUERIES);
    mfa_problem_init(&p, 1000, 8, 8, 512, 512, 64, 64);
    p.varlen_q = p.varlen_kv = 1, p.total_q = p.total_kv = 3000;
    expect_kernels(&p, 2, MFA_METAL_FORWARD, MFA_METAL_UNUSED_QUERIES);
    p.pass = MFA_BACKWARD;
    expect_kernels(&p, 6, MFA_METAL_BACKWARD_PREPROCESS, MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV,
                   MFA_METAL_UNUSED_QUERIES, MFA_METAL_UNUSED_KEYS, MFA_METAL_DBIAS);
    list(&p, &l);
    assert_in_range(l.choice.shared, 2 * 4 * 8 * 3000, 2 * 4 * 8 * 3000 + 256);
    p.total_q = p.total_kv = p.q_len = p.kv_len = 0;
    expect_kernels(&p, 0);
}

/* Where the dispatch's kernel has operand `operand`; -1: nowhere. */
static int buffer_of(const struct mfa_metal_dispatch *d, int operand)
{
    for (int n = 0; n < d->binding_count; n++)
        if (d->bindings[n].operand == operand)
            return d->bindings[n].buffer;
    return -1;
}

/* Scales of codes have the buffers that dk and dv have in the backward pass, and only where there are codes. */
static void test_scales(void **state)
{
    mfa_problem p;
    struct listed l;
    (void)state;
    mfa_problem_init(&p, 4, 32, 32, 512, 512, 64, 64);
    list(&p, &l);
    assert_int_equal(buffer_of(&l.list[0], MFA_OPERAND_k_scale), -1);
    assert_int_equal(l.list[0].call.present >> MFA_METAL_BUFFER_K_SCALE & 1, 0); /* though dk is given */
    p.v_type = MFA_KV_E5M2;
    list(&p, &l);
    assert_int_equal(buffer_of(&l.list[0], MFA_OPERAND_k_scale), MFA_METAL_BUFFER_K_SCALE);
    assert_int_equal(buffer_of(&l.list[0], MFA_OPERAND_v_scale), MFA_METAL_BUFFER_V_SCALE);
    assert_int_equal(buffer_of(&l.list[0], MFA_OPERAND_dk), -1);
    assert_int_equal(l.list[0].call.present >> MFA_METAL_BUFFER_V_SCALE & 1, 0);
    assert_int_equal(l.list[0].call.args.v_group, 0);
    p.v_type = MFA_KV_SAME, p.pass = MFA_BACKWARD;
    list(&p, &l);
    assert_int_equal(l.list[2].kernel, MFA_METAL_BACKWARD_DKV);
    assert_int_equal(buffer_of(&l.list[2], MFA_OPERAND_dk), MFA_METAL_BUFFER_DK);
    assert_int_equal(buffer_of(&l.list[2], MFA_OPERAND_dv), MFA_METAL_BUFFER_DV);
    assert_int_equal(l.list[2].call.present >> MFA_METAL_BUFFER_DK & 1, 1);
}

/* The kernels' division by the size of a page, for numbers of rows up to the most that there are. */
static void test_pages(void **state)
{
    static const int64_t sizes[] = {
        1, 2, 3, 7, 16, 100, 255, 256, 257, 65537, (1 << 29) + 1, 1 << 30, INT64_C(1) << 40};
    (void)state;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        mfa_problem p;
        struct listed l;
        mfa_problem_init(&p, 1, 1, 1, 1, 1 << 30, 8, 8);
        p.page_size = sizes[s], p.kv_batch = 5;
        p.block_table_layout.column = 1;
        list(&p, &l);
        const struct mfa_metal_call *call = &l.list[0].call;
        assert_in_range(call->page_multiplier, 1, UINT32_MAX);
        for (int64_t n = 0; n < 1 << 30; n += n < 1000 ? 1 : 1 + n % 99991)
            for (int64_t at = n; at <= n + 1; at++) { /* and the rows around the next end of a page */
                const int64_t row = at > n ? (n / sizes[s] + 1) * sizes[s] - 1 : n;
                if (row < 1 << 30 &&
                    (uint64_t)(2 * row * call->page_multiplier) >> 32 >> call->page_shift != (uint64_t)(row / sizes[s]))
                    fail_msg("page of row %lld, of pages of %lld", (long long)row, (long long)sizes[s]);
            }
        assert_int_equal(call->args.page_size, sizes[s] < 1 << 30 ? sizes[s] : 1 << 30);
    }
}

/* The sum of a broadcast dbias is split; a dbias that is not broadcast is not. */
static void test_bias_parts(void **state)
{
    mfa_problem p;
    struct listed l;
    (void)state;
    mfa_problem_init(&p, 2, 8, 8, 1000, 1000, 64, 64);
    p.pass = MFA_BACKWARD, p.mask = MFA_MASK_ADDITIVE;
    list(&p, &l);
    assert_int_equal(mfa_metal_tiling_of(&l.choice).splits, 1);
    assert_int_equal(l.list[l.count - 1].kernel, MFA_METAL_DBIAS);
    p.dbias_layout = (mfa_layout){0, 0, 0, 0};
    list(&p, &l);
    assert_true(mfa_metal_tiling_of(&l.choice).splits > 1);
    assert_int_equal(l.list[l.count - 1].kernel, MFA_METAL_DBIAS_SUM);
    assert_int_equal(l.list[l.count - 1].groups, 1);
}

/* Whether the kernels may load vectors of four elements of Q, if Q begins at this byte of its buffer. */
static int is_vec4(const mfa_problem *problem, uint64_t offset)
{
    static char memory;
    const mfa_buffer b = {&memory, 0};
    const mfa_buffers buffers = {.size = sizeof buffers, .q = {&memory, offset}, .k = b, .v = b, .o = b};
    struct mfa_metal_dispatch dispatches[MFA_METAL_DISPATCHES];
    struct mfa_choice choice;
    mfa_problem canonical;
    assert_int_equal(mfa_problem_check(problem, &canonical), MFA_OK);
    mfa_metal_tiles_choose(7, &canonical, &choice);
    mfa_metal_dispatch_measure(&canonical, &choice);
    assert_true(mfa_metal_dispatch_list(&canonical, &choice, &buffers, dispatches) > 0);
    return dispatches[0].call.vec4 >> MFA_METAL_BUFFER_Q & 1;
}

/* Four elements are loaded at once only where all such loads are aligned. */
static void test_vec4_loads(void **state)
{
    mfa_problem p;
    (void)state;
    mfa_problem_init(&p, 2, 2, 2, 9, 9, 61, 64);
    p.dtype = MFA_F16;
    const mfa_layout padded = {2 * 9 * 64, 9 * 64, 64, 1}, odd[] = {{2 * 9 * 64 + 2, 9 * 64, 64, 1},
                                                                    {2 * 9 * 64, 9 * 64 + 1, 64, 1},
                                                                    {2 * 9 * 62, 9 * 62, 62, 1},
                                                                    {1, 2, 4, 8 * 9}};
    assert_false(is_vec4(&p, 0)); /* rows of 61 elements */
    p.q_layout = padded;
    assert_true(is_vec4(&p, 0));
    assert_true(is_vec4(&p, 8));
    for (uint64_t offset = 2; offset < 8; offset += 2)
        assert_false(is_vec4(&p, offset));
    for (size_t n = 0; n < sizeof odd / sizeof *odd; n++) {
        p.q_layout = odd[n];
        assert_false(is_vec4(&p, 0));
    }
    p.batch = 1, p.q_layout = odd[0];
    assert_true(is_vec4(&p, 0)); /* there is one batch: no step */
    p.dtype = MFA_F32;
    assert_false(is_vec4(&p, 8));
    assert_true(is_vec4(&p, 16));
}

/* Work that would take seconds is divided into commands that cover all threadgroups. */
static void test_chunks(void **state)
{
    mfa_problem p;
    struct listed l;
    (void)state;
    mfa_problem_init(&p, 1, 32, 32, 131072, 131072, 128, 128);
    list(&p, &l);
    assert_int_equal(l.list[0].groups, 32 * 131072 / 32);
    assert_true(l.list[0].chunk < l.list[0].groups / 100);
    p.lower = -127, p.upper = 0;
    struct listed window;
    list(&p, &window);
    assert_true(window.list[0].chunk > 100 * l.list[0].chunk);
}

/* The largest problem: nothing overflows. */
static void test_huge(void **state)
{
    mfa_problem p;
    struct listed l;
    (void)state;
    mfa_problem_init(&p, 1, 1, 1, INT64_C(1) << 43, INT64_C(1) << 43, 1, 1);
    p.mask = MFA_MASK_BOOL, p.mask_layout = (mfa_layout){1, 1, 1, 1};
    list(&p, &l);
    assert_true(l.choice.shared > UINT64_C(1) << 62); /* of the block mask: no memory holds it */
    p.mask_layout = (mfa_layout){0, 0, 0, 1};
    list(&p, &l);
    assert_true(l.choice.shared > UINT64_C(1) << 37 && l.choice.shared < UINT64_C(1) << 43);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_decode_keys),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_families),
        cmocka_unit_test(test_text),
        cmocka_unit_test(test_one_kernel),
        cmocka_unit_test(test_unsupported_keys),
        cmocka_unit_test(test_unsupported_problems),
        cmocka_unit_test(test_unsupported_sizes),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_scales),
        cmocka_unit_test(test_pages),
        cmocka_unit_test(test_bias_parts),
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_vec4_loads),
        cmocka_unit_test(test_huge),
    };
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
