/* Every case of the case list, against the reference, through the public door.
 *
 * A line of the list is a problem in the library's own syntax, whose pass may be "both" (forward, and
 * backward from what forward gave) and whose dtype may be "any". Each is crossed with the dtypes; each of
 * these with variants (what is broadcast, whether dL is given), which have a reference of their own; the
 * first variant with the arrangements of memory, with thread counts, repeats and partial sets of outputs,
 * the others with one arrangement each. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kit/arguments.h"
#include "kit/compare.h"
#include "kit/operands.h"
#include "kit/report.h"
#include "mfa.h"
#include "reference/tolerance.h"

enum { LINE = 512, MOST_VARIANTS = 24 };
enum { FORWARD = 1, BACKWARD = 2 };

/* Multiplications up to which a case is small: it gets all variants, and many repeats. */
static const double SMALL = 3e5;

struct subject { /* one variant of one problem in one dtype */
    mfa_context *context;
    const struct arguments *arguments;
    const char *text;
    int passes;
    struct inputs inputs;
    struct reference truth;
    struct tolerance tolerance;
    double worst; /* error as a share of the tolerance */
};

static double multiplications(const mfa_problem *p)
{
    return (double)p->batch * (double)p->q_heads * (double)p->q_len * (double)p->kv_len *
           (double)(p->head_dim + p->value_dim);
}

