/* Reads the command line of a check program. */
#include "support/arguments.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mfa.h"

static const char usage[] =
    "usage: %s [options] [PROBLEM...]\n"
    "  --seed N       of the random inputs (1)\n"
    "  --isa NAME     instruction set:%s (the best)\n"
    "  --filter TEXT  only cases whose text has it\n"
    "  --threads N    run with N threads (1, 2, 3 and 7 in turn)\n"
    "  --repeat N     runs of each case that must be the same bit for bit (20 for small cases)\n"
    "  --random N     N problems drawn from the seed, in place of the list\n"
    "  --bench        time each case that has passed\n"
    "  --quick        one variant of each case, few arrangements: for emulators and sanitizers\n"
    "  --list         print the cases and end\n"
    "  --verbose      a line for each case and dtype\n"
    "  --cases FILE   the case list (tests/cases.txt)\n"
    "  --bits FILE    write a hash of each result: two libraries that write the same compute the same bits\n"
    "A PROBLEM is a line as in the case list, such as \"both f32 b1 h2 q64 kv64 d64 causal\".\n";

static void print_usage(FILE *to, const char *program)
{
    char names[256] = "";
    const char *name;
    for (int32_t n = 0; (name = mfa_isa_name(n)); n++) {
        const size_t length = strlen(names);
        snprintf(names + length, sizeof names - length, " %s", name);
    }
    fprintf(to, usage, program, names);
}

static int number(const char *option, const char *text, unsigned long long most, unsigned long long *value)
{
    char *end = NULL;
    errno = 0;
    *value = text ? strtoull(text, &end, 10) : 0;
    if (text && *text >= '0' && *text <= '9' && !*end && !errno && *value <= most)
        return 1;
    fprintf(stderr, "%s is given %s; it takes a number from 0 to %llu\n", option, text ? text : "nothing", most);
    return 0;
}

int arguments_parse(struct arguments *arguments, int count, char **words)
{
    memset(arguments, 0, sizeof *arguments);
    arguments->seed = 1;
    arguments->cases = "tests/cases.txt";
    arguments->problems = (const char **)words;
    struct { const char *name; int *value; } flags[] = {
        {"--bench", &arguments->bench}, {"--quick", &arguments->quick},
        {"--list", &arguments->list}, {"--verbose", &arguments->verbose}};
    struct { const char *name; int *value; } numbers[] = {
        {"--threads", &arguments->threads}, {"--repeat", &arguments->repeat},
        {"--random", &arguments->random}};
    struct { const char *name; const char **value; } texts[] = {
        {"--isa", &arguments->isa}, {"--filter", &arguments->filter}, {"--cases", &arguments->cases},
        {"--bits", &arguments->bits}};
    for (int at = 1; at < count; at++) {
        const char *word = words[at], *next = at + 1 < count ? words[at + 1] : NULL;
        unsigned long long value;
        int known = 0;
        for (size_t n = 0; n < sizeof flags / sizeof *flags; n++)
            if (!strcmp(word, flags[n].name))
                known = *flags[n].value = 1;
        if (!strcmp(word, "--seed")) {
            if (!number(word, next, UINT64_MAX, &value))
                return 0;
            arguments->seed = value;
            known = 2;
        }
        for (size_t n = 0; n < sizeof numbers / sizeof *numbers; n++)
            if (!strcmp(word, numbers[n].name)) {
                if (!number(word, next, 1000000, &value))
                    return 0;
                *numbers[n].value = (int)value;
                known = 2;
            }
        for (size_t n = 0; n < sizeof texts / sizeof *texts; n++)
            if (next && !strcmp(word, texts[n].name)) {
                *texts[n].value = next;
                known = 2;
            }
        if (!known && *word != '-')
            arguments->problems[arguments->problem_count++] = word;
        else if (!known) {
            print_usage(strcmp(word, "--help") ? stderr : stdout, words[0]);
            return 0;
        }
        at += known == 2;
    }
    return 1;
}
