/* The Metal backend against the reference: problems of the case list through the public interface, on metalsim's
 * runtime.
 *
 *     check_host [options of check_attention] [--checked] [--every N] [PROBLEM ...]
 *
 * Without problems: those below, which together cover every kernel, dtype, kind of mask, split of columns and use of
 * the workspace; or one in N of the case list. --checked: kernels are checked for races, bounds and memory never
 * written. The cache folder is a new one, so that every kernel is compiled. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "metal_host/host.h"
#include "support/arguments.h"
#include "support/cases.h"
#include "support/report.h"

/* pass, dtype ("any": the three that Metal has), and so on */
static const char *problems[] = {
    "both any b1 h4/2 q33 kv70 d64 causal mask_f32 softcap5",
    "both any b2 h6/2 q37 kv41 d24 lower-9 upper5",
    "both any b1 h2 q33 kv40 d200 mask_bool",
    "both any b1 h3/1 q5 kv9 d20v12 mask_bool softcap30",
    "both f32 b1 h1 q17 kv20 d264 mask_f16",
    "both bf16 b1 h1 q17 kv20 d264 mask_bf16",
    "both f16 b2 h2 q65 kv130 d128 causal",
    "both any b1 h1 q1 kv1 d1",
    "both any b2 h2 q0 kv5 d8",
    "both any b2 h2 q5 kv0 d8 mask_f32",
    "both any b1 h0 q5 kv5 d8",
    "forward any b1 h4/2 q1 kv1100 d64",
    "forward f16 b1 h8/1 q1 kv600 d128 mask_bool",
    "backward bf16 b1 h2 q64 kv64 d96 upper3",
    "both any b3 h4/2 q33 kv70 d64 varlen_q total_q60 varlen_kv total_kv150 seqused_k causal bottom_right mask_f32 "
    "sinks",
    "forward f16 b2 h4/2 q1 kv1100 d64 cache_batch_idx kv_batch3 seqused_k leftpad_k",
    "forward f16 b2 h8/2 q1 kv1100 d128 page_size16 kv_batch80 seqused_k",
    "forward any b2 h4/2 q33 kv70 d64 causal k_group32 k_int4 v_e4m3",
    "forward f16 b2 h8/2 q1 kv600 d64 page_size16 kv_batch80 k_int8 v_int8 seqused_k",
    "forward bf16 b1 h2 q1 kv600 d64 v_nf4",
};

static void check_case(mfa_context *context, const struct arguments *arguments, const struct one_case *one)
{
    struct test_case s;
    const int number = one->number;
    const clock_t begin = clock();
    const struct host_options runs[] = {
        {.own_workspace = number % 2},
        {.arrangement = 1 + number % (ARRANGEMENTS - 1), .outputs = number % 2 ? 0 : OUTPUT(O) | OUTPUT(dV)},
    };
    int good = 1;
    for (int options = 0; options < (arguments->quick ? 1 : 2); options++) {
        if (!host_test_case_open(&s, one->text, options ? number : 0, arguments->seed))
            return;
        const int right = host_check(context, &s, &runs[options]);
        test_case_close(&s);
        good = good && right;
        if (right)
            report_pass();
    }
    good = host_is_clean(0) && good;
    printf("%-6s error %4.0f %% of the tolerance, %6.2f s  %s\n", good ? "ok" : "FAILED", 100 * s.worst,
           (double)(clock() - begin) / CLOCKS_PER_SEC, one->text);
    fflush(stdout);
}

/* Skips cases with f64, which Metal does not have. `every`: of the case list, one line in this many. */
static void check_cases(mfa_context *context, struct arguments *arguments, int every)
{
    struct cases cases;
    struct one_case one;
    if (!arguments->problem_count && !every) {
        arguments->problems = problems;
        arguments->problem_count = sizeof problems / sizeof *problems;
    }
    const int step = arguments->problem_count ? 1 : every;
    if (cases_open(&cases, arguments))
        while (cases_next(&cases, &one)) {
            if (one.line % step != 0 || strstr(one.text, "f64"))
                continue;
            if (arguments->list)
                puts(one.text);
            else
                check_case(context, arguments, &one);
        }
}

int main(int count, char **words)
{
    struct arguments arguments;
    struct metalsim_settings settings;
    int every = 0;
    metalsim_runtime_defaults(&settings);
    const struct option own[] = {
        {"checked", no_argument, &settings.checked, 1},
        {"every", required_argument, &every, 0},
        {0},
    };
    if (!arguments_parse(&arguments, count, words, own))
        return 2;
    report_begin("check_host", arguments.seed);
    settings.seed = arguments.seed;
    host_set(&settings);
    guarded_report_faults();
    const char *folder = host_folder();
    mfa_context *context = host_open(folder);
    if (!context)
        return report_end();
    check_cases(context, &arguments, every);
    mfa_context_destroy(context);
    if (host_is_clean(1))
        report_pass();
    host_remove(folder);
    return report_end();
}
