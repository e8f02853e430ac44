/* Every case of the case list, against the reference, through the public door.
 *
 * A line of the list is a problem in the library's own syntax, whose pass may be "both" (forward, and
 * backward from what forward gave) and whose dtype may be "any". Each is crossed with the dtypes; each of
 * these with variants (what is broadcast, whether dL is given), which have a reference of their own; the
 * first variant with the arrangements of memory, with thread counts, repeats and partial sets of outputs,
 * the others with one arrangement each. --random draws problems instead (kit/random.h). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kit/arguments.h"
#include "kit/cases.h"
#include "kit/operands.h"
#include "kit/random.h"
#include "kit/report.h"
#include "kit/subject.h"
#include "mfa.h"

enum { MOST_VARIANTS = 24 };

struct trial { /* a subject, and with what it is run */
    struct subject subject;
    mfa_context *context;
    const struct arguments *arguments;
};

static const char *describe(const struct trial *trial, enum arrangement arrangement, int threads)
{
    return subject_describe(&trial->subject, "%s, threads %d", arrangement_name(arrangement), threads);
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
static int run(struct trial *trial, enum arrangement arrangement, unsigned wanted, int threads,
               struct reference *results)
{
    const char *what = describe(trial, arrangement, threads);
    int planned = arrangement != DENSE, good = 1;
    struct operands operands;
    guarded_testing(what);
    memset(results, 0, sizeof *results);
    if (!succeeded(mfa_context_set_threads(trial->context, threads), what))
        return 0;
    operands_open(&operands, &trial->subject.inputs, arrangement, wanted);
    if (trial->subject.passes & CASE_FORWARD) {
        good = succeeded(operands_run(&operands, trial->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    if (good && (trial->subject.passes & CASE_BACKWARD)) {
        operands_turn(&operands, arrangement, trial->subject.passes & CASE_FORWARD ? results : &trial->subject.truth);
        good = succeeded(operands_run(&operands, trial->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    operands_close(&operands);
    return good;
}

/* One run that must be close to the reference. */
static int check(struct trial *trial, enum arrangement arrangement, unsigned wanted, int threads)
{
    struct reference results;
    int good = run(trial, arrangement, wanted, threads, &results) &&
               subject_is_right(&trial->subject, describe(trial, arrangement, threads), &results);
    reference_close(&results);
    if (good)
        report_pass();
    return good;
}

/* Runs that must be the same bit for bit: `repeats` of them, and one with each number of threads. */
static int check_same(struct trial *trial, int repeats)
{
    static const int threads[] = {1, 2, 3, 7};
    const int counts = trial->arguments->threads ? 0 : sizeof threads / sizeof *threads, first = 7;
    struct reference expected, results;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS | OUTPUT(O_LOW);
    int usual = trial->arguments->threads ? trial->arguments->threads : first;
    int good = run(trial, DENSE, all, usual, &expected);
    for (int at = 0; good && at < counts + repeats; at++) {
        int with = at < counts ? threads[at] : usual;
        good = run(trial, DENSE, all, with, &results) &&
               subject_is_same(&trial->subject, describe(trial, DENSE, with), &results, &expected);
        reference_close(&results);
    }
    reference_close(&expected);
    if (good)
        report_pass();
    return good;
}

/* Forward without L, backward with each of its outputs alone. */
static int check_partial(struct trial *trial, int threads)
{
    static const unsigned alone[] = {OUTPUT(dQ), OUTPUT(dK), OUTPUT(dV), OUTPUT(DBIAS), OUTPUT(dQ) | OUTPUT(dV)};
    const int passes = trial->subject.passes;
    int good = 1;
    if (passes & CASE_FORWARD) {
        trial->subject.passes = CASE_FORWARD;
        good = check(trial, ROWS_FIRST, OUTPUT(O), threads);
        good = check(trial, ROWS_FIRST, OUTPUT(O) | OUTPUT(O_LOW), threads) && good;
        trial->subject.passes = passes;
    }
    for (size_t n = 0; n < sizeof alone / sizeof *alone && (passes & CASE_BACKWARD); n++)
        if (trial->subject.inputs.problem.mask == MFA_MASK_ADDITIVE || alone[n] != OUTPUT(DBIAS))
            good = check(trial, DENSE, FORWARD_OUTPUTS | alone[n], threads) && good;
    return good;
}

/* --- Variants --------------------------------------------------------------------------------- */

/* The first broadcasts nothing. `line` makes cases differ in what they choose where not all is done. */
static int list_variants(const mfa_problem *p, int quick, int line, struct variant variants[MOST_VARIANTS])
{
    int count = 0, small = case_multiplications(p) <= CASE_SMALL;
    variants[count++] = (struct variant){.dlse = line % 2};
    if (quick)
        return count;
    for (int along = 1; along < 16 && p->mask != MFA_MASK_NONE; along++) {
        if (!small && along != 1 + line % 15)
            continue;
        const int sums[] = {along, 0, along ^ 15}; /* dbias summed as the mask is broadcast, not, otherwise */
        variants[count++] = (struct variant){along, sums[(along + line) % 3], 0, (along + line) % 2};
    }
    for (int along = 1; along < 4 && small && p->mask == MFA_MASK_NONE && p->batch * p->kv_heads > 1; along++)
        variants[count++] = (struct variant){0, 0, along, (along + line) % 2};
    return count;
}

/* All of them; o_low every second time. */
static unsigned outputs(int number)
{
    return FORWARD_OUTPUTS | BACKWARD_OUTPUTS | (number % 2 ? OUTPUT(O_LOW) : 0);
}

static int check_variant(struct trial *trial, int number, int line)
{
    const struct arguments *arguments = trial->arguments;
    const int threads = arguments->threads ? arguments->threads : 1 + line % 3;
    int good = 1;
    if (number > 0) {
        good = check(trial, (number + line) % ARRANGEMENTS, outputs(number), threads);
    } else {
        int small = case_multiplications(&trial->subject.inputs.problem) <= CASE_SMALL;
        for (int arrangement = DENSE; arrangement < ARRANGEMENTS; arrangement++)
            if (arrangement == DENSE || arrangement == 1 + line % (ARRANGEMENTS - 1) || (small && !arguments->quick))
                good = check(trial, arrangement, outputs(arrangement + line), threads) && good;
        int repeats = arguments->repeat ? arguments->repeat : small && line % 4 == 0 && !arguments->quick ? 20 : 1;
        good = good && check_same(trial, repeats);
        good = good && check_partial(trial, threads);
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

/* Prints the median time of the operands' pass. Operations: what the band leaves, no more. */
static void time_pass(struct trial *trial, struct operands *operands)
{
    enum { MOST = 101 };
    const mfa_problem *p = &operands->problem;
    double times[MOST], begin = seconds(), pairs = 0;
    int count = 0;
    for (int64_t i = 0; i < p->q_len; i++) {
        int64_t first, end;
        reference_band(p, i, &first, &end);
        pairs += (double)(end - first);
    }
    double columns = (double)p->head_dim, values = (double)p->value_dim;
    double each = p->pass == MFA_FORWARD ? 2 * (columns + values) : 2 * (3 * columns + 2 * values);
    while (count < 5 || (count < MOST && seconds() - begin < 1)) {
        double start = seconds();
        if (!succeeded(operands_run(operands, trial->context, 0), trial->subject.text))
            return;
        times[count++] = seconds() - start;
    }
    qsort(times, (size_t)count, sizeof *times, ascending);
    double median = times[count / 2];
    printf("%10.3f ms %8.1f GFLOP/s  %-8s %s\n", median * 1e3,
           pairs * each * (double)(p->batch * p->q_heads) / median * 1e-9,
           p->pass == MFA_FORWARD ? "forward" : "backward", strchr(trial->subject.text, ' ') + 1);
    fflush(stdout);
}

static void bench(struct trial *trial)
{
    struct operands operands;
    struct reference forward = {0};
    if (!succeeded(mfa_context_set_threads(trial->context, trial->arguments->threads), trial->subject.text))
        return;
    operands_open(&operands, &trial->subject.inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    time_pass(trial, &operands);
    operands_collect(&operands, &forward);
    if (trial->subject.passes & CASE_BACKWARD) {
        operands_turn(&operands, DENSE, &forward);
        time_pass(trial, &operands);
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

/* Whether the kernel multiplies bf16, and so rounds P: its machine says so. */
static int rounds_P(mfa_context *context, const mfa_problem *problem)
{
    char line[256] = "";
    mfa_plan *plan = NULL;
    if (problem->dtype == MFA_BF16 && mfa_plan_create(context, problem, &plan) == MFA_OK)
        mfa_plan_describe(plan, line, sizeof line);
    mfa_plan_destroy(plan);
    return strstr(line, "bf16 threads") != NULL;
}

/* All variants of a problem in one dtype. */
static void check_case(mfa_context *context, const struct arguments *arguments, const struct one_case *one)
{
    struct trial trial = {.context = context, .arguments = arguments};
    struct variant variants[MOST_VARIANTS];
    long long before = report_passed();
    double begin = seconds(), worst = 0;
    int count = list_variants(&one->problem, arguments->quick, one->number, variants), good = 1;
    for (int number = 0; number < count; number++) {
        subject_open(&trial.subject, one, variants[number], arguments->seed);
        trial.subject.rounds_P = rounds_P(context, &one->problem);
        int right = check_variant(&trial, number, one->number);
        if (right && number == 0 && arguments->bench)
            bench(&trial);
        good = good && right;
        worst = fmax(worst, trial.subject.worst);
        subject_close(&trial.subject);
    }
    if (arguments->verbose)
        print_verdict(good, report_passed() - before, worst, seconds() - begin, one->text);
}

/* Problems that are drawn, in one variant, arrangement and number of threads each. */
static void check_random(mfa_context *context, const struct arguments *arguments)
{
    for (int n = 0; n < arguments->random; n++) {
        struct trial trial = {.context = context, .arguments = arguments};
        struct random_problem drawn;
        random_problem_draw(&drawn, arguments->seed, n);
        struct one_case one = {.number = n, .passes = CASE_FORWARD | CASE_BACKWARD, .problem = drawn.problem};
        mfa_problem_print(&drawn.problem, one.text, sizeof one.text);
        if (arguments->filter && !strstr(one.text, arguments->filter))
            continue;
        if (arguments->list) {
            puts(one.text);
            continue;
        }
        const double begin = seconds();
        const int threads = arguments->threads ? arguments->threads : 1 + n % 3;
        subject_open(&trial.subject, &one, drawn.variant, arguments->seed);
        trial.subject.rounds_P = rounds_P(context, &one.problem);
        int good = check(&trial, drawn.arrangement, outputs(n), threads);
        if (arguments->verbose)
            print_verdict(good, 1, trial.subject.worst, seconds() - begin, one.text);
        subject_close(&trial.subject);
    }
}

int main(int count, char **words)
{
    struct arguments arguments;
    struct cases cases;
    struct one_case one;
    mfa_context *context = NULL;
    if (!arguments_parse(&arguments, count, words))
        return 2;
    report_begin("check_attention", arguments.seed);
    if (arguments.bits && !report_bits_to(arguments.bits))
        return 2;
    mfa_context_options options = {.size = sizeof options, .isa = arguments.isa};
    if (mfa_context_create(&options, &context) != MFA_OK) {
        fprintf(stderr, "%s\n", mfa_last_error());
        return 2;
    }
    guarded_report_faults();
    check_random(context, &arguments);
    if ((arguments.problem_count || !arguments.random) && cases_open(&cases, &arguments))
        while (cases_next(&cases, &one)) {
            if (arguments.list)
                puts(one.text);
            else
                check_case(context, &arguments, &one);
        }
    mfa_context_destroy(context);
    return report_end();
}
