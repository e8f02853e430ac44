/* The Metal kernels against the reference, on what stands in for a GPU (metal/gpu.h).
 *
 *     check_metal [options of check_attention] [PROBLEM ...]     these problems, or the case list
 *     check_metal --tiles         problems for each row of src/metal/tiles.c
 *     check_metal --random N      N problems from the seed
 *     --checked                   look for races and the like
 *     --fast-math                 kernels compiled as Metal does if it is not told otherwise
 *     --shard K/N                 every Nth of these problems from number K on
 *
 * Each line of the case list is taken in f32, f16 and bf16, for one of the GPU families that have tiles of their own (a
 * quarter of them for tiles with half the threads), and run forward and backward through tiles, source and dispatch.
 * Results must be within the tolerance, tiles visited must be those that can be seen, and three schedules of threads
 * must give the same bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/problem.h"
#include "kit/arguments.h"
#include "kit/compare.h"
#include "kit/report.h"
#include "metal/basics.h"
#include "metal/gpu.h"
#include "metal/problems.h"
#include "metal/subject.h"
#include "metal/tiles.h"
#include "mfa.h"

enum { LINE = 512 };

static struct gpu_settings settings;

static int shard, shards = 1;

/* Whether the next problem is one of this shard. */
static int mine(void)
{
    static int number;
    return number++ % shards == shard;
}

/* Multiplications up to which a case is small: it is run with all schedules. */
static const double SMALL = 3e5;

static const char *describe(const struct subject *s, enum arrangement arrangement, int64_t chunk)
{
    static char what[LINE + 256];
    const struct variant *v = &s->inputs.variant;
    static const char *const schedules[] = {"natural", "reversed", "shuffled"};
    snprintf(what, sizeof what, "%s | apple%d%s, %s, broadcast mask %d dbias %d K V %d%s, chunk %lld, %s", s->text,
             s->target.family, s->target.halved ? " halved" : "", arrangement_name(arrangement), v->mask_broadcast,
             v->dbias_broadcast, v->kv_broadcast, v->dlse ? ", dL given" : "", (long long)chunk,
             schedules[settings.schedule]);
    return what;
}

/* Runs, and reports what goes wrong. */
static int run(struct subject *s, enum arrangement arrangement, unsigned wanted, int64_t chunk,
               struct reference *results)
{
    const char *what = describe(s, arrangement, chunk);
    guarded_testing(what);
    const char *wrong = subject_run(s, arrangement, wanted, chunk, results);
    if (wrong)
        report_fail("%s\n        %s", what, wrong);
    return !wrong;
}

/* Compares those of the results that there are: bit for bit, or within the tolerance. */
static int compare(struct subject *s, const char *what, int same, struct reference *results,
                   const struct reference *expected)
{
    int good = 1;
    struct reference reference = *expected;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(results, tensor), *right = *reference_member(&reference, tensor);
        int64_t shape[4];
        reference_shape(&s->inputs.problem, tensor, shape);
        if (!got || !right)
            continue;
        if (same)
            good = compare_same(what, tensor_name(tensor), shape, got, right) && good;
        else
            good =
                compare_close(what, tensor_name(tensor), shape, got, right, subject_tolerance(s, tensor), &s->worst) &&
                good;
    }
    return good;
}

/* One run that must be close to the reference. */
static int check(struct subject *s, enum arrangement arrangement, unsigned wanted, int64_t chunk)
{
    struct reference results;
    int good = run(s, arrangement, wanted, chunk, &results) &&
               compare(s, describe(s, arrangement, chunk), 0, &results, &s->truth);
    reference_close(&results);
    if (good)
        report_pass();
    return good;
}

/* The same bits on every schedule, however the threadgroups are cut into commands. */
static int check_same(struct subject *s, int64_t chunk)
{
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    const enum gpu_schedule usual = settings.schedule;
    struct reference expected, results;
    int good = run(s, DENSE, all, 0, &expected);
    for (int schedule = GPU_REVERSED; schedule <= GPU_SHUFFLED && good; schedule++) {
        settings.schedule = schedule;
        gpu_set(&settings);
        good = run(s, DENSE, all, chunk, &results) && compare(s, describe(s, DENSE, chunk), 1, &results, &expected);
        reference_close(&results);
    }
    settings.schedule = usual;
    gpu_set(&settings);
    reference_close(&expected);
    if (good)
        report_pass();
    return good;
}

