/* Makes inputs from a seed, tensors that hold them, and results from the outputs. */
#include "support/operands.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "reference/element.h"
#include "support/generator.h"
#include "support/lengths.h"

const char *tensor_name(enum reference_tensor tensor)
{
    static const char *const names[REFERENCE_TENSORS] = {"Q",
                                                         "K",
                                                         "V",
                                                         "mask",
                                                         "slopes",
                                                         "sinks",
                                                         "seed",
                                                         "block map",
                                                         "cu_seqlens_q",
                                                         "cu_seqlens_k",
                                                         "seqused_k",
                                                         "leftpad_k",
                                                         "cache_batch_idx",
                                                         "block_table",
                                                         "k_scale",
                                                         "v_scale",
                                                         "dO",
                                                         "dL",
                                                         "O",
                                                         "L",
                                                         "o_low",
                                                         "dQ",
                                                         "dK",
                                                         "dV",
                                                         "dbias",
                                                         "dsinks"};
    return names[tensor];
}

double **reference_member(struct reference *results, enum reference_tensor tensor)
{
    switch (tensor) {
    case REFERENCE_O: return &results->O;
    case REFERENCE_L: return &results->L;
    case REFERENCE_O_LOW: return &results->O_low;
    case REFERENCE_dQ: return &results->dQ;
    case REFERENCE_dK: return &results->dK;
    case REFERENCE_dV: return &results->dV;
    case REFERENCE_DSINKS: return &results->dsinks;
    default: return &results->dbias;
    }
}

void reference_close(struct reference *results)
{
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        free(*reference_member(results, tensor));
        *reference_member(results, tensor) = NULL;
    }
}

static int is_masked(struct generator *generator, const int64_t shape[4], int64_t row, int64_t column)
{
    int one_in_four = generator_next(generator) % 4 == 0;
    int whole_row = row % 5 == 3;
    int whole_tile = row < shape[2] / 2 && column >= shape[3] / 3 && column < shape[3] * 2 / 3;
    return one_in_four || whole_row || whole_tile;
}

static int is_hidden(struct generator *generator, int64_t row, int64_t column)
{
    return generator_next(generator) % 2 || row % 5 == 3 || column % 7 == 4;
}

/* Any code whose number is not too large. */
static double draw_code(struct generator *generator, int32_t type)
{
    const int is_float = type == MFA_KV_E4M3 || type == MFA_KV_E5M2;
    uint8_t code;
    do
        code = (uint8_t)(generator_next(generator) >> 40);
    while (is_float && !(fabs(reference_code(type, code)) <= 4));
    return code;
}

/* So that numbers are about 1. */
static double size_of_scale(int32_t type)
{
    return type == MFA_KV_INT8 ? 0.02 : type == MFA_KV_INT4 ? 0.25 : 1;
}

static void fill(struct inputs *inputs, enum reference_tensor tensor, struct generator *generator)
{
    const mfa_problem *p = &inputs->problem;
    int32_t dtype = reference_dtype(p, tensor);
    int64_t shape[4], count = reference_count(p, tensor);
    reference_shape(p, tensor, shape);
    double *values = inputs->values[tensor] = reference_allocate(count);
    const int32_t type = tensor == REFERENCE_K || tensor == REFERENCE_K_SCALE ? p->k_type : p->v_type;
    const double size = tensor == REFERENCE_SLOPES                                   ? 0.1
                        : tensor == REFERENCE_K_SCALE || tensor == REFERENCE_V_SCALE ? size_of_scale(type)
                                                                                     : 1;
    if (dtype == ELEMENT_I32) {
        lengths_fill(inputs, tensor, generator);
        return;
    }
    for (int64_t at = 0; at < count; at++) {
        const int64_t row = at / shape[3] % shape[2], column = at % shape[3];
        int masked = (tensor == REFERENCE_MASK && is_masked(generator, shape, row, column)) ||
                     (tensor == REFERENCE_BLOCK_MAP && is_hidden(generator, row, column));
        if (dtype == ELEMENT_BOOL) /* any byte but 0 is true */
            values[at] = masked ? 0 : (double)(1 + generator_next(generator) % 255);
        else if (dtype == ELEMENT_CODE)
            values[at] = draw_code(generator, type);
        else if (dtype == ELEMENT_U64)
            values[at] = (double)(generator_next(generator) >> 11);
        else
            values[at] = masked ? -INFINITY : element_round(dtype, size * generator_normal(generator));
    }
}

