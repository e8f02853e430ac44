/* Runs what metalsim/cost counts: for each row of src/metal/tiles.c, and some other problems, one threadgroup in the
 * middle of a long sequence.
 *
 *     metal_cost           lists the cases, a line each
 *     metal_cost N         runs case N; metalsim/cost/cost.py says with which compiler
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "metal/gpu.h"
#include "metal/run.h"
#include "metal/source.h"
#include "support/test_case.h"

#define LENGTH 2048        /* of the sequence that a threadgroup walks along; half of it if causal, as on average */
#define DECODE_LENGTH 8192 /* keys of a decode step */
#define MAP_BLOCK 64       /* queries, and keys, of a block of a map */
#define PAGE 16            /* keys of a page */
#define SEED 1             /* of the inputs */

struct item {
    enum mfa_metal_kernel kernel;
    int family, dtype, dim, causal, dropout, map, packed, paged, type; /* type: of K and V */
    int heads;                                                         /* for each KV head */
};

static const struct item *counted; /* the case that is run */

/* --- Cases ---------------------------------------------------------------------------------------- */

static int decodes(enum mfa_metal_kernel kernel)
{
    return kernel == MFA_METAL_DECODE || kernel == MFA_METAL_DECODE_VECTOR;
}

static mfa_problem problem_of(const struct item *item, int q_len, int kv_len)
{
    mfa_problem problem;
    mfa_problem_init(&problem, 1, item->heads, 1, q_len, kv_len, item->dim, item->dim);
    problem.dtype = item->dtype;
    problem.dropout = item->dropout ? 0.1 : 0;
    if (item->causal) /* a block of keys is seen by later queries only, and one of queries sees earlier keys only */
        problem.upper = kv_len > q_len ? kv_len - q_len : 0;
    if (item->map) {
        problem.block_map_q = problem.block_map_kv = MAP_BLOCK;
        mfa_problem_make_dense(&problem);
    }
    if (item->packed)
        problem.varlen_q = problem.varlen_kv = 1, problem.total_q = q_len, problem.total_kv = kv_len;
    if (item->type) { /* of 4 bits with a scale for each block of 32 columns, as they are usual */
        problem.k_type = problem.v_type = item->type;
        problem.k_group = problem.v_group = item->type == MFA_KV_INT4 ? 32 : 0;
        mfa_problem_make_dense(&problem);
    }
    if (item->paged) {
        problem.page_size = PAGE, problem.kv_batch = kv_len / PAGE;
        mfa_problem_make_dense(&problem);
    }
    return problem;
}

static const struct mfa_metal_tile *tile_of(const struct item *item)
{
    struct mfa_choice choice;
    mfa_problem problem = problem_of(item, decodes(item->kernel) ? 1 : LENGTH, LENGTH);
    problem.pass = item->kernel >= MFA_METAL_BACKWARD_DQ ? MFA_BACKWARD : MFA_FORWARD;
    mfa_problem_check(&problem, &problem);
    metal_choose((struct metal_target){.family = item->family}, &problem, &choice);
    return mfa_metal_tiles_find(item->kernel, &choice.key);
}

static mfa_problem problem_of_case(const struct item *item)
{
    const struct mfa_metal_tile *tile = tile_of(item);
    const int length = item->causal ? LENGTH / 2 : LENGTH;
    if (decodes(item->kernel))
        return problem_of(item, 1, DECODE_LENGTH);
    if (item->kernel == MFA_METAL_BACKWARD_DKV)
        return problem_of(item, length, tile->block_kv);
    return problem_of(item, tile->block_q > 8 ? tile->block_q : 16, length);
}

/* Opens the inputs of a case; if it is packed, ones whose only sequence has all rows. */
static uint64_t open_inputs(struct inputs *inputs, const mfa_problem *p, const char *text)
{
    uint64_t seed = SEED;
    inputs_open(inputs, p, (struct variant){0}, seed, text);
    while (p->varlen_q && (inputs->values[REFERENCE_CU_SEQLENS_Q][0] > 0 ||
                           inputs->values[REFERENCE_CU_SEQLENS_Q][1] < (double)p->q_len ||
                           inputs->values[REFERENCE_CU_SEQLENS_K][0] > 0 ||
                           inputs->values[REFERENCE_CU_SEQLENS_K][1] < (double)p->kv_len)) {
        inputs_close(inputs);
        inputs_open(inputs, p, (struct variant){0}, ++seed, text);
    }
    return seed;
}