static double multiplications(const mfa_problem *p)
{
    return (double)p->batch * (double)p->q_heads * (double)p->q_len * (double)p->kv_len *
           (double)(p->head_dim + p->value_dim);
}

/* f64, and masks of it, are refused with a sentence. */
static int check_refused(const mfa_problem *problem, const char *text)
{
    if (problem->dtype != MFA_F64 && (problem->mask != MFA_MASK_ADDITIVE || problem->mask_dtype != MFA_F64))
        return 0;
    mfa_problem canonical;
    if (mfa_problem_check(problem, &canonical) == MFA_OK && mfa_metal_tiles_supports(&canonical) == MFA_UNSUPPORTED &&
        strstr(mfa_last_error(), "f64"))
        report_pass();
    else
        report_fail("%s: should be refused for its f64, but: %s", text, mfa_last_error());
    return 1;
}

enum thoroughness { ONCE, TWICE, ALL_SCHEDULES };

/* One variant of a problem, in one arrangement and as much more as `thorough` says. */
static int check_variant(struct subject *s, const mfa_problem *problem, struct variant variant, uint64_t seed,
                         enum arrangement arrangement, enum thoroughness thorough, int number)
{
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    subject_open(s, problem, variant, seed);
    int good = check(s, arrangement, all, 0);
    if (thorough >= TWICE)
        good = check(s, 1 + number % (ARRANGEMENTS - 1), number % 2 ? all : FORWARD_OUTPUTS | OUTPUT(dK), 7) && good;
    if (thorough == ALL_SCHEDULES)
        good = good && check_same(s, 1 + number % 5);
    subject_close(s);
    return good;
}

static void print_verdict(const struct subject *s, int good, clock_t begin)
{
    printf("%-6s error %4.0f %% of the tolerance, %6.2f s  apple%d%s %s\n", good ? "ok" : "FAILED", 100 * s->worst,
           (double)(clock() - begin) / CLOCKS_PER_SEC, s->target.family, s->target.halved ? " halved" : "", s->text);
    fflush(stdout);
}

/* One line in one dtype. `number` makes cases differ in what they choose where not all is done. */
static void check_problem(const struct arguments *arguments, const char *text, int number)
{
    const char *rest = strchr(text, ' ');
    char whole[LINE + 16];
    mfa_problem problem;
    int both = !strncmp(text, "both ", 5), backward = !strncmp(text, "backward ", 9);
    struct subject s = {.text = text, .target = {number % 2 ? 7 : 9, number % 8 > 5}};
    s.passes = both ? SUBJECT_FORWARD | SUBJECT_BACKWARD : backward ? SUBJECT_BACKWARD : SUBJECT_FORWARD;
    snprintf(whole, sizeof whole, "%s%s", both ? "forward" : "", both ? rest : text);
    if (mfa_problem_parse(whole, &problem) != MFA_OK) {
        report_fail("%s: %s", text, mfa_last_error());
        return;
    }
    if (check_refused(&problem, text))
        return;
    problem.pass = MFA_FORWARD;
    const clock_t begin = clock();
    const int small = multiplications(&problem) <= SMALL, masked = problem.mask != MFA_MASK_NONE;
    const int along = 1 + number % 15;
    const enum thoroughness thorough = arguments->quick ? ONCE : small ? ALL_SCHEDULES : TWICE;
    int good =
        check_variant(&s, &problem, (struct variant){.dlse = number % 2}, arguments->seed, DENSE, thorough, number);
    if (small && !arguments->quick) {
        const struct variant broadcast = {masked ? along : 0, masked ? (number % 3 ? along : along ^ 15) : 0,
                                          masked ? 0 : 1 + number % 3, number % 2};
        good =
            check_variant(&s, &problem, broadcast, arguments->seed, (number + 1) % ARRANGEMENTS, ONCE, number) && good;
    }
    if (arguments->verbose)
        print_verdict(&s, good, begin);
}

