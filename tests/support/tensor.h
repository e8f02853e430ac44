/* A (batch, head, row, column) tensor in guarded memory, in one of several arrangements. The gaps between its
 * elements hold NaN in an input, which exposes reads of them, and a canary in an output, which exposes writes;
 * the elements of an output are NaN at first. */
#ifndef SUPPORT_TENSOR_H
#define SUPPORT_TENSOR_H

#include <stdint.h>

#include "mfa.h"
#include "support/guarded.h"

enum arrangement {
    DENSE,        /* (batch, head, row, column) */
    ROWS_FIRST,   /* (batch, row, head, column): how models have it after a projection */
    COLUMN_MAJOR, /* rows run along memory */
    PADDED,       /* a gap after each element, row, head and batch */
    REVERSED,     /* dense, with every stride negative */
    ARRANGEMENTS
};

const char *arrangement_name(enum arrangement arrangement);

struct tensor {
    struct guarded memory;
    int32_t dtype; /* an mfa_dtype, or ELEMENT_BOOL */
    int64_t shape[4];
    mfa_layout layout;
    int64_t origin; /* of element (0, 0, 0, 0), in elements from the first byte */
};

/* An input that holds `values` (dense, of `shape`) and is sealed. An extent of 1 gets stride 0. */
void tensor_open_input(struct tensor *tensor, const char *name, int32_t dtype, const int64_t shape[4],
                       enum arrangement arrangement, const double *values);

/* An output of NaNs. An extent of 1 gets stride 0 if `broadcast`, else the one it would have. */
void tensor_open_output(struct tensor *tensor, const char *name, int32_t dtype, const int64_t shape[4],
                        enum arrangement arrangement, int broadcast);

void tensor_close(struct tensor *tensor);

/* Its elements as dense doubles, which the caller frees. */
double *tensor_read(const struct tensor *tensor);

/* 1 if the canary is unchanged. Overwrites the elements: read them before. */
int tensor_gaps_intact(struct tensor *tensor);

int64_t tensor_count(const struct tensor *tensor);
mfa_buffer tensor_buffer(const struct tensor *tensor);

#endif
