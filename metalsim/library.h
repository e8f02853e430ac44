/* What a loaded library is to the rest of metalsim. */
#ifndef METALSIM_LIBRARY_H
#define METALSIM_LIBRARY_H

#include "error.h"
#include "include/metalsim/abi.h"
#include "metalsim.h"

struct metalsim_kernel {
    const struct metalsim_library *library;
    const struct metalsim_entry *entry;
};

struct metalsim_library {
    void *handle; /* of dlopen */
    const struct metalsim_object *object;
    struct metalsim_kernel *kernels;
    unsigned build;
    char *path; /* of the compiled file */
};

/* Adds the text of the file at `path` after preprocessing, without our headers and with all attributes. */
metalsim_status metalsim_library_preprocess(const char *path, struct metalsim_text *result);

#endif
