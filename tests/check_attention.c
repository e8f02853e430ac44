/* Every case of the case list, against the reference, through the public interface.
 *
 * A line of the list is a problem in the library's own syntax, whose pass may be "both" (forward, and
 * backward from the outputs of forward) and whose dtype may be "any". Each is crossed with the dtypes; each of
 * these with variants (what is broadcast, whether dL is given), which have a reference of their own; the
 * first variant with the arrangements of memory, with thread counts, repeats and partial sets of outputs,
 * the others with one arrangement each. --random draws problems from the seed instead (support/random.h).
 *
 * --isa all runs each of them on all instruction sets that this machine has, beside one computation of the reference.
 * Sets for dot products of bf16 get the problems in bf16, and those whose products may be of int8, only: their other
 * kernels are those of the set below. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mfa.h"
#include "support/arguments.h"
#include "support/cases.h"
#include "support/operands.h"
#include "support/random.h"
#include "support/report.h"
#include "support/test_case.h"

enum { MAX_VARIANTS = 24, MAX_SETS = 8 };

static struct set {   /* an instruction set under test */
    const char *name; /* NULL: the best */
    mfa_context *context;
    int only_bf16;
} sets[MAX_SETS];
static int set_count;

struct test_run { /* a test case, and the set and arguments of its runs */
    struct test_case test_case;
    const struct set *set;
    const struct arguments *arguments;
};

static const char *describe(const struct test_run *t, enum arrangement arrangement, int threads)
{
    const char *set = t->set->name ? t->set->name : "the best set";
    return test_case_describe(&t->test_case, "%s, %s, threads %d", set, arrangement_name(arrangement), threads);
}

static int succeeded(mfa_status status, const char *what)
{
    if (status != MFA_OK)
        report_fail("%s\n        %s: %s", what, mfa_status_name(status), mfa_last_error());
    return status == MFA_OK;
}

static int intact(const char *overrun, const char *what)
{
    if (overrun)
        report_fail("%s\n        %s is written beside its elements", what, overrun);
    return !overrun;
}

