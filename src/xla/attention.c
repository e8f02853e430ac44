/* mfa_xla_attention: attention as a handler of XLA's FFI on the CPU, as JAX calls it. A call has two attributes: the
 * problem as its line of text, and the names of its arguments and results. Memory is dense; the sizes of an array must
 * be those of the problem, or 1 where it is broadcast or, a gradient, summed. jax.vmap puts dimensions before these. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/sync.h"
#include "core/operand.h"
#include "mfa.h"
#include "xla/ffi.h"

#define TEXT_MAX 1024     /* the longest attribute: problem_text.c's longest line is shorter */
#define LEADING_MAX 8     /* dimensions before the batch */
#define MESSAGE_MAX 1024  /* that of an error */
#define DIMS_TEXT_MAX 256 /* the sizes of an array in an error */

enum { BATCH, HEADS, ROWS, COLUMNS, DIMENSIONS };

/* An argument or a result. */
struct array {
    int number; /* of the operand */
    char *data;
    size_t element;               /* bytes */
    int64_t leading[LEADING_MAX]; /* strides of the dimensions before the batch; 0: the array is the same along it */
    int64_t strides[DIMENSIONS];  /* in the order of mfa_layout */
};

struct call {
    mfa_problem problem;
    int64_t leading[LEADING_MAX]; /* sizes */
    int leading_count, array_count;
    struct array arrays[MFA_OPERAND_COUNT];
};

/* The one context of the process. It serves any number of calls at once. */
static mfa_status find_context(mfa_context **context)
{
    static struct mfa_lock lock;
    static mfa_context *opened;
    mfa_status status = MFA_OK;
    mfa_lock_take(&lock);
    if (!opened) {
        mfa_context *made;
        status = mfa_context_create(NULL, &made);
        if (status == MFA_OK)
            opened = made;
    }
    *context = opened;
    mfa_lock_release(&lock);
    return status;
}

static mfa_status read_attribute(const struct mfa_xla_call_frame *frame, const char *name, char text[TEXT_MAX])
{
    const struct mfa_xla_attributes *attributes = &frame->attributes;
    for (int64_t n = 0; n < attributes->count; n++) {
        const struct mfa_xla_text *found = attributes->names[n];
        if (found->length != strlen(name) || memcmp(found->begin, name, found->length) != 0)
            continue;
        const struct mfa_xla_text *value = attributes->values[n];
        if (attributes->kinds[n] != MFA_XLA_STRING || value->length >= TEXT_MAX)
            break;
        memcpy(text, value->begin, value->length);
        text[value->length] = '\0';
        return MFA_OK;
    }
    return mfa_fail(MFA_INVALID, "the attribute %s is missing; it must be a string of less than %d bytes", name,
                    TEXT_MAX);
}

static int is_of_dtype(int32_t found, int dtype)
{
    static const int32_t names[] = {
        [MFA_F32] = MFA_XLA_F32, [MFA_F16] = MFA_XLA_F16, [MFA_BF16] = MFA_XLA_BF16, [MFA_F64] = MFA_XLA_F64};
    return found == names[dtype];
}

static int has_right_type(int32_t found, const struct mfa_operand *operand, const mfa_problem *problem)
{
    switch (operand->element) {
    case MFA_ELEMENT_OUT: return is_of_dtype(found, mfa_operand_out_dtype(problem));
    case MFA_ELEMENT_ROW_SUM: return is_of_dtype(found, problem->dtype == MFA_F64 ? MFA_F64 : MFA_F32);
    case MFA_ELEMENT_MASK:
        return problem->mask == MFA_MASK_BOOL ? found == MFA_XLA_PRED : is_of_dtype(found, problem->mask_dtype);
    case MFA_ELEMENT_FLOAT: return found == MFA_XLA_F32;
    case MFA_ELEMENT_INTEGER64: return found == MFA_XLA_S64 || found == MFA_XLA_U64;
    case MFA_ELEMENT_INTEGER32: return found == MFA_XLA_S32;
    case MFA_ELEMENT_BYTE: return found == MFA_XLA_PRED || found == MFA_XLA_S8 || found == MFA_XLA_U8;
    default: return is_of_dtype(found, problem->dtype);
    }
}

/* The dimensions of an array in memory, those of size 1 by their meaning left out: (B, T, N, H) as in JAX, but what has
 * an element for each query and key is (B, N, T, S). Returns how many. */
static int dimensions_of(const struct mfa_operand *operand, int number, int order[DIMENSIONS])
{
    const size_t sizes[DIMENSIONS] = {operand->entries, operand->heads, operand->rows, operand->columns};
    const int of_scores = number == MFA_OPERAND_mask || number == MFA_OPERAND_dbias || number == MFA_OPERAND_block_map;
    const int all[DIMENSIONS] = {BATCH, of_scores ? HEADS : ROWS, of_scores ? ROWS : HEADS, COLUMNS};
    int count = 0;
    for (int n = 0; n < DIMENSIONS; n++)
        if (sizes[all[n]])
            order[count++] = all[n];
    return count;
}

