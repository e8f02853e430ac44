/* Reads the kernels' parameters with their [[attributes]], which clang does not keep, and their arrays in threadgroup
 * memory. */
#ifndef METALSIM_PARAMETERS_H
#define METALSIM_PARAMETERS_H

#include "error.h"

/* text: preprocessed MSL. Adds to `code` the C++ that binds each kernel's parameters and exports them all
 * (abi.h, binding.h). 0: something is wrong, and `error` says what. */
int metalsim_parameters_write(const char *text, struct metalsim_text *code, struct metalsim_text *error);

#endif