/* "text | mask along br, dL given | padded, 3 threads" */
static const char *describe(const struct subject *subject, enum arrangement arrangement, int threads)
{
    static char what[LINE + 256];
    const struct variant *variant = &subject->inputs.variant;
    const struct { const char *name; int along; } broadcasts[] = {
        {"mask", variant->mask_broadcast}, {"dbias", variant->dbias_broadcast}, {"K V", variant->kv_broadcast}};
    int length = snprintf(what, sizeof what, "%s |", subject->text);
    for (size_t n = 0; n < sizeof broadcasts / sizeof *broadcasts; n++)
        if (broadcasts[n].along)
            length += snprintf(what + length, sizeof what - (size_t)length, " %s broadcast along%s%s%s%s,",
                               broadcasts[n].name, broadcasts[n].along & ALONG_BATCH ? " batch" : "",
                               broadcasts[n].along & ALONG_HEAD ? " head" : "",
                               broadcasts[n].along & ALONG_ROW ? " row" : "",
                               broadcasts[n].along & ALONG_COLUMN ? " column" : "");
    snprintf(what + length, sizeof what - (size_t)length, "%s %s, threads %d", variant->dlse ? " dL given," : "",
             arrangement_name(arrangement), threads);
    return what;
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
static int run(struct subject *subject, enum arrangement arrangement, unsigned wanted, int threads,
               struct reference *results)
{
    const char *what = describe(subject, arrangement, threads);
    int planned = arrangement != DENSE, good = 1;
    struct operands operands;
    guarded_testing(what);
    memset(results, 0, sizeof *results);
    if (!succeeded(mfa_context_set_threads(subject->context, threads), what))
        return 0;
    operands_open(&operands, &subject->inputs, arrangement, wanted);
    if (subject->passes & FORWARD) {
        good = succeeded(operands_run(&operands, subject->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    if (good && (subject->passes & BACKWARD)) {
        operands_turn(&operands, arrangement, subject->passes & FORWARD ? results : &subject->truth);
        good = succeeded(operands_run(&operands, subject->context, planned), what);
        good = intact(operands_collect(&operands, results), what) && good;
    }
    operands_close(&operands);
    return good;
}

typedef int (*comparison)(struct subject *subject, const char *what, enum reference_tensor tensor,
                          const int64_t shape[4], const double *got, const double *expected);

static int close_to(struct subject *subject, const char *what, enum reference_tensor tensor, const int64_t shape[4],
                    const double *got, const double *expected)
{
    const struct tolerance *t = &subject->tolerance;
    const double tolerances[REFERENCE_TENSORS] = {
        [REFERENCE_O] = t->O, [REFERENCE_L] = t->L, [REFERENCE_dQ] = t->dQ,
        [REFERENCE_dK] = t->dK, [REFERENCE_dV] = t->dV, [REFERENCE_DBIAS] = t->dbias};
    return compare_close(what, tensor_name(tensor), shape, got, expected, tolerances[tensor], &subject->worst);
}

static int same_as(struct subject *subject, const char *what, enum reference_tensor tensor, const int64_t shape[4],
                   const double *got, const double *expected)
{
    (void)subject;
    return compare_same(what, tensor_name(tensor), shape, got, expected);
}

/* Compares those of the results that there are. */
static int compare(struct subject *subject, const char *what, comparison judge, struct reference *results,
                   const struct reference *expected)
{
    int good = 1;
    struct reference reference = *expected;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(results, tensor), *right = *reference_member(&reference, tensor);
        int64_t shape[4];
        reference_shape(&subject->inputs.problem, tensor, shape);
        if (got && right)
            good = judge(subject, what, tensor, shape, got, right) && good;
    }
    return good;
}

/* One run that must be close to the reference. */
static int check(struct subject *subject, enum arrangement arrangement, unsigned wanted, int threads)
{
    struct reference results;
    int good = run(subject, arrangement, wanted, threads, &results) &&
               compare(subject, describe(subject, arrangement, threads), close_to, &results, &subject->truth);
    reference_close(&results);
    if (good)
        report_pass();
    return good;
}

/* Runs that must be the same bit for bit: `repeats` of them, and one with each number of threads. */
static int check_same(struct subject *subject, int repeats)
{
    static const int threads[] = {1, 2, 3, 7};
    const int counts = subject->arguments->threads ? 0 : sizeof threads / sizeof *threads, first = 7;
    struct reference expected, results;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    int usual = subject->arguments->threads ? subject->arguments->threads : first;
    int good = run(subject, DENSE, all, usual, &expected);
    for (int at = 0; good && at < counts + repeats; at++) {
        int with = at < counts ? threads[at] : usual;
        good = run(subject, DENSE, all, with, &results) &&
               compare(subject, describe(subject, DENSE, with), same_as, &results, &expected);
        reference_close(&results);
    }
    reference_close(&expected);
    if (good)
        report_pass();
    return good;
}

/* Forward without L, backward with each of its outputs alone. */
static int check_partial(struct subject *subject, int threads)
{
    static const unsigned alone[] = {OUTPUT(dQ), OUTPUT(dK), OUTPUT(dV), OUTPUT(DBIAS), OUTPUT(dQ) | OUTPUT(dV)};
    const int passes = subject->passes;
    int good = 1;
    if (passes & FORWARD) {
        subject->passes = FORWARD;
        good = check(subject, ROWS_FIRST, OUTPUT(O), threads);
        subject->passes = passes;
    }
    for (size_t n = 0; n < sizeof alone / sizeof *alone && (passes & BACKWARD); n++)
        if (subject->inputs.problem.mask == MFA_MASK_ADDITIVE || alone[n] != OUTPUT(DBIAS))
            good = check(subject, DENSE, FORWARD_OUTPUTS | alone[n], threads) && good;
    return good;
}

/* --- Variants --------------------------------------------------------------------------------- */

/* The first broadcasts nothing. `line` makes cases differ in what they choose where not all is done. */
static int list_variants(const mfa_problem *p, int quick, int line, struct variant variants[MOST_VARIANTS])
{
    int count = 0, small = multiplications(p) <= SMALL;
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

/* The reference and the tolerance, from operands of which only the inputs matter. */
static void solve(struct subject *subject)
{
    struct operands operands;
    const mfa_problem *p = &subject->inputs.problem;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        int backward = tensor >= REFERENCE_dQ, none = tensor == REFERENCE_DBIAS && p->mask != MFA_MASK_ADDITIVE;
        if (!none && (!backward || (subject->passes & BACKWARD)))
            *reference_member(&subject->truth, tensor) = reference_allocate(reference_count(p, tensor));
    }
    operands_open(&operands, &subject->inputs, DENSE, 0);
    reference_attention(&operands.problem, &operands.buffers, &subject->truth);
    reference_tolerance(&operands.problem, &operands.buffers, &subject->truth, &subject->tolerance);
    operands_close(&operands);
}

static int check_variant(struct subject *subject, int number, int line)
{
    const struct arguments *arguments = subject->arguments;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    const int threads = arguments->threads ? arguments->threads : 1 + line % 3;
    int good = 1;
    solve(subject);
    if (number > 0) {
        good = check(subject, (number + line) % ARRANGEMENTS, all, threads);
    } else {
        int small = multiplications(&subject->inputs.problem) <= SMALL;
        for (int arrangement = DENSE; arrangement < ARRANGEMENTS; arrangement++)
            if (arrangement == DENSE || arrangement == 1 + line % (ARRANGEMENTS - 1) || (small && !arguments->quick))
                good = check(subject, arrangement, all, threads) && good;
        int repeats = arguments->repeat ? arguments->repeat : small && line % 4 == 0 && !arguments->quick ? 20 : 1;
        good = good && check_same(subject, repeats);
        good = good && check_partial(subject, threads);
    }
    reference_close(&subject->truth);
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
static void time_pass(struct subject *subject, struct operands *operands)
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
        if (!succeeded(operands_run(operands, subject->context, 0), subject->text))
            return;
        times[count++] = seconds() - start;
    }
    qsort(times, (size_t)count, sizeof *times, ascending);
    double median = times[count / 2];
    printf("%10.3f ms %8.1f GFLOP/s  %-8s %s\n", median * 1e3,
           pairs * each * (double)(p->batch * p->q_heads) / median * 1e-9,
           p->pass == MFA_FORWARD ? "forward" : "backward", strchr(subject->text, ' ') + 1);
    fflush(stdout);
}

static void bench(struct subject *subject)
{
    struct operands operands;
    struct reference forward = {0};
    if (!succeeded(mfa_context_set_threads(subject->context, subject->arguments->threads), subject->text))
        return;
    operands_open(&operands, &subject->inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    time_pass(subject, &operands);
    operands_collect(&operands, &forward);
    if (subject->passes & BACKWARD) {
        operands_turn(&operands, DENSE, &forward);
        time_pass(subject, &operands);
    }
    reference_close(&forward);
    operands_close(&operands);
}

/* --- The case list ---------------------------------------------------------------------------- */

/* All variants of a problem in one dtype. `text` is as in the list, the dtype being a real one. */
static void check_problem(mfa_context *context, const struct arguments *arguments, const char *text, int line)
{
    struct subject subject = {.context = context, .arguments = arguments, .text = text};
    const char *rest = strchr(text, ' ');
    char whole[LINE + 16];
    mfa_problem problem;
    struct variant variants[MOST_VARIANTS];
    int both = !strncmp(text, "both ", 5);
    subject.passes = both ? FORWARD | BACKWARD : !strncmp(text, "backward ", 9) ? BACKWARD : FORWARD;
    snprintf(whole, sizeof whole, "%s%s", both ? "forward" : "", both ? rest : text);
    if (!succeeded(mfa_problem_parse(whole, &problem), text))
        return;
    problem.pass = MFA_FORWARD;
    long long before = report_passed();
    double begin = seconds();
    int count = list_variants(&problem, arguments->quick, line, variants), good = 1;
    for (int number = 0; number < count; number++) {
        inputs_open(&subject.inputs, &problem, variants[number], arguments->seed, text);
        int right = check_variant(&subject, number, line);
        if (right && number == 0 && arguments->bench)
            bench(&subject);
        good = good && right;
        inputs_close(&subject.inputs);
    }
    if (arguments->verbose)
        printf("%-6s %3lld checks, error %4.0f %% of the tolerance, %6.2f s  %s\n", good ? "ok" : "FAILED",
               report_passed() - before, 100 * subject.worst, seconds() - begin, text);
    fflush(stdout);
}

/* One line of the list, in its dtype or in all of them. */
static void check_line(mfa_context *context, const struct arguments *arguments, const char *text, int line)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16", "f64"};
    const char *dtype = strchr(text, ' '), *rest = dtype ? strchr(dtype + 1, ' ') : NULL;
    int any = rest && !strncmp(dtype, " any ", 5);
    for (int n = 0; n < (any ? 4 : 1); n++) {
        char whole[LINE];
        if (any)
            snprintf(whole, sizeof whole, "%.*s %s%s", (int)(dtype - text), text, dtypes[n], rest);
        else
            snprintf(whole, sizeof whole, "%s", text);
        if (arguments->filter && !strstr(whole, arguments->filter))
            continue;
        if (arguments->list)
            puts(whole);
        else if (!rest)
            report_fail("\"%s\" is no problem; it begins with a pass and a dtype", text);
        else
            check_problem(context, arguments, whole, line + n);
    }
}

static int check_file(mfa_context *context, const struct arguments *arguments)
{
    FILE *file = fopen(arguments->cases, "r");
    char text[LINE];
    if (!file) {
        perror(arguments->cases);
        return 0;
    }
    for (int line = 0; fgets(text, sizeof text, file); line++) {
        text[strcspn(text, "#\n")] = 0;
        for (size_t end = strlen(text); end && text[end - 1] == ' '; end--)
            text[end - 1] = 0;
        if (*text)
            check_line(context, arguments, text, line);
    }
    fclose(file);
    return 1;
}

int main(int count, char **words)
{
    struct arguments arguments;
    mfa_context *context = NULL;
    if (!arguments_parse(&arguments, count, words))
        return 2;
    report_begin("check_attention", arguments.seed);
    mfa_context_options options = {.size = sizeof options, .isa = arguments.isa};
    if (mfa_context_create(&options, &context) != MFA_OK) {
        fprintf(stderr, "%s\n", mfa_last_error());
        return 2;
    }
    guarded_report_faults();
    int there = 1;
    for (int n = 0; n < arguments.problem_count; n++)
        check_line(context, &arguments, arguments.problems[n], n);
    if (!arguments.problem_count)
        there = check_file(context, &arguments);
    mfa_context_destroy(context);
    return there ? report_end() : 2;
}
