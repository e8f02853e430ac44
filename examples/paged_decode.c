/* A decode loop with a paged KV cache in int8: two sequences of different length, whose prompt is the same and is kept
 * once. Each step appends a key and a value to each sequence, and compares attention over the pages with attention over
 * the same numbers in dense f32.
 *
 *     cc examples/paged_decode.c -Iinclude -Lbuild/release -Wl,-rpath,$PWD/build/release -lmfa -lm -o paged_decode
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "mfa.h"

enum { Q_HEADS = 8, KV_HEADS = 2, HEAD_DIM = 64, ROW = KV_HEADS * HEAD_DIM };
enum { SEQUENCES = 2, PROMPT = 40, STEPS = 50, PAGE_SIZE = 16, PAGES = 32 };
enum { LONGEST = 160, TABLE = LONGEST / PAGE_SIZE };
_Static_assert(2 * PROMPT + STEPS <= LONGEST, "no sequence has more keys");

/* Any layout will do, as it is described by strides: here all that belongs to a page is in one place, so a page is
 * copied by an assignment. A row of codes, of a token and head, has one scale. */
struct page {
    int8_t k[PAGE_SIZE][KV_HEADS][HEAD_DIM], v[PAGE_SIZE][KV_HEADS][HEAD_DIM];
    float k_scale[PAGE_SIZE][KV_HEADS], v_scale[PAGE_SIZE][KV_HEADS];
};
static struct page pool[PAGES];
static int32_t pages_used;

/* The cache of a sequence: its pages, in order, and how many keys are in them. */
static int32_t block_table[SEQUENCES][TABLE], seqused_k[SEQUENCES];

static float q[SEQUENCES][Q_HEADS][HEAD_DIM], o[SEQUENCES][Q_HEADS][HEAD_DIM], o_dense[Q_HEADS][HEAD_DIM];

/* For the comparison: the numbers that the codes stand for, and those that were quantised. */
static struct dense {
    float k[LONGEST][ROW], v[LONGEST][ROW];
} decoded[SEQUENCES], exact[SEQUENCES];

static void fill(float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = 2 * (float)rand() / (float)RAND_MAX - 1;
}

static void check(mfa_status status)
{
    if (status == MFA_OK)
        return;
    fprintf(stderr, "%s: %s\n", mfa_status_name(status), mfa_last_error());
    exit(1);
}

static int32_t new_page(void)
{
    if (pages_used < PAGES)
        return pages_used++;
    fprintf(stderr, "all %d pages are in use\n", PAGES);
    exit(1);
}

/* Quantises the keys and values of a token, of all heads, into the next row of the sequence. */
static void append(int sequence, const float *k, const float *v)
{
    const int at = seqused_k[sequence]++, row = at % PAGE_SIZE;
    int32_t *table = block_table[sequence];
    if (row == 0)
        table[at / PAGE_SIZE] = new_page();
    struct page *page = &pool[table[at / PAGE_SIZE]];
    check(mfa_kv_quantize(MFA_KV_INT8, MFA_F32, KV_HEADS, HEAD_DIM, 0, k, HEAD_DIM, page->k[row], HEAD_DIM,
                          page->k_scale[row], 1));
    check(mfa_kv_quantize(MFA_KV_INT8, MFA_F32, KV_HEADS, HEAD_DIM, 0, v, HEAD_DIM, page->v[row], HEAD_DIM,
                          page->v_scale[row], 1));
    for (int n = 0; n < ROW; n++) {
        const int head = n / HEAD_DIM, column = n % HEAD_DIM;
        exact[sequence].k[at][n] = k[n], exact[sequence].v[at][n] = v[n];
        decoded[sequence].k[at][n] = (float)page->k[row][head][column] * page->k_scale[row][head];
        decoded[sequence].v[at][n] = (float)page->v[row][head][column] * page->v_scale[row][head];
    }
}

/* Begins sequence 1 as a copy of sequence 0: full pages are shared, and the last one, to which both append, is copied.
 * A server would count the users of each page. */
static void fork_sequence(void)
{
    const int full = seqused_k[0] / PAGE_SIZE;
    for (int n = 0; n < full; n++)
        block_table[1][n] = block_table[0][n];
    if (seqused_k[0] % PAGE_SIZE) {
        block_table[1][full] = new_page();
        pool[block_table[1][full]] = pool[block_table[0][full]];
    }
    seqused_k[1] = seqused_k[0];
    decoded[1] = decoded[0], exact[1] = exact[0];
}

/* The larger of two numbers; a NaN if there is one. */
static float larger(float x, float y)
{
    return y > x || isnan(y) ? y : x;
}

