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
    "  --isa NAME     instruction set:%s; check_attention: all of them (the best)\n"
    "  --filter TEXT  only cases whose text has it\n"
    "  --threads N    run with N threads (1, 2, 3 and 7 in turn)\n"
    "  --repeat N     runs of each case that must be the same bit for bit (20 for small cases)\n"
    "  --random N     N problems drawn from the seed, in place of the list\n"
    "  --shard K/N    every Nth of the problems, from number K on, counted from 0\n"
    "  --bench        time each case that has passed\n"
    "  --quick        one variant of each case, few arrangements: for emulators and sanitizers\n"
    "  --list         print the cases and end\n"
    "  --verbose      a line for each case and dtype\n"
    "  --cases FILE   the case list (tests/cases.txt)\n"
    "  --bits FILE    write a hash of each result: two libraries that write the same compute the same bits\n"
    "%s"
    "A PROBLEM is a line as in the case list, such as \"both f32 b1 h2 q64 kv64 d64 causal\".\n";

enum { MAX_OPTIONS = 32 };

static void print_usage(FILE *to, const char *program, const struct option *own)
{
    char names[256] = "", others[256] = "";
    const char *name;
    for (int32_t n = 0; (name = mfa_isa_name(n)); n++) {
        const size_t length = strlen(names);
        snprintf(names + length, sizeof names - length, " %s", name);
    }
    for (; own && own->name; own++) {
        const size_t length = strlen(others);
        snprintf(others + length, sizeof others - length, "  --%s%s\n", own->name, own->has_arg ? " N" : "");
    }
    fprintf(to, usage, program, names, others);
}

static int number(const char *option, const char *text, unsigned long long most, unsigned long long *value)
{
    char *end = NULL;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno && *value <= most)
        return 1;
    fprintf(stderr, "--%s is given %s; it takes a number from 0 to %llu\n", option, text, most);
    return 0;
}

/* Reads the argument of an option that has one; 0: it is none, which was reported. */
static int read_argument(struct arguments *arguments, const struct option *option)
{
    unsigned long long value;
    char end;
    switch (option->val) {
    case 'i': arguments->isa = optarg; return 1;
    case 'f': arguments->filter = optarg; return 1;
    case 'c': arguments->cases = optarg; return 1;
    case 'b': arguments->bits = optarg; return 1;
    case 'S':
        if (!number(option->name, optarg, UINT64_MAX, &value))
            return 0;
        arguments->seed = value;
        return 1;
    case 'K':
        if (sscanf(optarg, "%d/%d%c", &arguments->shard, &arguments->shards, &end) == 2 && arguments->shard >= 0 &&
            arguments->shard < arguments->shards)
            return 1;
        fprintf(stderr, "--shard is given %s; it takes K/N with K from 0 to N - 1\n", optarg);
        return 0;
    default:
        if (!number(option->name, optarg, 1000000, &value))
            return 0;
        *option->flag = (int)value;
        return 1;
    }
}

int arguments_parse(struct arguments *arguments, int count, char **words, const struct option *own)
{
    memset(arguments, 0, sizeof *arguments);
    arguments->seed = arguments->shards = 1;
    arguments->cases = "tests/cases.txt";
    struct option options[MAX_OPTIONS + 1] = {
        {"seed", required_argument, NULL, 'S'},
        {"isa", required_argument, NULL, 'i'},
        {"filter", required_argument, NULL, 'f'},
        {"cases", required_argument, NULL, 'c'},
        {"bits", required_argument, NULL, 'b'},
        {"shard", required_argument, NULL, 'K'},
        {"threads", required_argument, &arguments->threads, 0},
        {"repeat", required_argument, &arguments->repeat, 0},
        {"random", required_argument, &arguments->random, 0},
        {"bench", no_argument, &arguments->bench, 1},
        {"quick", no_argument, &arguments->quick, 1},
        {"list", no_argument, &arguments->list, 1},
        {"verbose", no_argument, &arguments->verbose, 1},
        {"help", no_argument, NULL, 'h'},
    };
    int known = 0, at = 0, found;
    while (options[known].name)
        known++;
    for (const struct option *option = own; option && option->name && known < MAX_OPTIONS; option++)
        options[known++] = *option;
    while ((found = getopt_long(count, words, "", options, &at)) != -1) {
        if (found == '?' || found == 'h') {
            print_usage(found == 'h' ? stdout : stderr, words[0], own);
            return 0;
        }
        if (options[at].has_arg && !read_argument(arguments, &options[at]))
            return 0;
    }
    arguments->problems = (const char **)words + optind;
    arguments->problem_count = count - optind;
    return 1;
}

int arguments_take(const struct arguments *arguments)
{
    static int number;
    return number++ % arguments->shards == arguments->shard;
}
