/* The command line of a check program. */
#ifndef SUPPORT_ARGUMENTS_H
#define SUPPORT_ARGUMENTS_H

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
    int bench, list, quick, verbose;
    const char **problems; /* given on the command line, in place of the file */
    int problem_count;
};

/* 0: the program should end, and an error, or the usage for --help, has been printed. */
int arguments_parse(struct arguments *arguments, int count, char **words);

#endif
