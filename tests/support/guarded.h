/* Memory between guard pages: an access one byte out of bounds faults, and the fault is reported with the name of
 * the memory and of the test. */
#ifndef SUPPORT_GUARDED_H
#define SUPPORT_GUARDED_H

#include <stddef.h>

enum guarded_placement {
    GUARDED_END,  /* the last byte lies before a guard page (or as near as the alignment allows) */
    GUARDED_BEGIN /* the first byte lies after one */
};

struct guarded {
    const char *name;
    unsigned char *bytes;   /* `size` of them */
    unsigned char *mapping; /* guard page, pages, guard page */
    size_t size, mapped;
};

/* Ends the program if there is no memory. `alignment` is a power of two, at most a page; `filler` is in
 * every byte, including those between `size` and the guard page. */
void guarded_open(struct guarded *memory, const char *name, size_t size, size_t alignment,
                  enum guarded_placement placement, unsigned char filler);
void guarded_close(struct guarded *memory);

/* Makes the pages read-only; or writable again. */
void guarded_seal(struct guarded *memory);
void guarded_unseal(struct guarded *memory);

/* Forbids all access to the whole pages that lie within [begin, end) of the bytes; returns their number. */
size_t guarded_forbid(struct guarded *memory, size_t begin, size_t end);

/* A fault from now on prints what was being tested (guarded_testing), the memory it hit, the counts, and
 * ends the program with 1. */
void guarded_report_faults(void);
void guarded_testing(const char *text); /* kept, not copied */

size_t guarded_page(void);

#endif
