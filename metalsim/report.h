/* Findings as text, their places as lines of the .metal files. */
#ifndef METALSIM_REPORT_H
#define METALSIM_REPORT_H

#include "group.h"
#include "library.h"

/* Makes the findings of a dispatch the calling thread's error, a line each; returns METALSIM_FAULT. */
metalsim_status metalsim_report(const struct metalsim_library *library, const char *kernel,
                                const struct metalsim_findings *findings);

#endif
