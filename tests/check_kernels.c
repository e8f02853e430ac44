/* The kernel sets behind cpu/kernels/contract.h, called without the library around them, against the reference.
 *
 *     check_kernels [options of check_attention] [PROBLEM ...]
 *
 * Problems are made so that all pairs of a number of queries, keys, columns of K and columns of V meet, or are those of
 * the command line. Each is run by every set that this machine has for its dtype, with every tiling that the contract
 * allows, of which src/cpu/tiles.c chooses one: splits, panels, keys of a block, tiled or decode kernels. Each worker's
 * scratch lies between guard pages, has exactly the promised size, and holds NaN before each task; so do all outputs
 * and the memory that phases share. Results must be the same bit for bit, whichever worker runs a task and in any order
 * that the contract allows. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/dropout.h"
#include "core/operand.h"
#include "core/problem.h"
#include "cpu/device.h"
#include "cpu/kernels/contract.h"
#include "cpu/sequences.h"
#include "cpu/tiles.h"
#include "reference/element.h"
#include "support/arguments.h"
#include "support/cases.h"
#include "support/operands.h"
#include "support/report.h"
#include "support/test_case.h"

enum { WORKERS = 3, MAX_SPLITS = 4, MAX_TILINGS = 256, MAX_BLOCKS = 8, ANYTHING = 0xff };

/* Multiplications that one set may spend on a case, with all tilings together; MIN_TILINGS are run in any case. */
static const double BUDGET = 3e6;
enum { MIN_TILINGS = 3 };

static const struct kernel_set {
    const char *name;
    mfa_cpu_isa isa;
    int32_t dtype;
    const struct mfa_cpu_kernels *kernels;
} sets[] = {
#define KERNELS(isa, dtype, name) {#name, isa, dtype, &mfa_cpu_kernels_##name},
#include "cpu/kernels/kernels.inc"
#undef KERNELS
};

/* Which workers run the tasks of a phase, and when. */
enum order {
    ALONE,   /* one worker */
    IN_TURN, /* two, which alternate */
    APART,   /* two: the second runs all of its tasks before the first begins; only where no task waits for another */
    THREADS, /* three at once */
    ORDERS
};
static const char *const orders[ORDERS] = {"alone", "two in turn", "two apart", "three threads"};

/* How a pass is cut into tasks. */
struct tiling {
    int decode, panels, block_kv;
    int splits; /* forward */
    int own_dQ; /* backward: dQ is summed in itself */
};

struct test_run { /* one test_case by one set */
    struct test_case *test_case;
    const struct kernel_set *set;
    struct operands operands;
    enum arrangement arrangement;
    struct tiling tiling;
    enum order order;
    struct guarded scratch[WORKERS], sequences;
    struct mfa_cpu_call call;
};

static const char *describe(const struct test_run *t)
{
    const struct tiling *tiling = &t->tiling;
    return test_case_describe(t->test_case, "%s, %s, %d keys a block, %d panels, %d splits%s%s, %s", t->set->name,
                              arrangement_name(t->arrangement), tiling->block_kv, tiling->panels, tiling->splits,
                              tiling->decode ? ", decode" : "", tiling->own_dQ ? ", own dQ" : "", orders[t->order]);
}

/* --- Phases ----------------------------------------------------------------------------------- */

struct phase {
    struct test_run *run;
    mfa_cpu_task_function *task;
    int64_t tasks;
    uint64_t scratch_bytes;
};

/* One task of a worker, whose scratch is the end of a memory of its own. */
static void run_task(const struct phase *phase, int64_t task, int worker)
{
    struct mfa_cpu_call call = phase->run->call;
    const struct guarded *memory = &phase->run->scratch[worker];
    unsigned char *scratch = memory->bytes + memory->size - phase->scratch_bytes;
    memset(scratch, ANYTHING, phase->scratch_bytes);
    call.scratch_bytes = phase->scratch_bytes;
    call.scratch = (char *)((uintptr_t)scratch - (uintptr_t)worker * phase->scratch_bytes);
    phase->task(&call, task, worker);
}

struct worker {
    const struct phase *phase;
    int index;
    pthread_t thread;
};