/* The products of 8 x 8 matrices that the visible scores need. */
static double useful_products(const struct item *item)
{
    const mfa_problem p = problem_of_case(item);
    const int products = item->kernel == MFA_METAL_BACKWARD_DKV ? 4 : item->kernel == MFA_METAL_BACKWARD_DQ ? 3 : 2;
    struct inputs inputs; /* for the block map */
    struct reference_view map;
    double scores = 0;
    char text[256];
    if (item->map) {
        mfa_problem_print(&p, text, sizeof text);
        open_inputs(&inputs, &p, text);
        map = reference_view(&p, REFERENCE_BLOCK_MAP, inputs.values[REFERENCE_BLOCK_MAP]);
    }
    for (int64_t i = 0; i < p.q_len; i++) {
        const int64_t end = item->causal && i + p.upper < p.kv_len ? i + p.upper + 1 : p.kv_len;
        for (int64_t j = 0; item->map && j < end; j++)
            scores += reference_is_mapped(&p, &map, 0, 0, i, j);
        scores += item->map ? 0 : end;
    }
    if (item->map)
        inputs_close(&inputs);
    return scores * item->heads * item->dim * products / 512;
}

/* Family 9 is listed where its tile or the text of its program is another one. */
static int differs(struct item item)
{
    const struct mfa_metal_tile *own = tile_of(&item);
    item.family = 7;
    return item.dtype == MFA_BF16 || memcmp(own, tile_of(&item), sizeof *own);
}

enum { PLAIN, CAUSAL_OR_TWO_ROWS, DROPOUT, MAP, PACKED, PAGED, INT8, INT4, VARIANTS };

/* Each row in f16 and f32, and what is used most in bf16, and causal or with two rows, with dropout, with a block map,
 * of packed sequences, in pages, and in codes. */
static int is_case(enum mfa_metal_kernel kernel, int dtype, int dim, int variant)
{
    const int usual = dim == 64 || dim == 128;
    if (variant == DROPOUT)
        return dtype == MFA_F16 && usual && !decodes(kernel);
    if (variant == MAP)
        return dtype == MFA_F16 && dim == 64 && !decodes(kernel);
    if (variant == PACKED)
        return dtype == MFA_F16 && dim == 64 && (kernel == MFA_METAL_FORWARD || kernel == MFA_METAL_BACKWARD_DKV);
    if (variant == PAGED)
        return dtype == MFA_F16 && dim == 128 && (kernel == MFA_METAL_FORWARD || decodes(kernel));
    if (variant == INT8 && kernel == MFA_METAL_FORWARD)
        return dtype == MFA_F16 && dim == 64;
    if (variant == INT8 || variant == INT4)
        return dtype == MFA_F16 && dim == 128 && decodes(kernel);
    if (variant)
        return dtype == MFA_F16 && usual && kernel != MFA_METAL_DECODE;
    return usual || (dtype != MFA_BF16 && dim > 128) || (dtype == MFA_F16 && !decodes(kernel));
}

static int list_cases(struct item *items)
{
    static const enum mfa_metal_kernel kernels[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_DECODE_VECTOR,
                                                    MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV};
    static const int dims[] = {40, 64, 80, 96, 128, 256, 512}, dtypes[] = {MFA_F16, MFA_BF16, MFA_F32};
    int count = 0;
    for (int k = 0; k < 5; k++)
        for (int t = 0; t < 3; t++)
            for (int d = 0; d < 7; d++)
                for (int variant = 0; variant < VARIANTS; variant++)
                    for (int family = 7; family <= 9; family += 2) {
                        const int causal = variant == CAUSAL_OR_TWO_ROWS && !decodes(kernels[k]);
                        const int heads = kernels[k] == MFA_METAL_DECODE             ? 8
                                          : variant == CAUSAL_OR_TWO_ROWS && !causal ? 2
                                                                                     : 1;
                        const int type = variant == INT8 ? MFA_KV_INT8 : variant == INT4 ? MFA_KV_INT4 : 0;
                        const struct item item = {kernels[k],
                                                  family,
                                                  dtypes[t],
                                                  dims[d],
                                                  causal,
                                                  variant == DROPOUT,
                                                  variant == MAP,
                                                  variant == PACKED,
                                                  variant == PAGED,
                                                  type,
                                                  heads};
                        if (is_case(kernels[k], dtypes[t], dims[d], variant) && (family == 7 || differs(item)))
                            items[count++] = item;
                    }
    return count;
}

