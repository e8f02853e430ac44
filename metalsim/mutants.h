/* Mutants of a .metal text: one barrier is missing, or weaker than it was. A barrier that is needed has no
 * mutant that passes its tests, checked; one whose mutants pass is not needed. */
#ifndef METALSIM_MUTANTS_H
#define METALSIM_MUTANTS_H

#include <stddef.h>

#define METALSIM_MUTANT_NAME 256

/* How many mutants the text has: of each barrier, also of those that the preprocessor leaves out. */
size_t metalsim_mutants_count(const char *text);

/* Mutant i of the text, to be freed by the caller, and what it is: "tile.h:70:5: threadgroup_barrier deleted",
 * as #line has it. Two texts that include the same line have mutants of the same name. NULL: out of memory. */
char *metalsim_mutants_make(const char *text, size_t i, char name[METALSIM_MUTANT_NAME]);

/* What the compiler sees of a text, to be freed by the caller: a mutant of what the preprocessor leaves out looks like
 * the text that it was made of. `folder` must be one that can be written. NULL: the compiler did not take the text. */
char *metalsim_mutants_preprocess(const char *text, const char *folder);

#endif
