/* The tensors that say where sequences begin and end, and which pages their keys are in: wrong numbers are refused with
 * a sentence, and then nothing is written and nothing read outside; right ones give a result in every row. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/problem.h"
#include "mfa.h"
#include "support/context.h"
#include "support/generator.h"
#include "support/guarded.h"
#include "support/random.h"
#include "support/report.h"

enum { BATCH_MAX = 4, ROWS_MAX = 24, DIM = 4, CANARY = 0xa5 };

static int draws = 100000; /* or as many as the command line says */

/* Packed or dense queries of one head and keys of one head, all of DIM columns, and what says their lengths. */
struct problem {
    mfa_problem problem;
    int32_t cu_seqlens_q[BATCH_MAX + 1], cu_seqlens_k[BATCH_MAX + 1];
    int32_t seqused_k[BATCH_MAX], leftpad_k[BATCH_MAX], cache_batch_idx[BATCH_MAX];
    int32_t block_table[BATCH_MAX][ROWS_MAX];
};

/* Three entries, with 3, 0 and 4 queries and 5, 6 and 2 keys. */
static struct problem packed(mfa_pass pass)
{
    struct problem s = {.cu_seqlens_q = {0, 3, 3, 7}, .cu_seqlens_k = {0, 5, 11, 13}};
    mfa_problem *p = &s.problem;
    mfa_problem_init(p, 3, 1, 1, 4, 6, DIM, DIM);
    p->pass = pass;
    p->varlen_q = p->varlen_kv = 1, p->total_q = 7, p->total_kv = 13;
    return s;
}

/* Two entries of one query, with 9 and 4 keys in pages of 4. */
static struct problem paged(void)
{
    struct problem s = {.seqused_k = {9, 4}, .block_table = {{6, 0, 3}, {2, -1, 99}}};
    mfa_problem *p = &s.problem;
    mfa_problem_init(p, 2, 1, 1, 1, 12, DIM, DIM);
    p->page_size = 4, p->kv_batch = 7, p->seqused_k = 1;
    p->block_table_layout = (mfa_layout){ROWS_MAX, 0, 0, 1};
    return s;
}

/* The tensors of a run: inputs of ones, outputs of canaries, each with exactly the rows that the problem says. */
struct memory {
    struct guarded inputs[6], outputs[5];
    mfa_buffers buffers;
};

static float *open_ones(struct guarded *memory, const char *name, int64_t count)
{
    guarded_open(memory, name, (size_t)count * sizeof(float), sizeof(float), GUARDED_END, 0);
    float *ones = (float *)(void *)memory->bytes;
    for (int64_t n = 0; n < count; n++)
        ones[n] = 1;
    return ones;
}

static void memory_open(struct memory *m, struct problem *s)
{
    mfa_problem *p = &s->problem;
    if (p->page_size)
        p->k_layout.batch = p->v_layout.batch = p->page_size * DIM;
    const int64_t q = (p->varlen_q ? p->total_q : p->batch * p->q_len) * DIM;
    const int64_t kv_rows = p->page_size ? p->page_size : p->kv_len;
    const int64_t kv_batch = p->page_size || p->cache_batch_idx ? p->kv_batch : p->batch;
    const int64_t kv = (p->varlen_kv ? p->total_kv : kv_batch * kv_rows) * DIM;
    memset(m, 0, sizeof *m);
    mfa_buffers *b = &m->buffers;
    *b = (mfa_buffers){.size = sizeof *b,
                       .cu_seqlens_q = {p->varlen_q ? s->cu_seqlens_q : NULL, 0},
                       .cu_seqlens_k = {p->varlen_kv ? s->cu_seqlens_k : NULL, 0},
                       .seqused_k = {p->seqused_k ? s->seqused_k : NULL, 0},
                       .leftpad_k = {p->leftpad_k ? s->leftpad_k : NULL, 0},
                       .cache_batch_idx = {p->cache_batch_idx ? s->cache_batch_idx : NULL, 0},
                       .block_table = {p->page_size ? s->block_table : NULL, 0}};
    b->q.base = open_ones(&m->inputs[0], "q", q);
    b->k.base = open_ones(&m->inputs[1], "k", kv);
    b->v.base = open_ones(&m->inputs[2], "v", kv);
    const struct {
        mfa_buffer *buffer;
        int64_t count;
        int backward;
    } outputs[] = {{&b->o, q, 0}, {&b->lse, q / DIM, 0}, {&b->dq, q, 1}, {&b->dk, kv, 1}, {&b->dv, kv, 1}};
    for (int n = 0; n < 5; n++)
        if (outputs[n].backward == (p->pass == MFA_BACKWARD)) {
            guarded_open(&m->outputs[n], "output", (size_t)outputs[n].count * sizeof(float), sizeof(float), GUARDED_END,
                         CANARY);
            outputs[n].buffer->base = m->outputs[n].bytes;
        }
    if (p->pass == MFA_BACKWARD) {
        b->o.base = open_ones(&m->inputs[3], "o", q);
        b->lse.base = open_ones(&m->inputs[4], "lse", q / DIM);
        b->d_o.base = open_ones(&m->inputs[5], "d_o", q);
    }
}