static void *run_worker(void *data)
{
    const struct worker *worker = data;
    for (int64_t task = worker->index; task < worker->phase->tasks; task += WORKERS)
        run_task(worker->phase, task, worker->index);
    return NULL;
}

static void run_threads(const struct phase *phase)
{
    struct worker workers[WORKERS];
    for (int n = 0; n < WORKERS; n++) {
        workers[n] = (struct worker){.phase = phase, .index = n};
        if (pthread_create(&workers[n].thread, NULL, run_worker, &workers[n])) {
            perror("pthread_create");
            exit(2);
        }
    }
    for (int n = 0; n < WORKERS; n++)
        pthread_join(workers[n].thread, NULL);
}

static void run_phase(struct test_run *t, mfa_cpu_task_function *task, int64_t tasks, uint64_t scratch_bytes, int waits)
{
    const struct phase phase = {t, task, tasks, scratch_bytes};
    for (int n = 0; n < WORKERS; n++)
        if (t->scratch[n].size < scratch_bytes) {
            guarded_close(&t->scratch[n]);
            guarded_open(&t->scratch[n], "scratch", scratch_bytes, 64, GUARDED_END, ANYTHING);
        }
    if (t->order == THREADS) {
        run_threads(&phase);
    } else if (t->order == APART && !waits) {
        for (int worker = 1; worker >= 0; worker--)
            for (int64_t n = worker; n < tasks; n += 2)
                run_task(&phase, n, worker);
    } else {
        for (int64_t n = 0; n < tasks; n++)
            run_task(&phase, n, t->order == ALONE ? 0 : (int)(n % 2));
    }
}

/* --- Passes ----------------------------------------------------------------------------------- */

static void *address(const mfa_buffer *buffer)
{
    return buffer->base ? (char *)buffer->base + buffer->offset : NULL;
}

/* The arguments of every task; the pass adds the memory that its phases share. */
static void make_call(struct test_run *t)
{
    const struct operands *operands = &t->operands;
    const mfa_buffers *b = &operands->buffers;
    mfa_problem p;
    if (mfa_problem_check(&operands->problem, &p) != MFA_OK) {
        fprintf(stderr, "%s: %s\n", t->test_case->text, mfa_last_error());
        exit(2);
    }
    t->call = (struct mfa_cpu_call){
        .args = mfa_problem_args(&p),
        .scale = p.scale,
        .softcap = p.softcap,
        .dS_factor = 1,
        .kept = mfa_dropout_kept(p.dropout),
        .dtype = p.dtype,
        .k_dtype = p.k_type ? CPU_CODES + p.k_type : p.dtype,
        .v_dtype = p.v_type ? CPU_CODES + p.v_type : p.dtype,
        .out_dtype = mfa_operand_out_dtype(&p),
        .features = mfa_key_features(&p),
        .mask_dtype = p.mask_dtype,
        .block_kv = t->tiling.block_kv,
        .panels = t->tiling.panels,
        .decode = t->tiling.decode,
        .int8 = t->test_case->multiplies_int8,
#define INPUT(name, ...) .name = address(&b->name),
#define RESULT(name, ...) .name = address(&b->name),
#define RESULT_LIKE(name, ...) .name = address(&b->name),
#include "core/operands.inc"
    };
    guarded_close(&t->sequences);
    guarded_open(&t->sequences, "sequences", mfa_cpu_sequences_bytes(&t->call, p.pass), 64, GUARDED_END, ANYTHING);
    if (mfa_cpu_sequences_make(&t->call, t->set->kernels->panel, 1, t->tiling.splits, t->sequences.bytes) != MFA_OK) {
        fprintf(stderr, "%s: %s\n", t->test_case->text, mfa_last_error());
        exit(2);
    }
}

static void run_forward(struct test_run *t)
{
    const struct mfa_cpu_kernels *k = t->set->kernels;
    const int64_t count = mfa_cpu_units(&t->call, CPU_PARTIALS);
    const uint64_t scratch = t->tiling.decode ? k->decode_scratch(&t->call) : k->forward_scratch(&t->call);
    struct guarded partials = {.mapping = NULL};
    if (count) {
        guarded_open(&partials, "partials", (size_t)count * k->partial_bytes(&t->call), 64, GUARDED_END, ANYTHING);
        t->call.partials = partials.bytes;
    }
    run_phase(t, t->tiling.decode ? k->decode : k->forward, mfa_cpu_units(&t->call, CPU_PARTS), scratch, 0);
    run_phase(t, k->merge, mfa_cpu_units(&t->call, CPU_MERGES), scratch, 0);
    guarded_close(&partials);
}

