#include "metal/problems.h"

#include <string.h>

#include "core/problem.h"
#include "support/cases.h"
#include "support/random.h"

#define SHARING 20 /* random problems share programs */

static void finish(struct generated *g)
{
    const mfa_problem *p = &g->problem;
    const int reads_only = p->page_size || p->cache_batch_idx || p->k_type || p->v_type;
    g->passes = reads_only ? CASE_FORWARD : CASE_FORWARD | CASE_BACKWARD;
    mfa_problem_print(&g->problem, g->text, sizeof g->text);
}

/* Sequences of their own lengths, of several kinds. */
static void vary_lengths(mfa_problem *p, int n)
{
    p->batch = 2 + n % 2;
    p->varlen_q = n % 3 != 0, p->varlen_kv = n % 4 == 0, p->seqused_k = n % 4 != 0, p->leftpad_k = n % 4 == 1;
    p->bottom_right = n % 5 < 3;
    p->total_q = p->varlen_q ? p->batch * p->q_len - n % 3 : 0;
    p->total_kv = p->varlen_kv ? p->batch * p->kv_len - 5 : 0;
    p->cache_batch_idx = n % 8 == 3, p->page_size = n % 4 == 2 ? (n % 3 == 0 ? 7 : n % 3 == 1 ? 16 : 64) : 0;
    p->kv_batch = p->cache_batch_idx ? 4 : p->page_size ? 11 : 0;
    mfa_problem_make_dense(p);
}

/* Codes of K, of V or of both, of each type that the columns allow. */
static void vary_types(mfa_problem *p, int n)
{
    static const int64_t groups[] = {0, 32, 20, 64, 6};
    const int32_t types[] = {n % 6, (n + n / 6 + 2) % 6};
    p->k_type = types[0] >= MFA_KV_INT4 && p->head_dim % 32 ? MFA_KV_E4M3 : types[0];
    p->v_type = types[1] >= MFA_KV_INT4 && p->value_dim % 32 ? MFA_KV_INT8 : types[1];
    p->k_group = p->k_type ? groups[p->k_type < MFA_KV_INT4 ? n % 5 : n % 2] : 0;
    p->v_group = p->v_type ? groups[p->v_type < MFA_KV_INT4 ? (n + 1) % 5 : n / 2 % 2] : 0;
    mfa_problem_make_dense(p);
}

int problems_of_tiles(struct generated *g, uint64_t seed, int n)
{
    /* Where rows of src/metal/tiles.c begin and end. */
    static const int columns[][2] = {{1, 64},    {64, 7},    {65, 128},  {128, 72},
                                     {129, 256}, {256, 130}, {257, 512}, {512, 264}};
    static const int32_t dtypes[] = {MFA_F32, MFA_F16, MFA_BF16};
    static const int families[] = {7, 9};
    static const int32_t masks[] = {MFA_MASK_NONE, MFA_MASK_BOOL, MFA_MASK_ADDITIVE};
    const int c = n % 8, dtype = n / 8 % 3, family = n / 24 % 2, decode = n / 48 % 2;
    (void)seed;
    if (n >= PROBLEMS_OF_TILES)
        return 0;
    memset(g, 0, sizeof *g);
    if (decode)
        mfa_problem_init(&g->problem, 1, 1 + n % 3, 1, 1 + (n / 8 + n) % 4, 530, columns[c][0], columns[c][1]);
    else
        mfa_problem_init(&g->problem, 1, 2, 1, 41, 75, columns[c][0], columns[c][1]);
    g->problem.dtype = dtypes[dtype];
    g->problem.mask = masks[n % 3];
    g->problem.mask_dtype = dtypes[(dtype + n / 8) % 3];
    if (n % 4 != 1)
        g->problem.upper = decode ? g->problem.kv_len - g->problem.q_len : 20;
    if (n % 5 == 2)
        g->problem.softcap = 3;
    g->problem.alibi = n % 7 == 3, g->problem.sinks = n % 5 == 2;
    g->problem.dropout = (c + family + decode + n / 96) % 2 ? 0.25 : 0; /* with half of the threads, or with all */
    g->target = (struct metal_target){.family = families[family], .halved = n / 96 % 2};
    g->variant.dlse = n % 2, g->variant.heads_broadcast = n % 4;
    if ((n / 2 + family + decode) % 2) { /* sizes that tiles divide, or that do not */
        g->problem.block_map_q = n % 5 == 0 ? 48 : 32, g->problem.block_map_kv = n % 3 == 0 ? 48 : n % 3 == 1 ? 64 : 16;
        mfa_problem_make_dense(&g->problem);
        g->variant.map_broadcast = n % 3 ? 0 : ALONG_HEAD;
    }
    if (n % 7 == 1 || n % 7 == 4)
        vary_lengths(&g->problem, n / 7);
    if (n % 5 == 3)
        vary_types(&g->problem, n / 5);
    g->problem.out_type = n % 11 % 3 == 1 ? MFA_OUT_F32 : MFA_OUT_SAME;
    finish(g);
    return 1;
}

