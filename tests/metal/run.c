#include "metal/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "core/operand.h"
#include "core/problem.h"
#include "metal/gpu.h"
#include "metal/dispatch.h"
#include "metal/source.h"

char *(*metal_rewrite)(enum mfa_metal_kernel kernel, char *text);

enum { WORKSPACE = MFA_OPERAND_COUNT, VISITED, FILLER, BUFFERS };

/* The tensors of reference/attention.h in the order of mfa_operands. */
static const enum reference_tensor tensors[] = {REFERENCE_Q,
                                                REFERENCE_K,
                                                REFERENCE_V,
                                                REFERENCE_MASK,
                                                REFERENCE_O,
                                                REFERENCE_L,
                                                REFERENCE_dO,
                                                REFERENCE_dL,
                                                REFERENCE_dQ,
                                                REFERENCE_dK,
                                                REFERENCE_dV,
                                                REFERENCE_DBIAS,
                                                REFERENCE_O_LOW,
                                                REFERENCE_SLOPES,
                                                REFERENCE_SINKS,
                                                REFERENCE_DSINKS,
                                                REFERENCE_SEED,
                                                REFERENCE_BLOCK_MAP,
                                                REFERENCE_CU_SEQLENS_Q,
                                                REFERENCE_CU_SEQLENS_K,
                                                REFERENCE_SEQUSED_K,
                                                REFERENCE_LEFTPAD_K,
                                                REFERENCE_CACHE_BATCH_IDX,
                                                REFERENCE_BLOCK_TABLE,
                                                REFERENCE_K_SCALE,
                                                REFERENCE_V_SCALE};

_Static_assert(sizeof tensors / sizeof *tensors == MFA_OPERAND_COUNT, "a tensor for each operand");

/* A buffer begins at a multiple of 64 bytes, so that the offset alone determines an operand's alignment. */
static void attach(struct operands *operands, const mfa_problem *problem, struct gpu_buffer *buffers,
                   mfa_buffers *given)
{
    *given = (mfa_buffers){.size = sizeof *given};
    for (int n = 0; n < MFA_OPERAND_COUNT; n++) {
        struct tensor *tensor = &operands->tensors[tensors[n]];
        const int role = mfa_operand_role(&mfa_operands[n], problem);
        if (!role || !tensor->memory.mapping)
            continue;
        const uintptr_t begin = (uintptr_t)tensor->memory.bytes, base = begin / 64 * 64;
        const mfa_buffer at = tensor_buffer(tensor);
        buffers[n] = (struct gpu_buffer){.base = (void *)base,
                                         .length = begin + tensor->memory.size - base,
                                         .offset = (uintptr_t)at.base + at.offset - base,
                                         .written = (role & MFA_ROLE_WRITTEN) != 0,
                                         .unwritten = (role & MFA_ROLE_WRITTEN) != 0};
        *(mfa_buffer *)((char *)given + mfa_operands[n].buffer) = (mfa_buffer){(void *)base, buffers[n].offset};
    }
}

/* Runs one dispatch of the list in commands of at most `chunk` threadgroups. */
static mfa_status run_dispatch(const struct mfa_key *key, const struct mfa_metal_dispatch *d, int64_t chunk,
                               struct gpu_buffer *buffers, struct metal_trace *trace)
{
    /* On one of the families, walks go on from a new base after two blocks, as they do after 128 (kv_source.h). */
    static const char shared[] = "#define COUNT_TILES\n#define UNROLL\n";
    static const char short_stretches[] = "#define COUNT_TILES\n#define UNROLL\n#define STRETCH_BLOCKS 2\n";
    const char *defines = mfa_metal_tiles_family_of(key) == 9 ? short_stretches : shared;
    struct gpu_launch launch = {.threads = d->threads, .call = d->call};
    char *text;
    const mfa_status status = mfa_metal_source_write(key, d->kernel, defines, &text);
    if (status != MFA_OK)
        return status;
    if (metal_rewrite)
        text = metal_rewrite(d->kernel, text);
    launch.text = text, launch.function = launch.name = mfa_metal_source_function(d->kernel);
    for (int n = 0; n < d->binding_count; n++) {
        const struct mfa_metal_binding *b = &d->bindings[n];
        struct gpu_buffer *to = &launch.buffers[b->buffer];
        *to = buffers[b->operand < 0 ? WORKSPACE : b->operand];
        to->offset += b->offset;
        if (!to->base || to->offset >= to->length)
            *to = buffers[FILLER];
    }
    launch.buffers[MFA_METAL_BUFFER_VISITED] = buffers[VISITED];
    const char *why = NULL;
    for (int64_t first = 0; first < d->groups && !why; first += chunk) {
        launch.call.first_group = first;
        launch.groups = d->groups - first < chunk ? d->groups - first : chunk;
        why = gpu_run(&launch);
        trace->commands++;
    }
    trace->dispatches++;
    free(text);
    return why ? mfa_fail(MFA_DEVICE_FAILED, "%s: %s", launch.name, why) : MFA_OK;
}

