/* Runs other programs. */
#ifndef METALSIM_COMMAND_H
#define METALSIM_COMMAND_H

#include "error.h"

/* Runs a program, found by PATH, with these words (NULL ends them), and adds what it writes to standard
 * output and to standard error. Its exit code; -1: it could not be run or did not exit. */
int metalsim_command_run(const char *const *words, struct metalsim_text *output, struct metalsim_text *errors);

#endif