static void run_backward(struct test_run *t)
{
    const struct mfa_cpu_kernels *k = t->set->kernels;
    struct mfa_cpu_call *call = &t->call;
    const struct mfa_args *a = &call->args;
    const int64_t groups = mfa_cpu_units(call, CPU_Q_BLOCKS), rows = mfa_cpu_units(call, CPU_Q_ROWS);
    const int64_t blocks = mfa_cpu_units(call, CPU_KV_BLOCKS);
    const size_t real = call->dtype == CPU_F64 ? 8 : 4;
    const struct {
        const char *name;
        void **at;
        size_t size;
    } shared[] = {{"D", &call->D, (size_t)rows * real},
                  {"L of rows", &call->L, (size_t)rows * real},
                  {"dq_semaphore", (void **)&call->dq_semaphore, (size_t)groups * sizeof *call->dq_semaphore},
                  {"sums of dQ", &call->dq_sums,
                   t->tiling.own_dQ ? 0 : (size_t)(rows * mfa_cpu_ceil(a->head_dim, k->lanes) * k->lanes) * real}};
    enum { SHARED = sizeof shared / sizeof *shared };
    struct guarded memory[SHARED] = {{.mapping = NULL}};
    for (int n = 0; n < SHARED; n++)
        if (shared[n].size) {
            guarded_open(&memory[n], shared[n].name, shared[n].size, 64, GUARDED_END, ANYTHING);
            *shared[n].at = memory[n].bytes;
        }
    const uint64_t scratch = k->backward_scratch(call);
    run_phase(t, k->backward_preprocess, groups, scratch, 0);
    if (t->tiling.decode)
        run_phase(t, k->decode_backward, blocks, k->decode_backward_scratch(call), 1);
    else
        run_phase(t, k->backward, blocks, scratch, 1);
    if (call->dbias) {
        const struct mfa_cpu_dbias_tiles tiles = mfa_cpu_dbias_tiles(call, k->panel);
        run_phase(t, k->dbias, tiles.batch * tiles.heads * tiles.rows * tiles.columns, scratch, 0);
    }
    if (call->dsinks)
        run_phase(t, k->dsinks, mfa_cpu_dsinks_count(&call->args), scratch, 0);
    for (int n = 0; n < SHARED; n++)
        guarded_close(&memory[n]);
}

/* Runs the pass of the operands once; 0 if it wrote outside an output. */
static int run(struct test_run *t, struct reference *results)
{
    const int forward = t->operands.problem.pass == MFA_FORWARD;
    const char *what = describe(t);
    memset(results, 0, sizeof *results);
    guarded_testing(what);
    operands_open_outputs(&t->operands, t->arrangement, forward ? FORWARD_OUTPUTS | OUTPUT(O_LOW) : BACKWARD_OUTPUTS);
    make_call(t);
    if (forward)
        run_forward(t);
    else
        run_backward(t);
    const char *overrun = operands_collect(&t->operands, results);
    if (overrun)
        report_fail("%s\n        %s is written beside its elements", what, overrun);
    return !overrun;
}

/* Runs the pass with one tiling: on one worker, and in one of the other orders, which `order` selects. */
static void check_tiling(struct test_run *t, int order)
{
    struct reference expected, results;
    t->order = ALONE;
    int good = run(t, &expected) && test_case_is_right(t->test_case, describe(t), &expected);
    if (good) {
        t->order = (enum order)(1 + order % (ORDERS - 1));
        good = run(t, &results) && test_case_is_same(t->test_case, describe(t), &results, &expected);
        reference_close(&results);
    }
    reference_close(&expected);
    if (good)
        report_pass();
}

/* --- Tilings ---------------------------------------------------------------------------------- */