static void broadcast(mfa_layout *layout, int along)
{
    if (along & ALONG_BATCH)
        layout->batch = 0;
    if (along & ALONG_HEAD)
        layout->head = 0;
    if (along & ALONG_ROW)
        layout->row = 0;
    if (along & ALONG_COLUMN)
        layout->column = 0;
}

/* A map of one row of blocks is not broadcast along its columns, nor the other way round. */
static void broadcast_map(mfa_problem *problem, int along)
{
    int64_t shape[4];
    reference_shape(problem, REFERENCE_BLOCK_MAP, shape);
    broadcast(&problem->block_map_layout,
              along & ~(shape[2] == 1 ? ALONG_COLUMN : 0) & ~(shape[3] == 1 ? ALONG_ROW : 0));
}

/* 8-bit floats come without scales, unless these are of groups of columns. */
static int has_scale(int32_t type, int64_t group)
{
    const int is_float = type == MFA_KV_E4M3 || type == MFA_KV_E5M2;
    return type && (!is_float || group > 0);
}

static int is_input(const mfa_problem *p, enum reference_tensor tensor, struct variant variant)
{
    switch (tensor) {
    case REFERENCE_MASK: return p->mask != MFA_MASK_NONE;
    case REFERENCE_SLOPES: return p->alibi;
    case REFERENCE_SINKS: return p->sinks;
    case REFERENCE_SEED: return p->dropout > 0;
    case REFERENCE_BLOCK_MAP: return p->block_map_q > 0;
    case REFERENCE_CU_SEQLENS_Q: return p->varlen_q;
    case REFERENCE_CU_SEQLENS_K: return p->varlen_kv;
    case REFERENCE_SEQUSED_K: return p->seqused_k;
    case REFERENCE_LEFTPAD_K: return p->leftpad_k;
    case REFERENCE_CACHE_BATCH_IDX: return p->cache_batch_idx;
    case REFERENCE_BLOCK_TABLE: return p->page_size > 0;
    case REFERENCE_K_SCALE: return has_scale(p->k_type, p->k_group);
    case REFERENCE_V_SCALE: return has_scale(p->v_type, p->v_group);
    case REFERENCE_dL: return variant.dlse;
    default: return 1;
    }
}

void inputs_open(struct inputs *inputs, const mfa_problem *problem, struct variant variant, uint64_t seed,
                 const char *text)
{
    memset(inputs, 0, sizeof *inputs);
    inputs->problem = *problem;
    inputs->variant = variant;
    broadcast(&inputs->problem.k_layout, variant.kv_broadcast);
    broadcast(&inputs->problem.v_layout, variant.kv_broadcast);
    broadcast(&inputs->problem.k_scale_layout, variant.kv_broadcast);
    broadcast(&inputs->problem.v_scale_layout, variant.kv_broadcast);
    broadcast(&inputs->problem.mask_layout, variant.mask_broadcast);
    broadcast(&inputs->problem.dbias_layout, variant.dbias_broadcast);
    broadcast(&inputs->problem.slopes_layout, variant.heads_broadcast);
    broadcast(&inputs->problem.sinks_layout, variant.heads_broadcast);
    broadcast(&inputs->problem.dsinks_layout, variant.heads_broadcast);
    broadcast(&inputs->problem.seed_layout, variant.heads_broadcast);
    broadcast_map(&inputs->problem, variant.map_broadcast);
    struct generator generator;
    generator_seed(&generator, seed, text);
    for (int tensor = REFERENCE_Q; tensor <= REFERENCE_dL; tensor++)
        if (is_input(problem, tensor, variant))
            fill(inputs, tensor, &generator);
    lengths_poison(inputs);
}

void inputs_close(struct inputs *inputs)
{
    for (int tensor = 0; tensor < REFERENCE_TENSORS; tensor++)
        free(inputs->values[tensor]);
    memset(inputs, 0, sizeof *inputs);
}

/* Sets the tensor's layout in the problem, and its address in the buffers. */
static void attach(struct operands *operands, enum reference_tensor tensor)
{
    *(mfa_layout *)reference_layout(&operands->problem, tensor) = operands->tensors[tensor].layout;
    *(mfa_buffer *)reference_buffer(&operands->buffers, tensor) = tensor_buffer(&operands->tensors[tensor]);
}