/* Types, columns, features, tiles: what is compiled. */
static void draw_program(struct generated *g, struct generator *r)
{
    static const int32_t dtypes[] = {MFA_F32, MFA_F16, MFA_BF16};
    static const int64_t columns[] = {8, 16, 24, 40, 64, 64, 72, 128, 136, 192, 256, 320, 512};
    const int64_t choices = sizeof columns / sizeof *columns;
    g->problem.head_dim = columns[random_between(r, 0, choices - 1)];
    g->problem.value_dim = random_between(r, 0, 2) ? g->problem.head_dim : columns[random_between(r, 0, choices - 1)];
    g->problem.dtype = dtypes[random_between(r, 0, 2)];
    g->problem.mask = (int32_t)random_between(r, MFA_MASK_NONE, MFA_MASK_ADDITIVE);
    g->problem.mask_dtype = dtypes[random_between(r, 0, 2)];
    g->problem.softcap = random_between(r, 0, 3) ? 0 : 2;
    g->problem.upper = random_between(r, 0, 1); /* whether there is a band */
    g->target.family = random_between(r, 0, 1) ? 7 : 9;
    g->target.halved = !random_between(r, 0, 3);
    g->problem.alibi = !random_between(r, 0, 3), g->problem.sinks = !random_between(r, 0, 3);
    g->problem.dropout = !random_between(r, 0, 2);     /* whether there is any */
    g->problem.block_map_q = !random_between(r, 0, 2); /* whether there is a map */
    g->problem.seqused_k = !random_between(r, 0, 2);   /* whether lengths differ */
    if (!random_between(r, 0, 2))
        random_types(r, &g->problem);
    g->problem.out_type = random_between(r, 0, 2) ? MFA_OUT_SAME : MFA_OUT_F32;
}

int problems_random(struct generated *g, uint64_t seed, int n)
{
    struct generator shared, r;
    generator_seed(&shared, seed + (uint64_t)(n / SHARING), "program");
    generator_seed(&r, seed + (uint64_t)n, "problem");
    memset(g, 0, sizeof *g);
    draw_program(g, &shared);
    const struct generated program = *g;
    const int64_t wide = program.problem.head_dim > 128 || program.problem.value_dim > 128;
    static const int64_t groups[] = {1, 2, 3, 4, 7};
    const int64_t kv_heads = random_between(&r, 1, 3), q_len = random_length(&r, 150);
    const int64_t kv_len = random_length(&r, wide ? 150 : 700);
    /* Up to 7 fewer columns, which are padded to the same number; codes of 4 bits need all. */
    const int64_t head_dim =
        program.problem.head_dim - random_between(&r, 0, program.problem.k_type < MFA_KV_INT4 ? 7 : 0);
    const int64_t value_dim =
        program.problem.value_dim - random_between(&r, 0, program.problem.v_type < MFA_KV_INT4 ? 7 : 0);
    mfa_problem_init(&g->problem, random_between(&r, 1, 2), kv_heads * groups[random_between(&r, 0, 4)], kv_heads,
                     q_len, kv_len, head_dim, value_dim);
    g->problem.dtype = program.problem.dtype;
    g->problem.mask = program.problem.mask, g->problem.mask_dtype = program.problem.mask_dtype;
    g->problem.softcap = program.problem.softcap;
    g->problem.alibi = program.problem.alibi, g->problem.sinks = program.problem.sinks;
    g->problem.scale = random_between(&r, 0, 3) ? g->problem.scale : 0.7;
    static const double dropouts[] = {0.1, 0.5, 0.9, 1, 1e-6}; /* the last drops nothing */
    if (program.problem.dropout > 0)
        g->problem.dropout = dropouts[random_between(&r, 0, 4)];
    if (program.problem.upper)
        random_band(&r, &g->problem);
    if (program.problem.block_map_q)
        random_block_map(&r, &g->problem);
    if (program.problem.seqused_k)
        random_varlen(&r, &g->problem);
    g->problem.out_type = program.problem.out_type;
    g->problem.k_type = program.problem.k_type, g->problem.v_type = program.problem.v_type;
    random_groups(&r, &g->problem);
    mfa_problem_make_dense(&g->problem);
    random_memory(&r, &g->problem, &g->variant, &g->arrangement);
    g->variant.map_broadcast = (int)random_between(&r, 0, 11);
    g->variant.heads_broadcast = (int)random_between(&r, 0, 3);
    finish(g);
    return 1;
}