static mfa_status refuse_dims(const struct mfa_operand *operand, const struct mfa_xla_buffer *buffer,
                              const mfa_problem *problem)
{
    char dims[DIMS_TEXT_MAX] = "";
    size_t length = 0;
    for (int64_t n = 0; n < buffer->rank && length < sizeof dims; n++)
        length +=
            (size_t)snprintf(dims + length, sizeof dims - length, n ? ", %lld" : "%lld", (long long)buffer->dims[n]);
    int64_t shape[DIMENSIONS];
    mfa_operand_shape(operand, problem, shape);
    return mfa_fail(MFA_INVALID,
                    "%s has the sizes (%s); the problem has %lld batch entries, %lld heads, %lld rows and %lld columns "
                    "of it",
                    operand->name, dims, (long long)shape[BATCH], (long long)shape[HEADS], (long long)shape[ROWS],
                    (long long)shape[COLUMNS]);
}

static mfa_status bind_array(struct call *call, int number, const struct mfa_xla_buffer *buffer, int is_result)
{
    const struct mfa_operand *operand = &mfa_operands[number];
    int64_t shape[DIMENSIONS];
    int order[DIMENSIONS];
    mfa_operand_shape(operand, &call->problem, shape);
    if (!has_right_type(buffer->dtype, operand, &call->problem))
        return mfa_fail(MFA_INVALID, "%s has XLA's element type %d, which is not that of the problem", operand->name,
                        (int)buffer->dtype);
    const int count = dimensions_of(operand, number, order);
    const int64_t before = buffer->rank - count;
    if (before < 0)
        return refuse_dims(operand, buffer, &call->problem);
    if (before > LEADING_MAX)
        return mfa_fail(MFA_UNSUPPORTED, "%s has %lld dimensions before the batch; there may be %d", operand->name,
                        (long long)before, LEADING_MAX);
    if (call->leading_count < 0) { /* results come first, and are never broadcast */
        call->leading_count = (int)before;
        memcpy(call->leading, buffer->dims, (size_t)before * sizeof *buffer->dims);
    }
    if (before != call->leading_count)
        return refuse_dims(operand, buffer, &call->problem);
    struct array *array = &call->arrays[call->array_count++];
    *array = (struct array){number, buffer->data, mfa_operand_element(operand, &call->problem), {0}, {0}};
    /* Inputs may be broadcast along any dimension, gradients be sums along those of the problem. */
    const int may_be_1 = !is_result || mfa_operand_role(operand, &call->problem) & MFA_ROLE_SUMMED;
    int64_t stride = 1;
    for (int64_t n = buffer->rank - 1; n >= 0; n--) {
        const int64_t size = buffer->dims[n], wanted = n < before ? call->leading[n] : shape[order[n - before]];
        if (size != wanted && (size != 1 || !may_be_1 || (is_result && n < before)))
            return refuse_dims(operand, buffer, &call->problem);
        *(n < before ? &array->leading[n] : &array->strides[order[n - before]]) = size == wanted ? stride : 0;
        stride *= size;
    }
    return MFA_OK;
}

/* Binds XLA's arrays to the operands that are named, in their order; there must be as many. `names` is cut up. */
static mfa_status bind_arrays(struct call *call, char *names, const struct mfa_xla_values *values, int is_result)
{
    int64_t count = 0;
    char *next;
    for (char *name = names + strspn(names, " "); *name; name = next, count++) {
        int number = 0;
        next = name + strcspn(name, " ");
        if (*next)
            *next++ = '\0';
        next += strspn(next, " ");
        while (number < MFA_OPERAND_COUNT && strcmp(name, mfa_operands[number].name) != 0)
            number++;
        if (number == MFA_OPERAND_COUNT)
            return mfa_fail(MFA_INVALID, "operands names %s; it must be a buffer of mfa_buffers", name);
        for (int n = 0; n < call->array_count; n++)
            if (call->arrays[n].number == number)
                return mfa_fail(MFA_INVALID, "operands names %s twice; it must name it once", name);
        if (count >= values->count || values->kinds[count] != MFA_XLA_BUFFER)
            return mfa_fail(MFA_INVALID, "operands names %s, which the call does not have", name);
        const mfa_status status = bind_array(call, number, values->values[count], is_result);
        if (status != MFA_OK)
            return status;
    }
    if (count != values->count)
        return mfa_fail(MFA_INVALID, "operands names %lld %s; the call has %lld", (long long)count,
                        is_result ? "results" : "arguments", (long long)values->count);
    return MFA_OK;
}

/* Makes the innermost dimensions before the batch part of it, as far as all arrays have them so in memory. */
static void merge_into_batch(struct call *call)
{
    mfa_problem *problem = &call->problem;
    if (problem->varlen_q || problem->varlen_kv || problem->cache_batch_idx || problem->page_size ||
        problem->dropout > 0) /* the number of a batch entry has a meaning */
        return;
    while (call->leading_count) {
        const int last = call->leading_count - 1;
        for (int n = 0; n < call->array_count && problem->batch != 1; n++)
            if (call->arrays[n].leading[last] != problem->batch * call->arrays[n].strides[BATCH])
                return;
        for (int n = 0; n < call->array_count && problem->batch == 1; n++)
            call->arrays[n].strides[BATCH] = call->arrays[n].leading[last];
        problem->batch *= call->leading[last];
        call->leading_count = last;
    }
}