/* How far o of a sequence is from attention over dense keys and values. */
static float difference(mfa_context *context, int sequence, struct dense *dense)
{
    float largest = 0;
    mfa_problem problem;
    mfa_problem_init(&problem, 1, Q_HEADS, KV_HEADS, 1, seqused_k[sequence], HEAD_DIM, HEAD_DIM);
    problem.k_layout = problem.v_layout = (mfa_layout){.head = HEAD_DIM, .row = ROW, .column = 1};
    mfa_buffers buffers = {.size = sizeof buffers};
    buffers.q.base = q[sequence], buffers.k.base = dense->k, buffers.v.base = dense->v;
    buffers.o.base = o_dense;
    check(mfa_attention(context, &problem, &buffers, NULL));
    for (int head = 0; head < Q_HEADS; head++)
        for (int n = 0; n < HEAD_DIM; n++)
            largest = larger(largest, fabsf(o[sequence][head][n] - o_dense[head][n]));
    return largest;
}

int main(void)
{
    mfa_context *context;
    check(mfa_context_create(NULL, &context));

    /* One plan serves the whole loop: kv_len is the most keys that a sequence may have. The query is of the newest
     * token, which sees all keys; several new tokens would need upper = 0 and bottom_right = 1. */
    mfa_problem problem;
    mfa_problem_init(&problem, SEQUENCES, Q_HEADS, KV_HEADS, 1, LONGEST, HEAD_DIM, HEAD_DIM);
    problem.page_size = PAGE_SIZE, problem.kv_batch = PAGES, problem.seqused_k = 1;
    problem.block_table_layout = (mfa_layout){.batch = TABLE, .column = 1};
    problem.k_type = problem.v_type = MFA_KV_INT8;
    /* Strides are in elements, which are bytes for codes and floats for scales; the batch is that of the pages. */
    problem.k_layout = (mfa_layout){.batch = sizeof(struct page), .head = HEAD_DIM, .row = ROW, .column = 1};
    problem.k_scale_layout =
        (mfa_layout){.batch = sizeof(struct page) / sizeof(float), .head = 1, .row = KV_HEADS, .column = 1};
    problem.v_layout = problem.k_layout, problem.v_scale_layout = problem.k_scale_layout;
    mfa_buffers buffers = {.size = sizeof buffers};
    buffers.q.base = q, buffers.o.base = o;
    buffers.k.base = pool[0].k, buffers.k_scale.base = pool[0].k_scale;
    buffers.v.base = pool[0].v, buffers.v_scale.base = pool[0].v_scale;
    buffers.block_table.base = block_table, buffers.seqused_k.base = seqused_k;
    char line[256];
    mfa_plan *plan;
    check(mfa_plan_create(context, &problem, &plan));
    check(mfa_plan_describe(plan, line, sizeof line));
    printf("%s\n", line);

    /* Random numbers take the place of a model. Sequence 1 has a longer question after the prompt. */
    float k[ROW], v[ROW], of_decoded = 0, of_exact = 0;
    for (int n = 0; n < PROMPT; n++)
        fill(k, ROW), fill(v, ROW), append(0, k, v);
    fork_sequence();
    for (int n = 0; n < PROMPT; n++)
        fill(k, ROW), fill(v, ROW), append(1, k, v);

    for (int step = 0; step < STEPS; step++) {
        for (int sequence = 0; sequence < SEQUENCES; sequence++)
            fill(k, ROW), fill(v, ROW), append(sequence, k, v);
        fill(&q[0][0][0], SEQUENCES * Q_HEADS * HEAD_DIM);
        check(mfa_plan_run(plan, &buffers, NULL));
        for (int sequence = 0; sequence < SEQUENCES; sequence++) {
            of_decoded = larger(of_decoded, difference(context, sequence, &decoded[sequence]));
            of_exact = larger(of_exact, difference(context, sequence, &exact[sequence]));
        }
    }

    const size_t in_f32 = (size_t)(seqused_k[0] + seqused_k[1]) * 2 * ROW * sizeof(float);
    printf("%d steps; the sequences have %d and %d keys\n", STEPS, seqused_k[0], seqused_k[1]);
    printf("cache: %zu bytes in %d pages; dense in f32, each sequence for itself: %zu bytes\n",
           (size_t)pages_used * sizeof *pool, pages_used, in_f32);
    printf("largest difference of O from dense attention: over the same numbers %g, over those not quantised %g\n",
           of_decoded, of_exact);
    mfa_plan_destroy(plan);
    mfa_context_destroy(context);
    if (of_decoded < 1e-5f && of_exact < 1e-2f)
        return 0;
    fprintf(stderr, "these differences should be below 1e-5 and 1e-2\n");
    return 1;
}
