/* Reads lines, and makes cases of them. */
#include "support/cases.h"

#include <errno.h>
#include <string.h>

#include "support/report.h"

static const char *const dtypes[] = {"f32", "f16", "bf16", "f64"};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

int case_parse(const char *text, struct one_case *one)
{
    const char *rest = strchr(text, ' ');
    const int both = rest && !strncmp(text, "both ", 5), backward = !strncmp(text, "backward ", 9);
    char forward[CASE_TEXT + 16];
    memset(one, 0, sizeof *one);
    snprintf(one->text, sizeof one->text, "%s", text);
    one->passes = both ? CASE_FORWARD | CASE_BACKWARD : backward ? CASE_BACKWARD : CASE_FORWARD;
    snprintf(forward, sizeof forward, "%s%s", both ? "forward" : "", both ? rest : text);
    if (mfa_problem_parse(forward, &one->problem) != MFA_OK)
        return 0;
    one->problem.pass = MFA_FORWARD;
    return 1;
}

double case_multiplications(const mfa_problem *p)
{
    return (double)p->batch * (double)p->q_heads * (double)p->q_len * (double)p->kv_len *
           (double)(p->head_dim + p->value_dim);
}

int cases_open(struct cases *cases, const struct arguments *arguments)
{
    memset(cases, 0, sizeof *cases);
    cases->arguments = arguments;
    cases->number = -1;
    if (arguments->problem_count)
        return 1;
    cases->file = fopen(arguments->cases, "r");
    if (!cases->file)
        report_fail("%s cannot be opened: %s", arguments->cases, strerror(errno));
    return cases->file != NULL;
}

/* Where the line stands, for a report. */
static const char *place(const struct cases *cases)
{
    static char text[CASE_TEXT];
    const struct arguments *arguments = cases->arguments;
    snprintf(text, sizeof text, "%s:%d", arguments->problem_count ? "command line" : arguments->cases,
             cases->number + 1);
    return text;
}

/* The next line of the file, cut off if it is too long, which is reported; 0: there is none. */
static int read_line(struct cases *cases)
{
    if (!cases->file || !fgets(cases->line, sizeof cases->line, cases->file)) {
        if (cases->file)
            fclose(cases->file);
        cases->file = NULL;
        return 0;
    }
    if (!strchr(cases->line, '\n') && !feof(cases->file)) {
        report_fail("%s: the line is longer than %d characters", place(cases), CASE_TEXT - 2);
        for (int c = 0; c != '\n' && c != EOF;)
            c = getc(cases->file);
    }
    return 1;
}

/* The next line that is not empty, without its comment and trailing spaces; 0: there is none. */
static int next_line(struct cases *cases)
{
    const struct arguments *arguments = cases->arguments;
    cases->dtype = 0;
    cases->line[0] = 0;
    while (!cases->line[0]) {
        cases->number++;
        if (cases->number < arguments->problem_count)
            snprintf(cases->line, sizeof cases->line, "%s", arguments->problems[cases->number]);
        else if (!read_line(cases))
            return 0;
        cases->line[strcspn(cases->line, "#\n")] = 0;
        for (size_t end = strlen(cases->line); end && cases->line[end - 1] == ' '; end--)
            cases->line[end - 1] = 0;
    }
    return 1;
}

/* The line in its next dtype; 0: there is none left. */
static int next_dtype(struct cases *cases, char text[CASE_TEXT])
{
    const char *dtype = strchr(cases->line, ' ');
    const int any = dtype && !strncmp(dtype, " any ", 5);
    if (!cases->line[0] || cases->dtype == (any ? DTYPES : 1))
        return 0;
    if (any)
        snprintf(text, CASE_TEXT, "%.*s %s%s", (int)(dtype - cases->line), cases->line, dtypes[cases->dtype],
                 dtype + 4);
    else
        snprintf(text, CASE_TEXT, "%s", cases->line);
    cases->dtype++;
    return 1;
}

int cases_next(struct cases *cases, struct one_case *one)
{
    char text[CASE_TEXT];
    for (;;) {
        if (!next_dtype(cases, text)) {
            if (!next_line(cases))
                return 0;
            continue;
        }
        if (cases->arguments->filter && !strstr(text, cases->arguments->filter))
            continue;
        if (!arguments_take(cases->arguments))
            continue;
        if (case_parse(text, one)) {
            one->line = cases->number;
            one->number = cases->number + cases->dtype - 1;
            return 1;
        }
        report_fail("%s: \"%s\": %s", place(cases), text, mfa_last_error());
    }
}
