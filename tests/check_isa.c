/* Which instruction sets the CPU backend takes on this machine.
 *
 *     check_isa ["scalar, neon, neonbf16"]
 *
 * The argument lists the sets that this machine has, else mfa_isa_supported says so. A context accepts each of these,
 * as isa or MFA_ISA, and uses the last one by default; the key of a bf16 kernel ends with its name. The library's
 * other sets fail with a message. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mfa.h"
#include "support/report.h"

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

/* Whether a list such as "scalar, neon, neonbf16" has the name. */
static int is_in(const char *list, const char *name)
{
    const size_t length = strlen(name);
    const char *at = list;
    while ((at = strstr(at, name)) && ((at > list && at[-1] != ' ') || (at[length] && at[length] != ',')))
        at++;
    return at != NULL;
}

/* The list of the sets that the library says this machine has. */
static const char *supported(void)
{
    static char list[LINE / 2];
    size_t length = 0;
    const char *name;
    for (int32_t n = 0; (name = mfa_isa_name(n)); n++)
        if (mfa_isa_supported(name) == MFA_OK)
            length += (size_t)snprintf(list + length, sizeof list - length, "%s%s", length ? ", " : "", name);
    return list;
}

int main(int count, char **words)
{
    char sentence[LINE];
    const char *best = "", *name, *list = count > 1 ? words[1] : supported();
    report_begin("check_isa", 1);
    unsetenv("MFA_ISA");
    for (int32_t n = 0; (name = mfa_isa_name(n)); n++) {
        const int has = is_in(list, name);
        const mfa_status status = mfa_isa_supported(name);
        expect("the status of", name, mfa_status_name(status), has ? "MFA_OK" : "MFA_UNAVAILABLE");
        snprintf(sentence, sizeof sentence, "isa is %s; this machine has %s", name, list);
        if (!has)
            expect("the sentence of", name, mfa_last_error(), sentence);
        expect("isa", name, machine(name), has ? name : sentence);
        snprintf(sentence, sizeof sentence, "MFA_ISA is %s; this machine has %s", name, list);
        expect("MFA_ISA", name, machine_of_environment(name), has ? name : sentence);
        best = has ? name : best;
    }
    expect("the best", "", machine(NULL), best);
    return report_end();
}