static void print_case(int number, const struct item *item)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    const struct mfa_metal_tile *tile = tile_of(item);
    const mfa_problem problem = problem_of_case(item);
    char name[16];
    snprintf(name, sizeof name, "%d-head%s", item->heads, item->heads > 1 ? "s" : "");
    printf("%d %s %d %s %d %s %dx%d %dx%dx%d %.3f %lld\n", number, mfa_metal_source_function(item->kernel),
           item->family, dtypes[item->dtype], item->dim,
           item->type              ? mfa_kv_type_name(item->type)
           : item->paged           ? "paged"
           : item->packed          ? "packed"
           : decodes(item->kernel) ? name
           : item->causal          ? "causal"
           : item->dropout         ? "dropout"
           : item->map             ? "map"
                                   : "full",
           tile->block_q, tile->block_kv, tile->row_groups, tile->split, tile->key_groups, useful_products(item),
           (long long)problem.kv_len);
}

/* --- A run ---------------------------------------------------------------------------------------- */

/* Marks the program that is counted, and leaves out what run.c adds to the text. */
static char *mark(enum mfa_metal_kernel kernel, char *text)
{
    static const char first[] = "#define DTYPE_"; /* source.c's */
    const struct mfa_metal_tile *tile = tile_of(counted);
    char *own = strstr(text, first), *marked = NULL, block[64];
    size_t length;
    FILE *memory = kernel == counted->kernel && own ? open_memstream(&marked, &length) : NULL;
    if (!memory)
        return text;
    snprintf(block, sizeof block, "#define BLOCK_Q %d\n#define BLOCK_KV %d\n", tile->block_q, tile->block_kv);
    if (!strstr(own, block)) {
        fprintf(stderr, "the run has another tile than the case, whose text would have\n%s", block);
        exit(2);
    }
    fprintf(memory, "#define METALSIM_COST %s\n%s", mfa_metal_source_function(kernel), own);
    fclose(memory);
    free(text);
    return marked;
}

/* Whether the results are right, too: what is counted computes them. */
static int run_case(const struct item *item)
{
    /* In a larger grid, no sequence would be split but that of a decode step. */
    const struct metal_target target = {.family = item->family, .splits = !decodes(item->kernel)};
    const int backward = item->kernel >= MFA_METAL_BACKWARD_DQ;
    struct one_case one = {.problem = problem_of_case(item),
                           .passes = backward ? CASE_FORWARD | CASE_BACKWARD : CASE_FORWARD};
    struct test_case test_case;
    struct operands operands;
    struct reference results = {0};
    struct metal_trace trace;
    counted = item;
    mfa_problem_print(&one.problem, one.text, sizeof one.text);
    struct inputs inputs;
    const uint64_t seed = open_inputs(&inputs, &one.problem, one.text);
    inputs_close(&inputs);
    test_case_open(&test_case, &one, (struct variant){0}, seed);
    operands_open(&operands, &test_case.inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    mfa_status status = metal_run(&operands, target, 0, &trace);
    operands_collect(&operands, &results);
    if (status == MFA_OK && backward) {
        operands_turn(&operands, DENSE, &results);
        status = metal_run(&operands, target, 0, &trace);
        operands_collect(&operands, &results);
    }
    if (status != MFA_OK)
        fprintf(stderr, "%s\n", mfa_last_error());
    /* bfloat of family 9 is counted as another type (metalsim/include/metalsim/types.h). */
    const int unknown = item->family >= 9 && item->dtype == MFA_BF16;
    const int fine = status == MFA_OK && (unknown || test_case_is_right(&test_case, "counted", &results));
    reference_close(&results);
    operands_close(&operands);
    test_case_close(&test_case);
    return fine;
}

int main(int count, char **words)
{
    static struct item items[5 * 3 * 7 * VARIANTS * 2];
    /* The kernel that is counted is optimised by metalsim/cost/compiler.py. */
    const struct gpu_settings settings = {.cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim",
                                          .unoptimised = 1};
    const int cases = list_cases(items), number = count > 1 ? atoi(words[1]) : -1;
    for (int n = 0; count == 1 && n < cases; n++)
        print_case(n, &items[n]);
    if (count == 1)
        return 0;
    if (number < 0 || number >= cases) {
        fprintf(stderr, "there is no case %s; they are numbered from 0 to %d\n", words[1], cases - 1);
        return 2;
    }
    gpu_set(&settings);
    metal_rewrite = mark;
    return run_case(&items[number]) ? 0 : 1;
}
