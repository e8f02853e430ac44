/* The cases of a check program: the problems of its command line, or else those of the case list.
 *
 * A line is a problem in the library's own syntax, whose pass may be "both" (forward, and backward from what forward
 * gave) and whose dtype may be "any", which makes it a case in each. */
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
    int number;           /* makes cases differ in what they choose where not all is done */
    int passes;
    mfa_problem problem; /* forward */
};

/* A case from its text; 0: that is no problem, and mfa_last_error() says why. */
int case_parse(const char *text, struct one_case *one);

/* Multiplications of forward, and up to how many of them a case is small, so that more is done with it. */
double case_multiplications(const mfa_problem *problem);
#define CASE_SMALL 3e5

struct cases {
    const struct arguments *arguments;
    FILE *file; /* NULL: none, or at its end */
    char line[CASE_TEXT];
    int number, dtype; /* of the line; of those that "any" stands for, the next */
};

/* 0: the case list cannot be opened, which is reported. */
int cases_open(struct cases *cases, const struct arguments *arguments);

/* The next case that the filter takes; 0: there are no more. What is no problem is reported, with its line. */
int cases_next(struct cases *cases, struct one_case *one);

#endif