/* One line of the list, in its dtype or in all. */
static void check_line(const struct arguments *arguments, const char *text, int number)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16", "f64"};
    const char *dtype = strchr(text, ' '), *rest = dtype ? strchr(dtype + 1, ' ') : NULL;
    const int any = rest && !strncmp(dtype, " any ", 5);
    for (int n = 0; n < (any ? 4 : 1); n++) {
        char whole[LINE];
        if (any)
            snprintf(whole, sizeof whole, "%.*s %s%s", (int)(dtype - text), text, dtypes[n], rest);
        else
            snprintf(whole, sizeof whole, "%s", text);
        if ((arguments->filter && !strstr(whole, arguments->filter)) || !mine())
            continue;
        if (arguments->list)
            puts(whole);
        else if (!rest)
            report_fail("\"%s\" is no problem; it begins with a pass and a dtype", text);
        else
            check_problem(arguments, whole, number + n);
    }
}

static int check_file(const struct arguments *arguments)
{
    FILE *file = fopen(arguments->cases, "r");
    char text[LINE];
    if (!file) {
        perror(arguments->cases);
        return 0;
    }
    for (int number = 0; fgets(text, sizeof text, file); number++) {
        text[strcspn(text, "#\n")] = 0;
        for (size_t end = strlen(text); end && text[end - 1] == ' '; end--)
            text[end - 1] = 0;
        if (*text)
            check_line(arguments, text, number);
    }
    fclose(file);
    return 1;
}

/* Problems of problems.h. */
static void check_generated(const struct arguments *arguments, int count,
                            int (*make)(struct generated *, uint64_t seed, int n))
{
    struct generated g;
    for (int n = 0; n < count && make(&g, arguments->seed, n); n++) {
        struct subject s = {.text = g.text, .passes = SUBJECT_FORWARD | SUBJECT_BACKWARD, .target = g.target};
        if ((arguments->filter && !strstr(g.text, arguments->filter)) || !mine())
            continue;
        const clock_t begin = clock();
        const int good = check_variant(&s, &g.problem, g.variant, arguments->seed, g.arrangement, ONCE, n);
        if (arguments->verbose)
            print_verdict(&s, good, begin);
    }
}

/* Takes what is ours out of the command line. */
static int take_options(int count, char **words, int *tiles, int *random)
{
    int kept = 0;
    for (int n = 0; n < count; n++) {
        if (!strcmp(words[n], "--checked"))
            settings.checked = 1;
        else if (!strcmp(words[n], "--fast-math"))
            settings.fast_math = 1;
        else if (!strcmp(words[n], "--tiles"))
            *tiles = PROBLEMS_OF_TILES;
        else if (!strcmp(words[n], "--random") && n + 1 < count)
            *random = atoi(words[++n]);
        else if (!strcmp(words[n], "--shard") && n + 1 < count) {
            if (sscanf(words[++n], "%d/%d", &shard, &shards) != 2 || shards < 1)
                return 0;
        } else
            words[kept++] = words[n];
    }
    return kept;
}

int main(int count, char **words)
{
    struct arguments arguments;
    int tiles = 0, random = 0, there = 1;
    count = take_options(count, words, &tiles, &random);
    if (!count || !arguments_parse(&arguments, count, words))
        return 2;
    report_begin("check_metal", arguments.seed);
    settings.cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim";
    settings.seed = arguments.seed;
    gpu_set(&settings);
    guarded_report_faults();
    for (int n = 0; n < arguments.problem_count; n++)
        check_line(&arguments, arguments.problems[n], n);
    check_generated(&arguments, tiles, problems_of_tiles);
    check_generated(&arguments, random, problems_random);
    if (!arguments.problem_count && shard == 0) {
        basics_check_layout();
        basics_check_lowest_mask();
        if (!settings.fast_math) /* which takes liberties with NaN */
            basics_check_rounding();
    }
    if (!arguments.problem_count && !tiles && !random)
        there = check_file(&arguments);
    return there ? report_end() : 2;
}
