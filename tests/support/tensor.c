/* Arranges, fills and checks tensors. */
#include "support/tensor.h"

#include <stdlib.h>
#include <string.h>

#include "reference/attention.h"
#include "reference/element.h"

enum { CANARY = 0xa5, NAN_BYTE = 0xff }; /* all bits set is a NaN in every dtype, and true in a bool mask */

const char *arrangement_name(enum arrangement arrangement)
{
    static const char *const names[ARRANGEMENTS] = {"dense", "rows first", "column major", "padded", "reversed"};
    return names[arrangement];
}

/* Strides for the extents, in elements; returns the elements that the tensor spans. */
static int64_t arrange(const int64_t shape[4], enum arrangement arrangement, int64_t stride[4])
{
    /* Innermost first. */
    static const int order[ARRANGEMENTS][4] = {[DENSE] = {3, 2, 1, 0},
                                               [ROWS_FIRST] = {3, 1, 2, 0},
                                               [COLUMN_MAJOR] = {2, 3, 1, 0},
                                               [PADDED] = {3, 2, 1, 0},
                                               [REVERSED] = {3, 2, 1, 0}};
    int64_t next = arrangement == PADDED ? 2 : 1, span = 1;
    for (int at = 0; at < 4; at++) {
        int dimension = order[arrangement][at];
        stride[dimension] = next;
        next *= shape[dimension] > 0 ? shape[dimension] : 1;
        next += arrangement == PADDED ? 3 + at : 0;
    }
    for (int dimension = 0; dimension < 4; dimension++) {
        span = shape[dimension] == 0 ? 0 : span ? span + (shape[dimension] - 1) * stride[dimension] : 0;
        if (arrangement == REVERSED)
            stride[dimension] = -stride[dimension];
    }
    return span;
}

static void open_tensor(struct tensor *tensor, const char *name, int32_t dtype, const int64_t shape[4],
                        enum arrangement arrangement, unsigned char filler, int broadcast)
{
    int64_t stride[4], span = arrange(shape, arrangement, stride);
    for (int dimension = 0; dimension < 4; dimension++)
        if (shape[dimension] == 1 && broadcast)
            stride[dimension] = 0;
    tensor->dtype = dtype;
    memcpy(tensor->shape, shape, sizeof tensor->shape);
    tensor->layout = (mfa_layout){stride[0], stride[1], stride[2], stride[3]};
    tensor->origin = arrangement == REVERSED && span ? span - 1 : 0;
    enum guarded_placement placement = arrangement == REVERSED ? GUARDED_BEGIN : GUARDED_END;
    size_t size = element_size(dtype);
    guarded_open(&tensor->memory, name, (size_t)span * size, size, placement, filler);
}

/* The first element of row n, counted through all heads and batches. */
static int64_t row_begin(const struct tensor *tensor, int64_t n)
{
    const mfa_layout *s = &tensor->layout;
    const int64_t rows = tensor->shape[2], heads = tensor->shape[1];
    return tensor->origin + n / rows / heads * s->batch + n / rows % heads * s->head + n % rows * s->row;
}

static int64_t row_count(const struct tensor *tensor)
{
    return tensor_count(tensor) ? tensor->shape[0] * tensor->shape[1] * tensor->shape[2] : 0;
}

/* Sets all bytes of the elements, and none between them. */
static void fill(struct tensor *tensor, unsigned char byte)
{
    const size_t size = element_size(tensor->dtype);
    if (tensor->memory.size == (size_t)tensor_count(tensor) * size) { /* nothing lies between them */
        memset(tensor->memory.bytes, byte, tensor->memory.size);
        return;
    }
    for (int64_t n = 0; n < row_count(tensor); n++) {
        unsigned char *row = tensor->memory.bytes + row_begin(tensor, n) * (int64_t)size;
        for (int64_t c = 0; c < tensor->shape[3]; c++)
            memset(row + c * tensor->layout.column * (int64_t)size, byte, size);
    }
}

void tensor_open_input(struct tensor *tensor, const char *name, int32_t dtype, const int64_t shape[4],
                       enum arrangement arrangement, const double *values)
{
    open_tensor(tensor, name, dtype, shape, arrangement, NAN_BYTE, 1);
    for (int64_t n = 0; n < row_count(tensor); n++)
        element_store_row(dtype, tensor->memory.bytes, row_begin(tensor, n), tensor->layout.column, shape[3],
                          values + n * shape[3]);
    guarded_seal(&tensor->memory);
}

void tensor_open_output(struct tensor *tensor, const char *name, int32_t dtype, const int64_t shape[4],
                        enum arrangement arrangement, int broadcast)
{
    open_tensor(tensor, name, dtype, shape, arrangement, CANARY, broadcast);
    fill(tensor, NAN_BYTE);
}

void tensor_close(struct tensor *tensor)
{
    guarded_close(&tensor->memory);
}

double *tensor_read(const struct tensor *tensor)
{
    double *values = reference_allocate(tensor_count(tensor));
    for (int64_t n = 0; n < row_count(tensor); n++)
        element_load_row(tensor->dtype, tensor->memory.bytes, row_begin(tensor, n), tensor->layout.column,
                         tensor->shape[3], values + n * tensor->shape[3]);
    return values;
}

int tensor_gaps_intact(struct tensor *tensor)
{
    const size_t page = guarded_page(), inside = tensor->memory.mapped - 2 * page;
    const unsigned char *first = tensor->memory.mapping + page;
    guarded_unseal(&tensor->memory);
    fill(tensor, CANARY);
    return !inside || (*first == CANARY && !memcmp(first, first + 1, inside - 1)); /* each byte is as the one before */
}

int64_t tensor_count(const struct tensor *tensor)
{
    return tensor->shape[0] * tensor->shape[1] * tensor->shape[2] * tensor->shape[3];
}

/* Through the offset where the tensor ends at its guard page, through the base elsewhere. */
mfa_buffer tensor_buffer(const struct tensor *tensor)
{
    uint64_t origin = (uint64_t)tensor->origin * element_size(tensor->dtype);
    unsigned char *page = tensor->memory.mapping + guarded_page();
    if (tensor->origin)
        return (mfa_buffer){tensor->memory.bytes + origin, 0};
    return (mfa_buffer){page, (uint64_t)(tensor->memory.bytes - page)};
}