static void memory_close(struct memory *m)
{
    for (int n = 0; n < 6; n++)
        guarded_close(&m->inputs[n]);
    for (int n = 0; n < 5; n++)
        guarded_close(&m->outputs[n]);
}

/* Whether no byte of the outputs has been written; with `all`, whether every number has. */
static int written(const struct memory *m, int all)
{
    for (int n = 0; n < 5; n++)
        for (size_t at = 0; at < m->outputs[n].size; at += sizeof(float)) {
            float number, canary;
            memcpy(&number, m->outputs[n].bytes + at, sizeof number);
            memset(&canary, CANARY, sizeof canary);
            const int is_canary = memcmp(&number, &canary, sizeof number) == 0;
            if (is_canary == all || isnan(number))
                return 0;
        }
    return 1;
}

/* The run returns MFA_INVALID with a sentence that has `words`. */
static void refuses(mfa_context *context, struct problem s, const char *words)
{
    struct memory m;
    memory_open(&m, &s);
    assert_int_equal(mfa_attention(context, &s.problem, &m.buffers, NULL), MFA_INVALID);
    print_message("%s\n", mfa_last_error());
    assert_non_null(strstr(mfa_last_error(), words));
    assert_true(written(&m, 0));
    memory_close(&m);
}

static void test_sentences(void **state)
{
    mfa_context *context = test_context;
    (void)state;
    for (int pass = MFA_FORWARD; pass <= MFA_BACKWARD; pass++) {
        struct problem s = packed((mfa_pass)pass);
        s.cu_seqlens_q[0] = -1;
        refuses(context, s,
                "cu_seqlens_q[0] is -1 and cu_seqlens_q[1] is 3; they must be within the 7 rows of total_q");
        s = packed((mfa_pass)pass), s.cu_seqlens_q[3] = 8;
        refuses(context, s, "cu_seqlens_q[3] is 8; they must be within the 7 rows of total_q");
        s = packed((mfa_pass)pass), s.cu_seqlens_k[3] = INT32_MAX;
        refuses(context, s, "they must be within the 13 rows of total_kv");
        s = packed((mfa_pass)pass), s.cu_seqlens_q[2] = 2;
        refuses(context, s, "cu_seqlens_q[1] is 3 and cu_seqlens_q[2] is 2; they must not fall");
        s = packed((mfa_pass)pass), s.cu_seqlens_q[1] = s.cu_seqlens_q[2] = 1;
        refuses(context, s, "cu_seqlens_q[2] is 1 and cu_seqlens_q[3] is 7; that is more than q_len, 4");
        s = packed((mfa_pass)pass), s.problem.seqused_k = 1, s.seqused_k[2] = 3;
        refuses(context, s, "seqused_k[2] is 3; it must be 0 to 2, the keys of the entry");
        s = packed((mfa_pass)pass), s.problem.leftpad_k = 1, s.leftpad_k[1] = -1;
        refuses(context, s, "leftpad_k[1] is -1; it must be 0 to 6, the keys that count");
    }
    struct problem s = paged();
    s.block_table[0][2] = 7;
    refuses(context, s, "block_table[0][2] is 7; there are 7 pages, from 0 on");
    s = paged(), s.block_table[1][0] = -1;
    refuses(context, s, "block_table[1][0] is -1");
    s = paged(), s.seqused_k[1] = 13;
    refuses(context, s, "seqused_k[1] is 13; it must be 0 to 12");
    s = paged(), s.problem.page_size = 0, s.problem.cache_batch_idx = 1, s.cache_batch_idx[1] = 7;
    refuses(context, s, "cache_batch_idx[1] is 7; it must be 0 to 6, the last entry of k and v");
}