static mfa_status run_call(struct call *call)
{
    mfa_context *context;
    mfa_status status = find_context(&context);
    int64_t runs = 1;
    for (int n = 0; n < call->leading_count; n++)
        runs *= call->leading[n];
    for (int n = 0; n < call->array_count; n++) {
        const int64_t *strides = call->arrays[n].strides;
        *(mfa_layout *)((char *)&call->problem + mfa_operands[call->arrays[n].number].layout) =
            (mfa_layout){strides[BATCH], strides[HEADS], strides[ROWS], strides[COLUMNS]};
    }
    for (int64_t run = 0; run < runs && status == MFA_OK; run++) {
        mfa_buffers buffers = {.size = sizeof buffers};
        for (int n = 0; n < call->array_count; n++) {
            const struct array *array = &call->arrays[n];
            int64_t index = run, offset = 0;
            for (int dimension = call->leading_count - 1; dimension >= 0; dimension--) {
                offset += index % call->leading[dimension] * array->leading[dimension];
                index /= call->leading[dimension];
            }
            mfa_buffer *buffer = (mfa_buffer *)((char *)&buffers + mfa_operands[array->number].buffer);
            buffer->base = array->data + offset * (int64_t)array->element;
        }
        status = mfa_attention(context, &call->problem, &buffers, NULL);
    }
    return status;
}

static mfa_status execute(const struct mfa_xla_call_frame *frame)
{
    char line[TEXT_MAX], operands[TEXT_MAX];
    struct call call;
    mfa_status status = read_attribute(frame, "problem", line);
    if (status == MFA_OK)
        status = read_attribute(frame, "operands", operands);
    if (status == MFA_OK)
        status = mfa_problem_parse(line, &call.problem);
    if (status != MFA_OK)
        return status;
    char *arrow = strstr(operands, " -> ");
    if (!arrow || call.problem.device != MFA_DEVICE_CPU)
        return mfa_fail(MFA_INVALID,
                        "operands is \"%s\" and problem \"%s\"; they must be like \"q k v -> o\" and a "
                        "problem on the CPU",
                        operands, line);
    if (call.problem.k_type || call.problem.v_type)
        return mfa_fail(MFA_UNSUPPORTED,
                        "k_type is %d and v_type %d; both must be 0: arrays k and v have the problem's dtype",
                        (int)call.problem.k_type, (int)call.problem.v_type);
    *arrow = '\0';
    call.leading_count = -1;
    call.array_count = 0;
    status = bind_arrays(&call, arrow + strlen(" -> "), &frame->results, 1);
    if (status == MFA_OK)
        status = bind_arrays(&call, operands, &frame->arguments, 0);
    if (status != MFA_OK)
        return status;
    merge_into_batch(&call);
    return run_call(&call);
}

static int32_t code_of(mfa_status status)
{
    switch (status) {
    case MFA_INVALID: return MFA_XLA_INVALID_ARGUMENT;
    case MFA_UNSUPPORTED: return MFA_XLA_UNIMPLEMENTED;
    case MFA_UNAVAILABLE: return MFA_XLA_UNAVAILABLE;
    case MFA_OUT_OF_MEMORY: return MFA_XLA_RESOURCE_EXHAUSTED;
    default: return MFA_XLA_INTERNAL;
    }
}

void *mfa_xla_attention(void *call_frame)
{
    const struct mfa_xla_call_frame *frame = call_frame;
    for (struct mfa_xla_extension *extension = frame->extensions; extension; extension = extension->next) {
        if (extension->kind != MFA_XLA_METADATA)
            continue;
        struct mfa_xla_metadata *metadata = ((struct mfa_xla_metadata_extension *)extension)->metadata;
        /* A framework accepts no newer version than its own, which the older ones do not pass to this call. */
        const int newest = frame->api ? frame->api->version.minor : MFA_XLA_OLDEST_MINOR;
        metadata->version.major = MFA_XLA_MAJOR;
        metadata->version.minor = newest < MFA_XLA_MINOR ? newest : MFA_XLA_MINOR;
        metadata->traits = 0;
        return NULL;
    }
    const mfa_status status = frame->stage == MFA_XLA_EXECUTE
                                  ? execute(frame)
                                  : mfa_fail(MFA_INVALID, "stage is %d; mfa_xla_attention is a handler of stage %d",
                                             frame->stage, MFA_XLA_EXECUTE);
    if (status == MFA_OK)
        return NULL;
    char message[MESSAGE_MAX];
    snprintf(message, sizeof message, "libmfa: %s", mfa_last_error());
    struct mfa_xla_error_arguments arguments = {sizeof arguments, NULL, message, code_of(status)};
    return frame->api->create_error(&arguments);
}
