/* Strides beyond 2^31 elements, and those about the largest whose offsets kernels hold in 32 bits: the elements of
 * small tensors are spread over a large mapping, of which few pages are touched. Every result must be bitwise that of
 * the same tensors with dense strides. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "metal/gpu.h"
#include "metal/run.h"
#include "mfa.h"
#include "reference/element.h"
#include "support/operands.h"
#include "support/report.h"

enum { NOWHERE = -1 }; /* in place of a dimension: no stride is large */

static mfa_layout large_stride_layout(const struct tensor *tensor, int dimension, int64_t stride)
{
    mfa_layout layout = tensor->layout;
    int64_t *const strides[4] = {&layout.batch, &layout.head, &layout.row, &layout.column};
    if (tensor->shape[dimension] > 1)
        *strides[dimension] = stride;
    return layout;
}

static int64_t span_of(const int64_t shape[4], const mfa_layout *layout)
{
    return (shape[0] - 1) * layout->batch + (shape[1] - 1) * layout->head + (shape[2] - 1) * layout->row +
           (shape[3] - 1) * layout->column + 1;
}

static int64_t element_index(int64_t index, const int64_t shape[4], const mfa_layout *layout)
{
    return index % shape[3] * layout->column + index / shape[3] % shape[2] * layout->row +
           index / shape[3] / shape[2] % shape[1] * layout->head +
           index / shape[3] / shape[2] / shape[1] * layout->batch;
}

/* Moves the tensor to memory of its own, which guarded_close() gives back, and updates the problem. */
static void move(struct operands *operands, enum reference_tensor which, int dimension, int64_t stride)
{
    struct tensor *tensor = &operands->tensors[which];
    if (dimension == NOWHERE || !tensor->memory.mapping)
        return;
    double *values = tensor_read(tensor);
    tensor_close(tensor);
    tensor->layout = large_stride_layout(tensor, dimension, stride);
    tensor->origin = stride < 0 && tensor->shape[dimension] > 1 ? (1 - tensor->shape[dimension]) * stride : 0;
    struct guarded *memory = &tensor->memory;
    memory->size = (size_t)(span_of(tensor->shape, &tensor->layout) + 2 * tensor->origin) * element_size(tensor->dtype);
    memory->mapped = memory->size + 2 * guarded_page();
    memory->mapping =
        mmap(NULL, memory->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_ptr_not_equal(memory->mapping, MAP_FAILED);
    memory->bytes = memory->mapping + guarded_page();
    for (int64_t n = 0; n < tensor_count(tensor); n++)
        element_store(tensor->dtype, memory->bytes, tensor->origin + element_index(n, tensor->shape, &tensor->layout),
                      values[n]);
    free(values);
    *(mfa_layout *)reference_layout(&operands->problem, which) = tensor->layout;
    *(mfa_buffer *)reference_buffer(&operands->buffers, which) = tensor_buffer(tensor);
}

static void run(struct operands *operands, int splits)
{
    struct metal_trace trace;
    if (metal_run(operands, (struct metal_target){.family = 7, .splits = splits}, 0, &trace) != MFA_OK)
        fail_msg("%s", mfa_last_error());
}

/* Both passes, or forward where K or V has codes; the results are read where they are. */
static void run_passes(const struct inputs *inputs, int splits, int dimension, int64_t stride,
                       struct reference *results)
{
    struct operands operands;
    operands_open(&operands, inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    for (int tensor = 0; tensor < REFERENCE_TENSORS; tensor++)
        move(&operands, tensor, dimension, stride);
    run(&operands, splits);
    results->O = tensor_read(&operands.tensors[REFERENCE_O]);
    results->L = tensor_read(&operands.tensors[REFERENCE_L]);
    if (inputs->problem.k_type || inputs->problem.v_type) {
        operands_close(&operands);
        return;
    }
    operands_turn(&operands, DENSE, results);
    move(&operands, REFERENCE_O, dimension, stride);
    move(&operands, REFERENCE_L, dimension, stride);
    run(&operands, splits);
    for (int tensor = REFERENCE_dQ; tensor < REFERENCE_TENSORS; tensor++)
        if (operands.tensors[tensor].memory.mapping)
            *reference_member(results, tensor) = tensor_read(&operands.tensors[tensor]);
    operands_close(&operands);
}

struct strides {
    const int64_t *values;
    size_t count;
};

static void check_dimension(const char *text, const struct inputs *inputs, int splits, int dimension,
                            struct strides strides, struct reference *dense)
{
    for (size_t s = 0; s < strides.count; s++) {
        struct reference spread = {0};
        run_passes(inputs, splits, dimension, strides.values[s], &spread);
        for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
            const double *got = *reference_member(&spread, tensor), *right = *reference_member(dense, tensor);
            const size_t bytes = (size_t)reference_count(&inputs->problem, tensor) * sizeof *got;
            if (got && right && memcmp(got, right, bytes))
                fail_msg("%s: %s differs where dimension %d has stride %lld", text, tensor_name(tensor), dimension,
                         (long long)strides.values[s]);
        }
        reference_close(&spread);
    }
}

/* Dimensions from the first to the last. `splits` of the keys; 0: as the backend chooses. */
static void check(const char *text, int splits, int first, int last, struct strides strides)
{
    mfa_problem problem;
    struct inputs inputs;
    struct reference dense = {0};
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, 1, text);
    run_passes(&inputs, splits, NOWHERE, 0, &dense);
    for (int dimension = first; dimension <= last; dimension++)
        check_dimension(text, &inputs, splits, dimension, strides, &dense);
    reference_close(&dense);
    inputs_close(&inputs);
}

