/* The Metal kernels against the reference, on a substitute for an Apple GPU (metal/gpu.h).
 *
 *     check_metal [options of check_attention] [PROBLEM ...]     these problems, or the case list
 *     check_metal --tiles         problems for each row of src/metal/tiles.c
 *     check_metal --random N      N problems drawn from the seed
 *     check_metal --basics        what is the same for all problems (metal/basics.h), instead of the case list
 *     --checked                   look for races and the like
 *     --fast-math                 kernels compiled with fast math, which is Metal's default
 *     --quick                     one run of each problem, of kernels that are compiled without optimisation
 *
 * Each line of the case list is taken in f32, f16 and bf16, for one of the GPU families that have tiles of their own (a
 * quarter of them for tiles with half the threads), and run forward and backward through tiles, source and dispatch.
 * Results must be within the tolerance, the blocks visited must be those that have to be, and three schedules of
 * threads must give the same bits. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/problem.h"
#include "metal/basics.h"
#include "metal/gpu.h"
#include "metal/problems.h"
#include "metal/test_case.h"
#include "metal/tiles.h"
#include "mfa.h"
#include "support/arguments.h"
#include "support/cases.h"
#include "support/report.h"
#include "support/test_case.h"

static struct gpu_settings settings;

struct test_run { /* a problem under test, and the tiles with which it is run */
    struct test_case test_case;
    struct metal_target target;
    double worst; /* of all variants */
};

static const char *describe(const struct test_run *t, enum arrangement arrangement, int64_t chunk)
{
    static const char *const schedules[] = {"natural", "reversed", "shuffled"};
    return test_case_describe(&t->test_case, "apple%d%s, %s, chunk %lld, %s", t->target.family,
                              t->target.halved ? " halved" : "", arrangement_name(arrangement), (long long)chunk,
                              schedules[settings.schedule]);
}

/* Runs, and reports what goes wrong. */
static int run(struct test_run *t, enum arrangement arrangement, unsigned wanted, int64_t chunk,
               struct reference *results)
{
    const char *what = describe(t, arrangement, chunk);
    guarded_testing(what);
    const char *wrong = metal_test_case_run(&t->test_case, t->target, arrangement, wanted, chunk, results);
    if (wrong)
        report_fail("%s\n        %s", what, wrong);
    return !wrong;
}

/* One run that must be close to the reference. */
static int check(struct test_run *t, enum arrangement arrangement, unsigned wanted, int64_t chunk)
{
    struct reference results;
    int good = run(t, arrangement, wanted, chunk, &results) &&
               test_case_is_right(&t->test_case, describe(t, arrangement, chunk), &results);
    reference_close(&results);
    if (good)
        report_pass();
    return good;
}

/* The same bits for every schedule and every division of the threadgroups into commands. */
static int check_same(struct test_run *t, int64_t chunk)
{
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS | OUTPUT(O_LOW);
    const enum gpu_schedule usual = settings.schedule;
    struct reference expected, results;
    int good = run(t, DENSE, all, 0, &expected);
    for (int schedule = GPU_REVERSED; schedule <= GPU_SHUFFLED && good; schedule++) {
        settings.schedule = schedule;
        gpu_set(&settings);
        good = run(t, DENSE, all, chunk, &results) &&
               test_case_is_same(&t->test_case, describe(t, DENSE, chunk), &results, &expected);
        reference_close(&results);
    }
    settings.schedule = usual;
    gpu_set(&settings);
    reference_close(&expected);
    if (good)
        report_pass();
    return good;
}

/* f64 and masks of it are unsupported, with a sentence. */
static int check_unsupported(const struct one_case *one)
{
    const mfa_problem *problem = &one->problem;
    if (problem->dtype != MFA_F64 && (problem->mask != MFA_MASK_ADDITIVE || problem->mask_dtype != MFA_F64))
        return 0;
    mfa_problem canonical;
    if (mfa_problem_check(problem, &canonical) == MFA_OK && mfa_metal_tiles_supports(&canonical) == MFA_UNSUPPORTED &&
        strstr(mfa_last_error(), "f64"))
        report_pass();
    else
        report_fail("%s: should be unsupported for its f64, but: %s", one->text, mfa_last_error());
    return 1;
}

enum thoroughness { ONCE, TWICE, ALL_SCHEDULES };

/* One variant of a problem, in one arrangement and as much more as `thorough` says. */
static int check_variant(struct test_run *t, const struct one_case *one, struct variant variant, uint64_t seed,
                         enum arrangement arrangement, enum thoroughness thorough)
{
    const int number = one->number;
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS | (number % 4 ? OUTPUT(O_LOW) : 0);
    test_case_open(&t->test_case, one, variant, seed);
    int good = check(t, arrangement, all, 0);
    if (thorough >= TWICE)
        good = check(t, 1 + number % (ARRANGEMENTS - 1), number % 2 ? all : FORWARD_OUTPUTS | OUTPUT(dK), 7) && good;
    if (thorough == ALL_SCHEDULES)
        good = good && check_same(t, 1 + number % 5);
    t->worst = fmax(t->worst, t->test_case.worst);
    test_case_close(&t->test_case);
    return good;
}

