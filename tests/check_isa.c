/* Which instruction sets the CPU backend takes on this machine.
 *
 *     check_isa "scalar, neon, neonbf16" [OTHER...]
 *
 * The first argument is what this machine has: each of these is taken, by isa and by MFA_ISA, and unasked the last one,
 * whose name a plan for bf16 ends with. The others are refused, with a sentence. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kit/report.h"
#include "mfa.h"

enum { LINE = 256 };

static void expect(const char *what, const char *name, const char *got, const char *expected)
{
    if (!strcmp(got, expected))
        report_pass();
    else
        report_fail("%s %s\n        got:      %s\n        expected: %s", what, name, got, expected);
}

/* What a context with these options computes bf16 with: the last word of the kernel's key; else why there is none. */
static const char *machine(const char *isa)
{
    static char text[LINE];
    const mfa_context_options options = {.size = sizeof options, .isa = isa};
    mfa_context *context;
    mfa_plan *plan;
    mfa_problem problem;
    if (mfa_context_create(&options, &context) != MFA_OK)
        return mfa_last_error();
    if (mfa_problem_parse("forward bf16 b1 h2 q64 kv64 d64", &problem) == MFA_OK &&
        mfa_plan_create(context, &problem, &plan) == MFA_OK) {
        mfa_plan_describe(plan, text, sizeof text);
        mfa_plan_destroy(plan);
    }
    mfa_context_destroy(context);
    char *end = strstr(text, " threads ");
    if (!end)
        return mfa_last_error();
    *end = 0;
    return strrchr(text, '_') + 1;
}

static const char *machine_of_environment(const char *isa)
{
    setenv("MFA_ISA", isa, 1);
    const char *found = machine(NULL);
    unsetenv("MFA_ISA");
    return found;
}

int main(int count, char **words)
{
    char names[LINE], sentence[LINE];
    const char *best = NULL;
    if (count < 2 || strlen(words[1]) >= sizeof names) {
        fprintf(stderr, "usage: %s \"NAME, NAME...\" [OTHER...]\n", words[0]);
        return 2;
    }
    report_begin("check_isa", 1);
    unsetenv("MFA_ISA");
    strcpy(names, words[1]);
    for (char *name = strtok(names, ", "); name; name = strtok(NULL, ", ")) {
        expect("isa", name, machine(name), name);
        expect("MFA_ISA", name, machine_of_environment(name), name);
        best = name;
    }
    expect("the best", "", machine(NULL), best ? best : "");
    for (int n = 2; n < count; n++) {
        snprintf(sentence, sizeof sentence, "isa is %s; this machine has %s", words[n], words[1]);
        expect("isa", words[n], machine(words[n]), sentence);
        snprintf(sentence, sizeof sentence, "MFA_ISA is %s; this machine has %s", words[n], words[1]);
        expect("MFA_ISA", words[n], machine_of_environment(words[n]), sentence);
    }
    return report_end();
}
