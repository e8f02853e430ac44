/* The cases of a check program: the problems of its command line, or else those of the case list.
 *
 * A line is a problem in the library's own syntax, whose pass may be "both" (forward, and backward from the outputs of
 * forward) and whose dtype may be "any", which makes it one case for each dtype. */
#ifndef SUPPORT_CASES_H
#define SUPPORT_CASES_H

#include <stdio.h>

#include "mfa.h"
#include "support/arguments.h"

enum { CASE_TEXT = 512 };
enum { CASE_FORWARD = 1, CASE_BACKWARD = 2 };

struct one_case {
    char text[CASE_TEXT]; /* the line, in one dtype */
    int line;             /* counted from 0 */
    int number;           /* where not all variants are run, it selects different ones for each case */
    int passes;
    mfa_problem problem; /* forward */
};

/* Makes a case from its text; 0: the text is not a problem, and mfa_last_error() says why. */
int case_parse(const char *text, struct one_case *one);

/* Multiplications of the forward pass; a case with at most CASE_SMALL of them gets more runs. */
double case_multiplications(const mfa_problem *problem);
#define CASE_SMALL 3e5

struct cases {
    const struct arguments *arguments;
    FILE *file; /* NULL: none, or at its end */
    char line[CASE_TEXT];
    int number, dtype; /* of the line; the next of the dtypes that "any" stands for */
};

/* 0: the case list cannot be opened, which is reported. */
int cases_open(struct cases *cases, const struct arguments *arguments);

/* The next case that the filter accepts; 0: there are no more. A line that is not a problem is reported. */
int cases_next(struct cases *cases, struct one_case *one);

#endif