static void print_verdict(const struct test_run *t, const struct one_case *one, int good, clock_t begin)
{
    printf("%-6s error %4.0f %% of the tolerance, %6.2f s  apple%d%s %s\n", good ? "ok" : "FAILED", 100 * t->worst,
           (double)(clock() - begin) / CLOCKS_PER_SEC, t->target.family, t->target.halved ? " halved" : "", one->text);
    fflush(stdout);
}

static void check_case(const struct arguments *arguments, const struct one_case *one)
{
    const int number = one->number, along = 1 + number % 15;
    const int small = case_multiplications(&one->problem) <= CASE_SMALL, masked = one->problem.mask != MFA_MASK_NONE;
    const enum thoroughness thorough = arguments->quick ? ONCE : small ? ALL_SCHEDULES : TWICE;
    const clock_t begin = clock();
    struct test_run t = {.target = {number % 2 ? 7 : 9, number % 8 > 5, 0}};
    if (check_unsupported(one))
        return;
    int good = check_variant(&t, one, (struct variant){.dlse = number % 2}, arguments->seed, DENSE, thorough);
    if (small && !arguments->quick) {
        const struct variant broadcast = {.mask_broadcast = masked ? along : 0,
                                          .dbias_broadcast = masked ? (number % 3 ? along : along ^ 15) : 0,
                                          .kv_broadcast = masked ? 0 : 1 + number % 3,
                                          .heads_broadcast = number % 4,
                                          .map_broadcast = number % 12,
                                          .dlse = number % 2};
        good = check_variant(&t, one, broadcast, arguments->seed, (number + 1) % ARRANGEMENTS, ONCE) && good;
    }
    if (arguments->verbose)
        print_verdict(&t, one, good, begin);
}

/* Checks the cases of the command line or of the case list. */
static void check_cases(const struct arguments *arguments)
{
    struct cases cases;
    struct one_case one;
    if (cases_open(&cases, arguments))
        while (cases_next(&cases, &one)) {
            if (arguments->list)
                puts(one.text);
            else
                check_case(arguments, &one);
        }
}

/* Checks a series of problems.h. */
static void check_generated(const struct arguments *arguments, int count,
                            int (*make)(struct generated *, uint64_t seed, int n))
{
    struct generated g;
    for (int n = 0; n < count && make(&g, arguments->seed, n); n++) {
        struct test_run t = {.target = g.target};
        struct one_case one = {.number = n, .passes = g.passes, .problem = g.problem};
        snprintf(one.text, sizeof one.text, "%s", g.text);
        if ((arguments->filter && !strstr(g.text, arguments->filter)) || !arguments_take(arguments))
            continue;
        const clock_t begin = clock();
        const int good = check_variant(&t, &one, g.variant, arguments->seed, g.arrangement, ONCE);
        if (arguments->verbose)
            print_verdict(&t, &one, good, begin);
    }
}

static void check_basics(void)
{
    basics_check_layout();
    basics_check_lowest_mask();
    basics_check_large_sinks();
    basics_check_dropout();
    if (!settings.fast_math) { /* which assumes that there are no NaN, and changes nothing of integers */
        basics_check_wrong_lengths(&settings);
        basics_check_rounding();
        basics_check_codes();
        basics_check_overflow();
    }
}

int main(int count, char **words)
{
    struct arguments arguments;
    int tiles = 0, basics = 0;
    const struct option own[] = {
        {"checked", no_argument, &settings.checked, 1},
        {"fast-math", no_argument, &settings.fast_math, 1},
        {"tiles", no_argument, &tiles, PROBLEMS_OF_TILES},
        {"basics", no_argument, &basics, 1},
        {0},
    };
    if (!arguments_parse(&arguments, count, words, own))
        return 2;
    report_begin("check_metal", arguments.seed);
    if (arguments.bits && !report_bits_to(arguments.bits))
        return 2;
    settings.cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim";
    settings.seed = arguments.seed;
    settings.unoptimised = arguments.quick && !settings.fast_math; /* which acts in the optimiser */
    gpu_set(&settings);
    guarded_report_faults();
    check_generated(&arguments, tiles, problems_of_tiles);
    check_generated(&arguments, arguments.random, problems_random);
    if (basics && arguments.shard == 0)
        check_basics();
    if (arguments.problem_count || (!tiles && !basics && !arguments.random))
        check_cases(&arguments);
    return report_end();
}