void operands_open(struct operands *operands, const struct inputs *inputs, enum arrangement arrangement,
                   unsigned outputs)
{
    memset(operands, 0, sizeof *operands);
    operands->problem = inputs->problem;
    operands->buffers.size = sizeof operands->buffers;
    for (int tensor = 0; tensor < REFERENCE_O; tensor++)
        if (inputs->values[tensor]) {
            int64_t shape[4];
            reference_shape(&inputs->problem, tensor, shape);
            tensor_open_input(&operands->tensors[tensor], tensor_name(tensor),
                              reference_dtype(&inputs->problem, tensor), shape, arrangement, inputs->values[tensor]);
            attach(operands, tensor);
        }
    operands_open_outputs(operands, arrangement, outputs);
}

static int has(const mfa_problem *problem, enum reference_tensor tensor)
{
    const int is_half = problem->dtype == MFA_F16 || problem->dtype == MFA_BF16;
    switch (tensor) {
    case REFERENCE_DBIAS: return problem->mask == MFA_MASK_ADDITIVE;
    case REFERENCE_DSINKS: return problem->sinks;
    case REFERENCE_O_LOW: return is_half && !problem->out_type;
    default: return 1;
    }
}

void operands_open_outputs(struct operands *operands, enum arrangement arrangement, unsigned outputs)
{
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++)
        if ((outputs & 1U << tensor) && has(&operands->problem, tensor)) {
            int64_t shape[4];
            reference_shape(&operands->problem, tensor, shape);
            tensor_open_output(&operands->tensors[tensor], tensor_name(tensor),
                               reference_dtype(&operands->problem, tensor), shape, arrangement,
                               tensor == REFERENCE_DBIAS || tensor == REFERENCE_DSINKS);
            attach(operands, tensor);
        }
}

static int of_pass(const struct operands *operands, enum reference_tensor tensor)
{
    if (operands->problem.pass == MFA_FORWARD)
        return tensor >= REFERENCE_O && tensor <= REFERENCE_O_LOW;
    return tensor >= REFERENCE_dQ;
}

mfa_status operands_run(struct operands *operands, mfa_context *context, int planned)
{
    mfa_buffers buffers = operands->buffers;
    if (operands->problem.pass == MFA_FORWARD)
        buffers.d_o = buffers.dlse = buffers.dq = buffers.dk = buffers.dv = buffers.dbias = buffers.dsinks =
            (mfa_buffer){NULL, 0};
    if (!planned)
        return mfa_attention(context, &operands->problem, &buffers, NULL);

    mfa_plan *plan;
    mfa_status status = mfa_plan_create(context, &operands->problem, &plan);
    if (status != MFA_OK)
        return status;
    struct guarded workspace;
    guarded_open(&workspace, "workspace", mfa_plan_workspace(plan), 64, GUARDED_END, 0xff);
    if (workspace.size)
        buffers.workspace.base = workspace.bytes, buffers.workspace_size = mfa_plan_workspace(plan);
    status = mfa_plan_run(plan, &buffers, NULL);
    guarded_close(&workspace);
    mfa_plan_destroy(plan);
    return status;
}

const char *operands_collect(struct operands *operands, struct reference *results)
{
    const char *overrun = NULL;
    for (int at = REFERENCE_O; at < REFERENCE_TENSORS; at++) {
        struct tensor *tensor = &operands->tensors[at];
        if (!tensor->memory.mapping || !of_pass(operands, at))
            continue;
        *reference_member(results, at) = tensor_read(tensor);
        if (!tensor_gaps_intact(tensor))
            overrun = tensor_name(at);
        tensor_close(tensor);
    }
    return overrun;
}

void operands_turn(struct operands *operands, enum arrangement arrangement, const struct reference *given)
{
    double *values[] = {given->O, given->L, given->O_low};
    for (int at = REFERENCE_O; at <= REFERENCE_O_LOW; at++) {
        int64_t shape[4];
        reference_shape(&operands->problem, at, shape);
        tensor_close(&operands->tensors[at]);
        if (!has(&operands->problem, at) || !values[at - REFERENCE_O])
            continue;
        tensor_open_input(&operands->tensors[at], tensor_name(at), reference_dtype(&operands->problem, at), shape,
                          arrangement, values[at - REFERENCE_O]);
        attach(operands, at);
    }
    operands->problem.pass = MFA_BACKWARD;
}

void operands_close(struct operands *operands)
{
    for (int tensor = 0; tensor < REFERENCE_TENSORS; tensor++)
        tensor_close(&operands->tensors[tensor]);
}