static int64_t draw(struct generator *r, int64_t low, int64_t high)
{
    return random_between(r, low, high);
}

/* A number that is mostly right. */
static int32_t number(struct generator *r, int64_t low, int64_t high)
{
    static const int32_t wild[] = {INT32_MIN, -1, INT32_MAX, 1 << 20};
    const int64_t kind = draw(r, 0, 60);
    return kind == 0                 ? wild[draw(r, 0, 3)]
           : kind == 1 || low > high ? (int32_t)draw(r, low - 2, high > low ? high + 2 : low + 2)
                                     : (int32_t)draw(r, low, high);
}

static struct problem draw_problem(struct generator *r)
{
    struct problem s = {.cu_seqlens_q = {0}};
    mfa_problem *p = &s.problem;
    const int64_t kind = draw(r, 0, 3); /* of keys: dense, packed, by index, in pages */
    mfa_problem_init(p, draw(r, 1, BATCH_MAX), 1, 1, draw(r, 0, ROWS_MAX), draw(r, 1, ROWS_MAX), DIM, DIM);
    p->pass = kind < 2 && draw(r, 0, 1) ? MFA_BACKWARD : MFA_FORWARD;
    p->varlen_q = (int32_t)draw(r, 0, 1), p->seqused_k = (int32_t)draw(r, 0, 1), p->leftpad_k = (int32_t)draw(r, 0, 1);
    p->bottom_right = (int32_t)draw(r, 0, 1), p->upper = draw(r, 0, 1) ? 0 : MFA_BAND_OPEN_UPPER;
    p->total_q = p->varlen_q ? draw(r, 0, 2 * ROWS_MAX) : 0;
    p->varlen_kv = kind == 1, p->total_kv = kind == 1 ? draw(r, 0, 2 * ROWS_MAX) : 0;
    p->cache_batch_idx = kind == 2, p->kv_batch = kind >= 2 ? draw(r, 1, 8) : 0;
    p->page_size = kind == 3 ? draw(r, 1, 9) : 0;
    p->block_table_layout = (mfa_layout){ROWS_MAX, 0, 0, 1};
    for (int64_t b = 0; b < p->batch; b++) {
        s.cu_seqlens_q[b + 1] = number(r, s.cu_seqlens_q[b], p->total_q);
        s.cu_seqlens_k[b + 1] = number(r, s.cu_seqlens_k[b], p->total_kv);
        s.seqused_k[b] = number(r, 0, kind == 1 ? (int64_t)s.cu_seqlens_k[b + 1] - s.cu_seqlens_k[b] : p->kv_len);
        s.leftpad_k[b] = number(r, 0, p->seqused_k ? s.seqused_k[b] : p->kv_len / 4);
        s.cache_batch_idx[b] = number(r, 0, p->kv_batch - 1);
        for (int n = 0; n < ROWS_MAX; n++)
            s.block_table[b][n] = number(r, 0, p->kv_batch - 1);
    }
    return s;
}

