/* The Metal backend against the reference: problems of the case list through the public door, on metalsim's runtime.
 *
 *     check_host [options of check_attention] [--checked] [--every N] [PROBLEM ...]
 *
 * Without problems: those below, which between them take every kernel, dtype, kind of mask, split of columns and way
 * of the workspace; or one in N of the case list. --checked: kernels are checked for races, bounds and memory never
 * written. The cache folder is a new one, so that every kernel comes to be. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kit/arguments.h"
#include "kit/report.h"
#include "metal_host/host.h"

/* pass, dtype ("any": the three that Metal has), and so on */
static const char *const problems[] = {
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
};

static void check_one(mfa_context *context, const struct arguments *arguments, const char *text, int number)
{
    struct host_subject s;
    const clock_t begin = clock();
    if (arguments->list) {
        puts(text);
        return;
    }
    const struct host_way ways[] = {
        {.own_workspace = number % 2},
        {.arrangement = 1 + number % (ARRANGEMENTS - 1), .outputs = number % 2 ? 0 : OUTPUT(O) | OUTPUT(dV)},
    };
    int good = 1;
    for (int way = 0; way < (arguments->quick ? 1 : 2); way++) {
        if (!host_subject_open(&s, text, way ? number : 0, arguments->seed))
            return;
        const int right = host_check(context, &s, &ways[way]);
        host_subject_close(&s);
        good = good && right;
        if (right)
            report_pass();
    }
    good = host_is_clean(0) && good;
    printf("%-6s error %4.0f %% of the tolerance, %6.2f s  %s\n", good ? "ok" : "FAILED", 100 * s.worst,
           (double)(clock() - begin) / CLOCKS_PER_SEC, text);
    fflush(stdout);
}

static void check_line(mfa_context *context, const struct arguments *arguments, const char *text, int number)
{
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    const char *dtype = strchr(text, ' '), *rest = dtype ? strchr(dtype + 1, ' ') : NULL;
    const int any = rest && !strncmp(dtype, " any ", 5);
    for (int n = 0; n < (any ? 3 : 1); n++) {
        char whole[512];
        if (any)
            snprintf(whole, sizeof whole, "%.*s %s%s", (int)(dtype - text), text, dtypes[n], rest);
        else
            snprintf(whole, sizeof whole, "%s", text);
        if (!arguments->filter || strstr(whole, arguments->filter))
            check_one(context, arguments, whole, number + n);
    }
}

/* One in `every` of the case list's problems. */
static void check_file(mfa_context *context, const struct arguments *arguments, int every)
{
    FILE *file = fopen(arguments->cases, "r");
    char text[512];
    if (!file) {
        report_fail("%s cannot be opened", arguments->cases);
        return;
    }
    for (int number = 0; fgets(text, sizeof text, file);) {
        text[strcspn(text, "#\n")] = 0;
        for (size_t end = strlen(text); end && text[end - 1] == ' '; end--)
            text[end - 1] = 0;
        if (*text && !strstr(text, "f64") && number++ % every == 0)
            check_line(context, arguments, text, number);
    }
    fclose(file);
}

/* Takes what is ours out of the command line. */
static int take_options(int count, char **words, struct metalsim_settings *settings, int *every)
{
    int kept = 0;
    for (int n = 0; n < count; n++)
        if (!strcmp(words[n], "--checked"))
            settings->checked = 1;
        else if (!strcmp(words[n], "--every") && n + 1 < count && atoi(words[n + 1]) > 0)
            *every = atoi(words[++n]);
        else
            words[kept++] = words[n];
    return kept;
}

int main(int count, char **words)
{
    struct arguments arguments;
    struct metalsim_settings settings;
    int every = 0;
    metalsim_runtime_defaults(&settings);
    count = take_options(count, words, &settings, &every);
    if (!arguments_parse(&arguments, count, words))
        return 2;
    report_begin("check_host", arguments.seed);
    settings.seed = arguments.seed;
    host_set(&settings);
    guarded_report_faults();
    const char *folder = host_folder();
    mfa_context *context = host_open(folder);
    if (!context)
        return report_end();
    if (arguments.problem_count)
        for (int n = 0; n < arguments.problem_count; n++)
            check_line(context, &arguments, arguments.problems[n], n);
    else if (every)
        check_file(context, &arguments, every);
    else
        for (size_t n = 0; n < sizeof problems / sizeof *problems; n++)
            check_line(context, &arguments, problems[n], (int)n);
    mfa_context_destroy(context);
    if (host_is_clean(1))
        report_pass();
    host_remove(folder);
    return report_end();
}