/* The different keys of a block that tiles.c has for a pass, whatever the columns, for one head and for many. */
static int list_blocks(const struct kernel_set *set, mfa_pass pass, int blocks[MAX_BLOCKS])
{
    int count = 0;
    for (int dim = 16; dim <= 512; dim += 16)
        for (int heads = 1; heads <= 64; heads += 63) {
            mfa_problem p;
            struct mfa_choice choice = {.threads = 1};
            mfa_problem_init(&p, 1, heads, heads, 512, 512, dim, dim);
            p.pass = pass, p.dtype = set->dtype;
            mfa_cpu_tiles_choose(set->isa, set->kernels, mfa_cpu_tiles_variant(set->kernels, &p), &p, &choice);
            int known = 0;
            const int block_kv = mfa_cpu_tiling_of(&choice).block_kv;
            while (known < count && blocks[known] != block_kv)
                known++;
            if (known == count && count < MAX_BLOCKS)
                blocks[count++] = block_kv;
        }
    return count;
}

static int may_decode(const struct test_run *t)
{
    const mfa_problem *p = &t->operands.problem;
    return p->dropout == 0 && !t->test_case->multiplies_int8 &&
           p->q_heads / p->kv_heads * p->q_len <= t->set->kernels->decode_rows;
}

static int list_forward(const struct test_run *t, struct tiling tilings[MAX_TILINGS])
{
    int blocks[MAX_BLOCKS], count = 0;
    const int kinds = list_blocks(t->set, MFA_FORWARD, blocks);
    for (int splits = 1; splits <= MAX_SPLITS; splits++) {
        for (int panels = 1; panels <= MFA_CPU_PANELS_MAX; panels++)
            for (int n = 0; n < kinds; n++)
                tilings[count++] = (struct tiling){.panels = panels, .block_kv = blocks[n], .splits = splits};
        if (may_decode(t))
            tilings[count++] =
                (struct tiling){.decode = 1, .panels = 1, .block_kv = t->set->kernels->decode_keys, .splits = splits};
    }
    return count;
}

static int list_backward(const struct test_run *t, struct tiling tilings[MAX_TILINGS])
{
    const mfa_problem *p = &t->operands.problem;
    const struct tensor *dQ = &t->operands.tensors[REFERENCE_dQ];
    const int reals = p->dtype == MFA_F32 || p->dtype == MFA_F64;
    const int may_own = reals && dQ->layout.column == 1 && p->head_dim % t->set->kernels->lanes == 0;
    int blocks[MAX_BLOCKS], count = 0;
    const int kinds = list_blocks(t->set, MFA_BACKWARD, blocks);
    for (int decode = 0; decode <= may_decode(t); decode++)
        for (int own_dQ = 0; own_dQ <= may_own; own_dQ++)
            for (int panels = 1; panels <= MFA_CPU_PANELS_MAX; panels++)
                for (int n = 0; n < kinds; n++)
                    tilings[count++] = (struct tiling){
                        .decode = decode, .panels = panels, .block_kv = blocks[n], .own_dQ = own_dQ, .splits = 1};
    return count;
}

/* Runs as many tilings as the budget allows; `number` selects which. */
static void check_pass(struct test_run *t, int number, int quick)
{
    struct tiling tilings[MAX_TILINGS];
    const int forward = t->operands.problem.pass == MFA_FORWARD;
    const int count = forward ? list_forward(t, tilings) : list_backward(t, tilings);
    const double most =
        BUDGET / (quick ? 10 : 1) / (1 + (forward ? 1 : 3) * case_multiplications(&t->operands.problem));
    const int taken = most < MIN_TILINGS ? MIN_TILINGS : most < count ? (int)most : count;
    for (int n = 0; n < taken; n++) {
        t->tiling = tilings[(n * count / taken + number) % count];
        check_tiling(t, number + n);
    }
}

/* Sets that have products of int8 get the problems that permit them for these alone. */
static int multiplies_int8(const struct kernel_set *set, const mfa_problem *p)
{
    return set->kernels->int8 && p->fast && p->dtype != MFA_F64;
}