static mfa_status run_list(const mfa_problem *problem, const struct mfa_choice *choice, const mfa_buffers *given,
                           int64_t chunk, struct gpu_buffer *buffers, struct metal_trace *trace)
{
    struct mfa_metal_dispatch list[MFA_METAL_DISPATCHES];
    const int count = mfa_metal_dispatch_list(problem, choice, given, list);
    mfa_status status = MFA_OK;
    for (int n = 0; n < count && status == MFA_OK; n++) {
        const int tiled = mfa_metal_tiles_find(list[n].kernel, &choice->key) != NULL;
        const size_t groups = tiled ? (size_t)list[n].groups : 4;
        uint32_t *visited = calloc(groups, sizeof *visited);
        buffers[VISITED] =
            (struct gpu_buffer){.base = visited, .length = groups * sizeof *visited, .written = 1, .unwritten = 1};
        gpu_begin(&buffers[VISITED], 1);
        status = run_dispatch(&choice->key, &list[n], chunk ? chunk : list[n].chunk, buffers, trace);
        gpu_end(&buffers[VISITED], 1);
        if (tiled)
            trace->visited[list[n].kernel] = 0;
        for (size_t g = 0; tiled && g < groups; g++)
            trace->visited[list[n].kernel] += visited[g];
        free(visited);
        /* Later dispatches may read the outputs of this one. */
        for (int b = 0; b < BUFFERS; b++)
            buffers[b].unwritten = 0;
    }
    return status;
}

void metal_choose(struct metal_target target, const mfa_problem *problem, struct mfa_choice *choice)
{
    mfa_metal_tiles_choose(mfa_metal_tiles_family(target.family), problem, choice);
    if (target.halved)
        mfa_metal_tiles_halve(problem, choice);
    if (target.splits)
        memcpy(choice->tiling.bytes, &(struct mfa_metal_tiling){target.splits}, sizeof(struct mfa_metal_tiling));
    mfa_metal_dispatch_measure(problem, choice);
}

mfa_status metal_run(struct operands *operands, struct metal_target target, int64_t chunk, struct metal_trace *trace)
{
    static char filler[64];
    struct gpu_buffer buffers[BUFFERS] = {[FILLER] = {.base = filler, .length = sizeof filler}};
    struct mfa_choice choice;
    struct guarded workspace;
    mfa_buffers given;
    mfa_problem problem;
    *trace = (struct metal_trace){.dispatches = 0};
    for (int n = 0; n < MFA_METAL_KERNELS; n++)
        trace->visited[n] = -1;
    mfa_status status = mfa_problem_check(&operands->problem, &problem);
    if (status == MFA_OK)
        status = mfa_metal_tiles_supports(&problem);
    if (status != MFA_OK)
        return status;
    metal_choose(target, &problem, &choice);
    attach(operands, &problem, buffers, &given);
    guarded_open(&workspace, "workspace", choice.shared, 64, GUARDED_END, 0xff);
    if (workspace.size)
        buffers[WORKSPACE] = (struct gpu_buffer){
            .base = workspace.bytes, .length = workspace.size, .written = 1, .unwritten = 1, .scratch = 1};
    gpu_begin(buffers, BUFFERS);
    status = run_list(&problem, &choice, &given, chunk, buffers, trace);
    gpu_end(buffers, BUFFERS);
    guarded_close(&workspace);
    return status;
}

int metal_run_layout_test(int family)
{
    uint32_t wrong[32];
    struct gpu_launch launch = {.groups = 1, .threads = 32};
    struct mfa_key key = {.pass = MFA_FORWARD, .dtype = MFA_F32, .head_dim = 8, .value_dim = 8};
    char *text;
    snprintf(key.machine, sizeof key.machine, "apple%d", family);
    if (mfa_metal_source_write(&key, MFA_METAL_LAYOUT_TEST, NULL, &text) != MFA_OK)
        return 0;
    if (metal_rewrite)
        text = metal_rewrite(MFA_METAL_LAYOUT_TEST, text);
    memset(wrong, 0xff, sizeof wrong);
    launch.text = text, launch.name = launch.function = mfa_metal_source_function(MFA_METAL_LAYOUT_TEST);
    launch.buffers[MFA_METAL_BUFFER_PARTIALS] =
        (struct gpu_buffer){.base = wrong, .length = sizeof wrong, .written = 1, .unwritten = 1};
    gpu_begin(&launch.buffers[MFA_METAL_BUFFER_PARTIALS], 1);
    int right = !gpu_run(&launch);
    gpu_end(&launch.buffers[MFA_METAL_BUFFER_PARTIALS], 1);
    for (int lane = 0; lane < 32; lane++)
        right = right && wrong[lane] == 0;
    free(text);
    return right;
}