/* Past 2^31 and 2^32; one that runs of four elements can be read at, and one that they cannot. */
static const int64_t large[] = {(INT64_C(1) << 31) + 4, (INT64_C(1) << 32) + 3};

/* block_mask, attention_forward, and all of the backward pass. */
static void test_blocks(void **state)
{
    (void)state;
    check("forward f16 b2 h4/2 q40 kv70 d24v16 upper30 block_map_q16 block_map_kv16 dropout0.2 mask_f32", 0, 0, 3,
          (struct strides){large, 2});
}

/* attention_decode and attention_merge. */
static void test_decode(void **state)
{
    (void)state;
    check("forward f32 b2 h4/2 q2 kv600 d24 block_map_q16 block_map_kv48 mask_bool", 0, 0, 3,
          (struct strides){large, 2});
}

/* Codes and their scales, in attention_forward, attention_decode and attention_decode_vector. */
static void test_codes(void **state)
{
    (void)state;
    check("forward f16 b2 h4/2 q40 kv70 d24v64 k_group8 v_group32 k_int8 v_int4", 0, 0, 3, (struct strides){large, 2});
    check("forward f16 b2 h4/2 q2 kv100 d32v24 k_group32 v_group3 k_nf4 v_e4m3", 0, 0, 3, (struct strides){large, 2});
    check("forward f16 b2 h2 q1 kv100 d32v24 v_group12 k_int4 v_int8", 0, 0, 3, (struct strides){large, 2});
}

/* More blocks than a stretch of 32-bit offsets has (kv_source.h), of K and V in attention_decode_vector and
 * attention_backward_dq, and of Q and dO in attention_backward_dkv: rows so far apart that the offsets just fit, or do
 * not. */
static void test_stretches(void **state)
{
    enum { ROW = 2, FAR = 1 << 18 };
    static const int64_t strides[] = {FAR - 4, FAR + 64, 4 - FAR, -FAR - 64};
    (void)state;
    check("forward f16 b1 h1 q1 kv8300 d8", 1, ROW, ROW, (struct strides){strides, 4});
    check("forward f16 b1 h1 q4200 kv9 d8", 1, ROW, ROW, (struct strides){strides, 4});
    static const int64_t of_scales[] = {FAR / 2 - 4, FAR / 2, 4 - FAR / 2};
    check("forward f16 b1 h1 q1 kv8300 d8 k_int8 v_int8", 1, ROW, ROW, (struct strides){of_scales, 3});
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_blocks), cmocka_unit_test(test_decode),
                                       cmocka_unit_test(test_codes), cmocka_unit_test(test_stretches)};
    const struct gpu_settings settings = {.cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim"};
    gpu_set(&settings);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