static void check_set(struct test_case *test_case, const struct kernel_set *set, int number, int quick)
{
    struct test_run t = {.test_case = test_case, .set = set, .scratch = {{.mapping = NULL}}};
    t.arrangement = number % 2 ? DENSE : number / 2 % ARRANGEMENTS;
    test_case->multiplies_int8 = multiplies_int8(set, &test_case->inputs.problem);
    test_case->rounds_P = set->dtype == MFA_BF16 && !test_case->multiplies_int8;
    operands_open(&t.operands, &test_case->inputs, t.arrangement, 0);
    check_pass(&t, number, quick);
    if (test_case->passes & CASE_BACKWARD) {
        operands_turn(&t.operands, t.arrangement, &test_case->truth);
        check_pass(&t, number, quick);
    }
    operands_close(&t.operands);
    guarded_close(&t.sequences);
    for (int n = 0; n < WORKERS; n++)
        guarded_close(&t.scratch[n]);
}

/* --- Cases ------------------------------------------------------------------------------------ */

/* Sets of bf16 pairs have no codes but for products of int8. */
static int serves(const struct kernel_set *set, const mfa_problem *p)
{
    const int32_t dtype = p->dtype;
    if (multiplies_int8(set, p))
        return 1;
    if (set->dtype == MFA_BF16 && (p->k_type || p->v_type))
        return 0;
    return dtype == set->dtype || (set->dtype == MFA_F32 && (dtype == MFA_F16 || dtype == MFA_BF16));
}

static void check_case(const struct arguments *arguments, const struct one_case *one)
{
    const int along = one->problem.mask == MFA_MASK_NONE ? 0 : one->number % 16;
    const struct variant variant = {.mask_broadcast = along,
                                    .dbias_broadcast = one->number % 3 ? along : along ^ 15,
                                    .kv_broadcast = along ? 0 : one->number % 4,
                                    .heads_broadcast = one->number % 4,
                                    .map_broadcast = one->number % 12,
                                    .dlse = one->number % 2};
    const long long before = report_failed();
    struct test_case test_case;
    test_case_open(&test_case, one, variant, arguments->seed);
    for (size_t n = 0; n < sizeof sets / sizeof *sets; n++) {
        const char *isa = mfa_cpu_isa_name(sets[n].isa);
        if (sets[n].kernels->lanes && mfa_cpu_isa_present(sets[n].isa) && serves(&sets[n], &one->problem) &&
            (!arguments->isa || !strcmp(arguments->isa, isa)))
            check_set(&test_case, &sets[n], one->number + (int)n, arguments->quick);
    }
    if (arguments->verbose)
        printf("%-6s error %4.0f %% of the tolerance  %s\n", report_failed() > before ? "FAILED" : "ok",
               100 * test_case.worst, one->text);
    test_case_close(&test_case);
}

/* Heads such that the case stays small, by number; bands, block maps, softcaps and masks in turn. */
static void write_case(char text[CASE_TEXT], int q_len, int kv_len, int head_dim, int value_dim, int n)
{
    static const char *const small[] = {"b2 h2", "b1 h3/1", "b2 h4/2", "b1 h1", "b1 h6/2"};
    static const char *const masks[] = {"", "", " mask_bool", " mask_f32", "", " mask_f16", " mask_bf16"};
    const char *heads = (double)q_len * kv_len * (head_dim + value_dim) > 1e6 ? "b1 h1" : small[n % 5];
    static const int sizes[] = {16, 32, 48, 64, 128};
    char band[64] = "", map[64] = "";
    switch (n / 2 % 5) {
    case 0: snprintf(band, sizeof band, " causal"); break;
    case 1: snprintf(band, sizeof band, " upper%d", kv_len - q_len); break;
    case 2: snprintf(band, sizeof band, " lower-%d upper%d", q_len / 3, kv_len / 4); break;
    case 3: snprintf(band, sizeof band, " upper-%d", q_len / 4 + 1); break;
    }
    if (n % 4 == 1)
        snprintf(map, sizeof map, " block_map_q%d block_map_kv%d", sizes[n / 4 % 5], sizes[n / 20 % 5]);
    snprintf(text, CASE_TEXT, "both any %s q%d kv%d d%dv%d%s%s%s%s%s", heads, q_len, kv_len, head_dim, value_dim, band,
             map, n % 4 == 3 ? " softcap3" : "", masks[n % 7],
             n % 9 == 2   ? " dropout0.3"
             : n % 9 == 4 ? " alibi"
             : n % 9 == 7 ? " sinks"
                          : "");
}