/* What include/mfa.h says of the numbers. */
static int is_right(const struct problem *s)
{
    const mfa_problem *p = &s->problem;
    int right = 1;
    for (int64_t b = 0; b < p->batch; b++) {
        const int64_t q_first = s->cu_seqlens_q[b], q_end = s->cu_seqlens_q[b + 1];
        const int64_t k_first = s->cu_seqlens_k[b], k_end = s->cu_seqlens_k[b + 1];
        if (p->varlen_q)
            right &= 0 <= q_first && q_first <= q_end && q_end <= p->total_q && q_end - q_first <= p->q_len;
        if (p->varlen_kv)
            right &= 0 <= k_first && k_first <= k_end && k_end <= p->total_kv && k_end - k_first <= p->kv_len;
        const int64_t there = p->varlen_kv ? k_end - k_first : p->kv_len, used = p->seqused_k ? s->seqused_k[b] : there;
        const int64_t padding = p->leftpad_k ? s->leftpad_k[b] : 0;
        right &= 0 <= used && used <= there && 0 <= padding && padding <= used;
        if (p->cache_batch_idx)
            right &= 0 <= s->cache_batch_idx[b] && s->cache_batch_idx[b] < p->kv_batch;
        for (int64_t key = padding; key < used && key < ROWS_MAX && right && p->page_size; key++) {
            const int32_t page = s->block_table[b][key / p->page_size];
            right &= 0 <= page && page < p->kv_batch;
        }
    }
    return right;
}

static void test_any_numbers(void **state)
{
    mfa_context *context = test_context;
    struct generator r;
    int right = 0;
    (void)state;
    generator_seed(&r, 1, "numbers");
    for (int n = 0; n < draws; n++) {
        struct problem s = draw_problem(&r);
        struct memory m;
        memory_open(&m, &s);
        const mfa_status status = mfa_attention(context, &s.problem, &m.buffers, NULL);
        const mfa_status expected = is_right(&s) ? MFA_OK : MFA_INVALID;
        if (status != expected || !written(&m, status == MFA_OK)) {
            char text[512] = "";
            mfa_problem_print(&s.problem, text, sizeof text);
            fail_msg("draw %d, %s: %s (%s), or outputs that are written or not", n, text, mfa_status_name(status),
                     mfa_last_error());
        }
        right += status == MFA_OK;
        memory_close(&m);
    }
    print_message("%d draws, of which %d have right numbers\n", draws, right);
    assert_in_range(right, draws / 10, draws * 9 / 10);
}

/* The band of a canonical problem from the last query and key, where all entries agree on it. */
static void test_bottom_right(void **state)
{
    static const struct {
        const char *text;
        int64_t lower, upper;
        int32_t bottom_right;
    } cases[] = {
        {"forward f32 b1 h1 q5 kv9 d8 causal bottom_right", -5, 4, 0},
        {"forward f32 b1 h1 q9 kv5 d8 lower-1 causal bottom_right", -5, -4, 0},
        {"forward f32 b1 h1 q5 kv9 d8 bottom_right", -5, 9, 0},
        {"forward f32 b2 h1 q5 kv9 d8 causal seqused_k bottom_right", -19, 0, 1},
        {"forward f32 b2 h1 q5 kv9 d8 lower-2 upper3 seqused_k bottom_right", -2, 3, 1},
        {"forward f32 b2 h1 q5 kv9 d8 seqused_k bottom_right", -5, 9, 0},
        {"forward f32 b2 h1 q5 kv9 d8 causal seqused_k", -5, 0, 0},
    };
    (void)state;
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        mfa_problem given, canonical;
        print_message("%s\n", cases[n].text);
        assert_int_equal(mfa_problem_parse(cases[n].text, &given), MFA_OK);
        assert_int_equal(mfa_problem_check(&given, &canonical), MFA_OK);
        assert_int_equal(canonical.lower, cases[n].lower);
        assert_int_equal(canonical.upper, cases[n].upper);
        assert_int_equal(canonical.bottom_right, cases[n].bottom_right);
    }
}

int main(int count, char **words)
{
    if (count > 1)
        draws = atoi(words[1]);
    report_begin("test_varlen", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bottom_right),
        cmocka_unit_test(test_sentences),
        cmocka_unit_test(test_any_numbers),
    };
    guarded_report_faults();
    return report_group(sizeof tests / sizeof *tests,
                        cmocka_run_group_tests(tests, test_context_open, test_context_close));
}