/* Runs the passes into `results`; 0 if something failed and was reported. */
static int run(struct test_run *t, enum arrangement arrangement, unsigned wanted, int threads,
               struct reference *results)
{
    const char *what = describe(t, arrangement, threads);
    int planned = arrangement != DENSE, good = 1;
    struct operands operands;
    guarded_testing(what);
    memset(results, 0, sizeof *results);
    if (!succeeded(mfa_context_set_threads(t->set->context, threads), what))
        return 0;
    operands_open(&operands, &t->test_case.inputs, arrangement, wanted);
    if (t->test_case.passes & CASE_FORWARD) {
        good = succeeded(operands_run(&operands, t->set->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    if (good && (t->test_case.passes & CASE_BACKWARD)) {
        operands_turn(&operands, arrangement, t->test_case.passes & CASE_FORWARD ? results : &t->test_case.truth);
        good = succeeded(operands_run(&operands, t->set->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    operands_close(&operands);
    return good;
}

/* One run that must be close to the reference. */
static int check(struct test_run *t, enum arrangement arrangement, unsigned wanted, int threads)
{
    struct reference results;
    int good = run(t, arrangement, wanted, threads, &results) &&
               test_case_is_right(&t->test_case, describe(t, arrangement, threads), &results);
    reference_close(&results);
    if (good)
        report_pass();
    return good;
}

/* Runs that must be the same bit for bit: `repeats` of them, and one with each number of threads. */
static int check_same(struct test_run *t, int repeats)
{
    static const int threads[] = {1, 2, 3, 7};
    const int counts = t->arguments->threads ? 0 : sizeof threads / sizeof *threads, first = 7;
    struct reference expected, results;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS | OUTPUT(O_LOW);
    int usual = t->arguments->threads ? t->arguments->threads : first;
    int good = run(t, DENSE, all, usual, &expected);
    for (int at = 0; good && at < counts + repeats; at++) {
        int with = at < counts ? threads[at] : usual;
        good = run(t, DENSE, all, with, &results) &&
               test_case_is_same(&t->test_case, describe(t, DENSE, with), &results, &expected);
        reference_close(&results);
    }
    reference_close(&expected);
    if (good)
        report_pass();
    return good;
}

/* Forward without L, backward with each of its outputs alone. */
static int check_partial(struct test_run *t, int threads)
{
    static const unsigned alone[] = {OUTPUT(dQ),    OUTPUT(dK),     OUTPUT(dV),
                                     OUTPUT(DBIAS), OUTPUT(DSINKS), OUTPUT(dQ) | OUTPUT(dV)};
    const int passes = t->test_case.passes;
    const mfa_problem *p = &t->test_case.inputs.problem;
    const unsigned absent = (p->mask == MFA_MASK_ADDITIVE ? 0 : OUTPUT(DBIAS)) | (p->sinks ? 0 : OUTPUT(DSINKS));
    int good = 1;
    if (passes & CASE_FORWARD) {
        t->test_case.passes = CASE_FORWARD;
        good = check(t, ROWS_FIRST, OUTPUT(O), threads);
        good = check(t, ROWS_FIRST, OUTPUT(O) | OUTPUT(O_LOW), threads) && good;
        t->test_case.passes = passes;
    }
    for (size_t n = 0; n < sizeof alone / sizeof *alone && (passes & CASE_BACKWARD); n++)
        if (alone[n] & ~absent)
            good = check(t, DENSE, FORWARD_OUTPUTS | alone[n], threads) && good;
    return good;
}

/* --- Variants --------------------------------------------------------------------------------- */

/* The first variant broadcasts nothing. Where not all variants are run, `line` selects different ones for each case. */
static int list_variants(const mfa_problem *p, int quick, int line, struct variant variants[MAX_VARIANTS])
{
    int count = 0, small = case_multiplications(p) <= CASE_SMALL;
    variants[count++] = (struct variant){.dlse = line % 2};
    if (quick)
        return count;
    for (int along = 1; along < 16 && p->mask != MFA_MASK_NONE; along++) {
        if (!small && along != 1 + line % 15)
            continue;
        const int sums[] = {along, 0, along ^ 15}; /* dbias summed as the mask is broadcast, not, otherwise */
        variants[count++] = (struct variant){.mask_broadcast = along,
                                             .dbias_broadcast = sums[(along + line) % 3],
                                             .heads_broadcast = along % 4,
                                             .map_broadcast = along % 12,
                                             .dlse = (along + line) % 2};
    }
    if (small && p->sinks && p->batch * p->q_heads > 1)
        variants[count++] = (struct variant){.heads_broadcast = 1 + line % 3, .dlse = 1};
    for (int along = 1; along < 12 && small && p->block_map_q && p->mask == MFA_MASK_NONE; along++)
        variants[count++] = (struct variant){.map_broadcast = along, .dlse = (along + line) % 2};
    for (int along = 1; along < 4 && small && p->mask == MFA_MASK_NONE && p->batch * p->kv_heads > 1; along++)
        variants[count++] =
            (struct variant){.kv_broadcast = along, .heads_broadcast = along, .dlse = (along + line) % 2};
    return count;
}

/* All of them; o_low every second time. */
static unsigned outputs(int number)
{
    return FORWARD_OUTPUTS | BACKWARD_OUTPUTS | (number % 2 ? OUTPUT(O_LOW) : 0);
}

static int check_variant(struct test_run *t, int number, int line)
{
    const struct arguments *arguments = t->arguments;
    const int threads = arguments->threads ? arguments->threads : 1 + line % 3;
    int good = 1;
    if (number > 0) {
        good = check(t, (number + line) % ARRANGEMENTS, outputs(number), threads);
    } else {
        int small = case_multiplications(&t->test_case.inputs.problem) <= CASE_SMALL;
        for (int arrangement = DENSE; arrangement < ARRANGEMENTS; arrangement++)
            if (arrangement == DENSE || arrangement == 1 + line % (ARRANGEMENTS - 1) || (small && !arguments->quick))
                good = check(t, arrangement, outputs(arrangement + line), threads) && good;
        int repeats = arguments->repeat ? arguments->repeat : small && line % 4 == 0 && !arguments->quick ? 20 : 1;
        good = good && check_same(t, repeats);
        good = good && check_partial(t, threads);
    }
    return good;
}

/* --- Timing ----------------------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;
    return difference < 0 ? -1 : difference > 0;
}

/* The pairs of a query and a key, of all heads, that the band and the block map show. */
static double visible_pairs(const struct inputs *inputs, const mfa_buffers *buffers)
{
    const mfa_problem *p = &inputs->problem;
    const int64_t size = p->block_map_q ? p->block_map_kv : p->kv_len;
    struct reference_view map = {NULL, 0, 0, 0, 0};
    double pairs = 0;
    if (p->block_map_q)
        map = reference_view(p, REFERENCE_BLOCK_MAP, inputs->values[REFERENCE_BLOCK_MAP]);
    for (int64_t at = 0; at < p->batch * p->q_heads * p->q_len; at++) {
        const int64_t i = at % p->q_len, h = at / p->q_len % p->q_heads, b = at / p->q_len / p->q_heads;
        const struct reference_sequence seq = reference_sequence(p, buffers, b);
        int64_t first, end;
        if (i >= seq.q_len)
            continue;
        reference_band(&seq, i, &first, &end);
        for (int64_t j = first, next; j < end; j = next) {
            next = (j / size + 1) * size < end ? (j / size + 1) * size : end;
            pairs += reference_is_mapped(p, &map, b, h, i, j) ? (double)(next - j) : 0;
        }
    }
    return pairs;
}

/* Prints the median time of the operands' pass. Only visible pairs count as operations. */
static void time_pass(struct test_run *t, struct operands *operands)
{
    enum { MAX_RUNS = 101 };
    const mfa_problem *p = &operands->problem;
    double times[MAX_RUNS], begin = seconds(), pairs = visible_pairs(&t->test_case.inputs, &operands->buffers);
    int count = 0;
    double columns = (double)p->head_dim, values = (double)p->value_dim;
    double each = p->pass == MFA_FORWARD ? 2 * (columns + values) : 2 * (3 * columns + 2 * values);
    while (count < 5 || (count < MAX_RUNS && seconds() - begin < 1)) {
        double start = seconds();
        if (!succeeded(operands_run(operands, t->set->context, 0), t->test_case.text))
            return;
        times[count++] = seconds() - start;
    }
    qsort(times, (size_t)count, sizeof *times, ascending);
    double median = times[count / 2];
    printf("%10.3f ms %8.1f GFLOP/s  %-8s %s\n", median * 1e3, pairs * each / median * 1e-9,
           p->pass == MFA_FORWARD ? "forward" : "backward", strchr(t->test_case.text, ' ') + 1);
    fflush(stdout);
}

static void bench(struct test_run *t)
{
    struct operands operands;
    struct reference forward = {0};
    if (!succeeded(mfa_context_set_threads(t->set->context, t->arguments->threads), t->test_case.text))
        return;
    operands_open(&operands, &t->test_case.inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    time_pass(t, &operands);
    operands_collect(&operands, &forward);
    if (t->test_case.passes & CASE_BACKWARD) {
        operands_turn(&operands, DENSE, &forward);
        time_pass(t, &operands);
    }
    reference_close(&forward);
    operands_close(&operands);
}

/* --- The cases -------------------------------------------------------------------------------- */

static void print_verdict(int good, long long checks, double worst, double time, const char *text)
{
    printf("%-6s %3lld checks, error %4.0f %% of the tolerance, %6.2f s  %s\n", good ? "ok" : "FAILED", checks,
           100 * worst, time, text);
    fflush(stdout);
}

/* Makes the test case the one of this set, by the kernel that it has for the problem: one whose machine ends with bf16
 * multiplies bf16, and so rounds P, unless it multiplies int8. 0 if the set does not get it. */
static int use_set(struct test_run *t, const struct set *set)
{
    const mfa_problem *p = &t->test_case.inputs.problem;
    char line[256] = "";
    mfa_plan *plan = NULL;
    t->set = set;
    if ((p->dtype == MFA_BF16 || p->fast) && mfa_plan_create(set->context, p, &plan) == MFA_OK)
        mfa_plan_describe(plan, line, sizeof line);
    mfa_plan_destroy(plan);
    const int int8 = strstr(line, " forward_int8_") != NULL;
    t->test_case.multiplies_int8 = int8;
    t->test_case.rounds_P = p->dtype == MFA_BF16 && !int8 && strstr(line, "bf16 threads");
    return !set->only_bf16 || p->dtype == MFA_BF16 || int8;
}

/* All variants of a problem in one dtype. */
static void check_case(const struct arguments *arguments, const struct one_case *one)
{
    struct test_run t = {.arguments = arguments};
    struct variant variants[MAX_VARIANTS];
    long long before = report_passed();
    double begin = seconds(), worst = 0;
    int count = list_variants(&one->problem, arguments->quick, one->number, variants), good = 1;
    for (int number = 0; number < count; number++) {
        test_case_open(&t.test_case, one, variants[number], arguments->seed);
        for (int n = 0; n < set_count; n++) {
            if (!use_set(&t, &sets[n]))
                continue;
            const int right = check_variant(&t, number, one->number);
            if (right && number == 0 && arguments->bench)
                bench(&t);
            good = good && right;
        }
        worst = fmax(worst, t.test_case.worst);
        test_case_close(&t.test_case);
    }
    if (arguments->verbose)
        print_verdict(good, report_passed() - before, worst, seconds() - begin, one->text);
}

/* Random problems, each in one variant and arrangement and with one number of threads; of those with forward only, some
 * without L. */
static void check_random(const struct arguments *arguments)
{
    for (int n = 0; n < arguments->random; n++) {
        struct test_run t = {.arguments = arguments};
        struct random_problem drawn;
        random_problem_draw(&drawn, arguments->seed, n);
        const mfa_problem *p = &drawn.problem;
        const int only_forward = p->page_size || p->cache_batch_idx || p->k_type || p->v_type;
        const int passes = only_forward ? CASE_FORWARD : CASE_FORWARD | CASE_BACKWARD;
        struct one_case one = {.number = n, .passes = passes, .problem = drawn.problem};
        mfa_problem_print(&drawn.problem, one.text, sizeof one.text);
        if ((arguments->filter && !strstr(one.text, arguments->filter)) || !arguments_take(arguments))
            continue;
        if (arguments->list) {
            puts(one.text);
            continue;
        }
        const double begin = seconds();
        const long long before = report_passed();
        const int threads = arguments->threads ? arguments->threads : 1 + n % 3;
        const unsigned wanted = outputs(n) & (only_forward && n % 3 == 0 ? ~OUTPUT(L) : ~0U);
        test_case_open(&t.test_case, &one, drawn.variant, arguments->seed);
        int good = 1;
        for (int set = 0; set < set_count; set++)
            if (use_set(&t, &sets[set]))
                good = check(&t, drawn.arrangement, wanted, threads) && good;
        if (arguments->verbose)
            print_verdict(good, report_passed() - before, t.test_case.worst, seconds() - begin, one.text);
        test_case_close(&t.test_case);
    }
}

/* Adds the set of this name; 0: it cannot be had, which was printed. */
static int open_set(const char *name, int only_bf16)
{
    const mfa_context_options options = {.size = sizeof options, .isa = name};
    mfa_context *context;
    if (set_count == MAX_SETS || mfa_context_create(&options, &context) != MFA_OK) {
        fprintf(stderr, "%s\n", set_count == MAX_SETS ? "too many instruction sets" : mfa_last_error());
        return 0;
    }
    sets[set_count++] = (struct set){name, context, only_bf16};
    return 1;
}

static int open_sets(const char *isa)
{
    const char *name;
    int good = 1;
    if (!isa || strcmp(isa, "all") != 0)
        return open_set(isa, 0);
    for (int32_t n = 0; good && (name = mfa_isa_name(n)); n++)
        if (mfa_isa_supported(name) == MFA_OK)
            good = open_set(name, strstr(name, "bf16") != NULL);
    return good;
}

int main(int count, char **words)
{
    struct arguments arguments;
    struct cases cases;
    struct one_case one;
    if (!arguments_parse(&arguments, count, words, NULL))
        return 2;
    report_begin("check_attention", arguments.seed);
    if (arguments.bits && !report_bits_to(arguments.bits))
        return 2;
    if (!open_sets(arguments.isa))
        return 2;
    guarded_report_faults();
    check_random(&arguments);
    if ((arguments.problem_count || !arguments.random) && cases_open(&cases, &arguments))
        while (cases_next(&cases, &one)) {
            if (arguments.list)
                puts(one.text);
            else
                check_case(&arguments, &one);
        }
    for (int n = 0; n < set_count; n++)
        mfa_context_destroy(sets[n].context);
    return report_end();
}