/* Problems for the decode kernels: up to the most query rows that any set takes, and one more; with enough blocks of
 * keys for the prefetch to run ahead. */
static const char *const decode_cases[] = {
    "both any b1 h2/1 q1 kv300 d64",
    "both any b2 h2 q3 kv193 d128 softcap3",
    "both any b1 h4/1 q1 kv500 d64v16",
    "both any b1 h4/1 q1 kv500 d64 block_map_q16 block_map_kv48",
    "both any b2 h6/2 q2 kv300 d33 upper250 block_map_q16 block_map_kv64 mask_f16",
    "both any b1 h5/1 q1 kv97 d111v63 mask_bool",
    "both any b2 h6/2 q2 kv150 d32 mask_f32 alibi sinks",
    "both any b1 h6/2 q2 kv290 d128 upper288",
    "both any b1 h7/1 q1 kv193 d17 mask_f32",
    "both any b1 h8/1 q1 kv400 d128",
    "both any b2 h4/2 q4 kv95 d64 lower40 upper60",
    "both any b1 h9/1 q1 kv300 d64",
    "both any b1 h2/1 q6 kv193 d128v15 upper187 mask_bool",
    "both any b1 h15/1 q1 kv111 d63",
    "both any b1 h8/1 q2 kv300 d128 causal",
    "both any b1 h1 q16 kv290 d64 upper274 mask_bf16",
    "both any b1 h17/1 q1 kv193 d64",
};

/* Problems for products of int8. */
static const char *const int8_cases[] = {
    "forward any b1 h3/1 q100 kv300 d64 causal dropout0.3 k_int8 v_int8 fast_int8",
    "forward any b2 h3/1 q60 kv200 d33v17 block_map_q16 block_map_kv32 k_int8 v_int8 mask_bool fast_int8",
    "forward any b1 h2 q49 kv150 d128 kv_batch20 page_size16 softcap3 k_int8 v_int8 alibi sinks fast_int8",
    "forward any b3 h2 q49 kv150 d16v130 total_q100 total_kv200 k_int8 v_int8 varlen_q varlen_kv fast_int8",
};

enum {
    SIZES = 9,
    DECODE_CASES = sizeof decode_cases / sizeof *decode_cases,
    INT8_CASES = sizeof int8_cases / sizeof *int8_cases,
    CASES = SIZES * SIZES + DECODE_CASES + INT8_CASES
};

/* Every pair of values of any two of the four sizes occurs: a Latin square design, i + j and i + 2 j. */
static const char **make_cases(void)
{
    static const int lengths[SIZES] = {1, 15, 16, 17, 47, 48, 49, 95, 193};
    static const int dims[SIZES] = {1, 15, 16, 17, 63, 64, 111, 128, 257};
    static char texts[SIZES * SIZES][CASE_TEXT];
    static const char *cases[CASES];
    for (int n = 0; n < SIZES * SIZES; n++) {
        int i = n / SIZES, j = n % SIZES;
        write_case(texts[n], lengths[i], lengths[j], dims[(i + j) % SIZES], dims[(i + 2 * j) % SIZES], n);
        cases[n] = texts[n];
    }
    memcpy(cases + SIZES * SIZES, decode_cases, sizeof decode_cases);
    memcpy(cases + SIZES * SIZES + DECODE_CASES, int8_cases, sizeof int8_cases);
    return cases;
}

int main(int count, char **words)
{
    struct arguments arguments;
    struct cases cases;
    struct one_case one;
    if (!arguments_parse(&arguments, count, words, NULL))
        return 2;
    if (!arguments.problem_count) {
        arguments.problems = make_cases();
        arguments.problem_count = CASES;
    }
    report_begin("check_kernels", arguments.seed);
    guarded_report_faults();
    if (cases_open(&cases, &arguments))
        while (cases_next(&cases, &one)) {
            if (arguments.list)
                puts(one.text);
            else
                check_case(&arguments, &one);
        }
    return report_end();
}
