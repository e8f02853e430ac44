/* The command line of a check program. */
#ifndef SUPPORT_ARGUMENTS_H
#define SUPPORT_ARGUMENTS_H

#include <getopt.h>
#include <stdint.h>

struct arguments {
    uint64_t seed;
    const char *isa;    /* NULL: the best */
    const char *filter; /* only cases whose text has it; NULL: all */
    const char *cases;  /* the file */
    const char *bits;   /* a file for the hashes of results (report_bits_to); NULL: none */
    int threads;        /* 0: 1, 2, 3 and 7 */
    int repeat;         /* runs that must be the same bit for bit; 0: 20 for small cases */
    int random;         /* number of random problems, in place of the file */
    int shard, shards;  /* every problem whose number is `shard` modulo `shards` */
    int bench, list, quick, verbose;
    const char **problems; /* given on the command line, in place of the file */
    int problem_count;
};

/* `own`: the program's own options, up to one without a name; NULL: it has none. The flag of each is set to its val, or
 * to the number that is its argument. 0: the program should end, and an error, or the usage for --help, was printed. */
int arguments_parse(struct arguments *arguments, int count, char **words, const struct option *own);

/* Counts a problem; whether it is in this shard. */
int arguments_take(const struct arguments *arguments);

#endif
