/* libmfa.dylib, as it ships, drives Metal: its messages go to metalsim's runtime, which executes the kernels that are
 * in the file as text. Both are arm64 code here, so arguments travel as they do on a Mac. Results must be those of the
 * reference, and the runtime must find nothing wrong. */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "metalsim/macho/macho.h"
#include "metalsim/runtime/runtime.h"
#include "mfa.h"
#include "reference/tolerance.h"
#include "support/compare.h"
#include "support/operands.h"
#include "support/report.h"

static const char *const problems[] = {
    "forward f16 b1 h2 q40 kv72 d64 causal", "both f32 b1 h2/1 q19 kv33 d40 mask_f16",
    "forward bf16 b1 h2 q1 kv520 d64 mask_bool", /* cut into parts, which are merged */
};

/* --- What the library opens ----------------------------------------------------------------------- */

static void *open_apples(const char *path)
{
    const int known =
        !strcmp(path, "/usr/lib/libobjc.A.dylib") || !strcmp(path, "/System/Library/Frameworks/Metal.framework/Metal");
    return known ? dlopen(MFA_RUNTIME, RTLD_NOW) : NULL;
}

static void *find_apples(void *library, const char *name)
{
    return dlsym(library ? library : RTLD_DEFAULT, name);
}

static void expect(const char *what, long long got, long long expected)
{
    if (got == expected)
        report_pass();
    else
        report_fail("%s is %lld; it should be %lld", what, got, expected);
}

/* --- A problem ------------------------------------------------------------------------------------ */

struct run {
    const char *text;
    struct inputs inputs;
    struct operands operands;
    struct reference truth, results;
    struct tolerance tolerance;
    void *buffers[REFERENCE_TENSORS]; /* MTLBuffers */
};

static void solve(struct run *run, int both)
{
    struct operands operands;
    const mfa_problem *p = &run->inputs.problem;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++)
        if (tensor != REFERENCE_O_LOW && (tensor < REFERENCE_dQ || both) &&
            (tensor != REFERENCE_DBIAS || p->mask == MFA_MASK_ADDITIVE))
            *reference_member(&run->truth, tensor) = reference_allocate(reference_count(p, tensor));
    operands_open(&operands, &run->inputs, DENSE, 0);
    reference_attention(&operands.problem, &operands.buffers, &run->truth);
    reference_tolerance(&operands.problem, &operands.buffers, &run->truth, &run->tolerance);
    operands_close(&operands);
}

/* In place of every tensor's address an MTLBuffer that has it. */
static void make_buffers(struct run *run)
{
    for (int n = 0; n < REFERENCE_TENSORS; n++) {
        const struct tensor *tensor = &run->operands.tensors[n];
        mfa_buffer *buffer = (mfa_buffer *)reference_buffer(&run->operands.buffers, n);
        if (!tensor->memory.mapping)
            continue;
        const mfa_buffer memory = tensor_buffer(tensor);
        const int written = run->operands.problem.pass == MFA_FORWARD ? n >= REFERENCE_O : n >= REFERENCE_dQ;
        run->buffers[n] = metalsim_runtime_buffer(tensor->memory.bytes, tensor->memory.size, written);
        buffer->base = run->buffers[n];
        buffer->offset = memory.offset + (uint64_t)((unsigned char *)memory.base - tensor->memory.bytes);
    }
}

static void free_buffers(struct run *run)
{
    for (int n = 0; n < REFERENCE_TENSORS; n++) {
        if (run->buffers[n])
            metalsim_runtime_release(run->buffers[n]);
        run->buffers[n] = NULL;
    }
}

static mfa_status run_pass(struct run *run, mfa_context *context, void *stream)
{
    mfa_buffers buffers = run->operands.buffers;
    run->operands.problem.device = MFA_DEVICE_METAL;
    if (run->operands.problem.pass == MFA_FORWARD)
        buffers.d_o = buffers.dlse = buffers.dq = buffers.dk = buffers.dv = buffers.dbias = (mfa_buffer){NULL, 0};
    return mfa_attention(context, &run->operands.problem, &buffers, stream);
}

static void run_on_own_queue(struct run *run, mfa_context *context)
{
    make_buffers(run);
    const mfa_status status = run_pass(run, context, NULL);
    if (status != MFA_OK)
        report_fail("%s\n        %s: %s", run->text, mfa_status_name(status), mfa_last_error());
    free_buffers(run);
    operands_collect(&run->operands, &run->results);
}

static void compare(struct run *run)
{
    const struct tolerance *t = &run->tolerance;
    const double tolerances[REFERENCE_TENSORS] = {
        [REFERENCE_O] = t->O,   [REFERENCE_L] = t->L,   [REFERENCE_dQ] = t->dQ,
        [REFERENCE_dK] = t->dK, [REFERENCE_dV] = t->dV, [REFERENCE_DBIAS] = t->dbias};
    for (int n = REFERENCE_O; n < REFERENCE_TENSORS; n++) {
        const double *got = *reference_member(&run->results, n), *right = *reference_member(&run->truth, n);
        int64_t shape[4];
        reference_shape(&run->inputs.problem, n, shape);
        if (got && right && compare_close(run->text, tensor_name(n), shape, got, right, tolerances[n], NULL))
            report_pass();
    }
}

static int open_run(struct run *run, const char *text)
{
    char line[256];
    mfa_problem problem;
    const int both = !strncmp(text, "both", 4);
    *run = (struct run){.text = text};
    snprintf(line, sizeof line, "forward%s", strchr(text, ' '));
    if (mfa_problem_parse(line, &problem) != MFA_OK)
        report_fail("%s: %s", text, mfa_last_error());
    inputs_open(&run->inputs, &problem, (struct variant){0}, 1, text);
    solve(run, both);
    operands_open(&run->operands, &run->inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    return both;
}

static void close_run(struct run *run)
{
    operands_close(&run->operands);
    reference_close(&run->results);
    reference_close(&run->truth);
    inputs_close(&run->inputs);
}

static void check_problem(const char *text, mfa_context *context)
{
    struct run run;
    const int both = open_run(&run, text);
    run_on_own_queue(&run, context);
    if (both) {
        operands_turn(&run.operands, DENSE, &run.results);
        run_on_own_queue(&run, context);
    }
    compare(&run);
    close_run(&run);
}

/* Without PyTorch a sentence, and with it results, for which nobody but PyTorch has committed anything. */
static void check_torch(mfa_context *context)
{
    struct run run;
    struct metalsim_counts before, after;
    open_run(&run, problems[0]);
    make_buffers(&run);
    if (run_pass(&run, context, MFA_STREAM_TORCH) == MFA_UNAVAILABLE && strstr(mfa_last_error(), "PyTorch is not in"))
        report_pass();
    else
        report_fail("PyTorch's stream without PyTorch: %s", mfa_last_error());
    dlopen(MFA_TORCH, RTLD_NOW | RTLD_GLOBAL);
    void (*synchronize)(void), (*close)(void);
    *(void **)&synchronize = dlsym(RTLD_DEFAULT, "metalsim_torch_synchronize");
    *(void **)&close = dlsym(RTLD_DEFAULT, "metalsim_torch_close");
    metalsim_runtime_count(&before);
    expect("status on PyTorch's stream", run_pass(&run, context, MFA_STREAM_TORCH), MFA_OK);
    metalsim_runtime_count(&after);
    expect("commits on PyTorch's stream", (long long)(after.commits - before.commits), 0);
    expect("waits on PyTorch's stream", (long long)(after.waits - before.waits), 0);
    synchronize();
    free_buffers(&run);
    operands_collect(&run.operands, &run.results);
    compare(&run);
    close_run(&run);
    close();
}

/* --- What the runtime has seen -------------------------------------------------------------------- */

/* A forward pass of 40 queries in blocks, two heads: sizes that a Mac gets as two structs by reference. */
static void check_sizes(void)
{
    const struct metalsim_recorded *d = metalsim_runtime_dispatch(0);
    if (!d || strcmp(d->function, "attention_forward") != 0) {
        report_fail("the last dispatch is of %s, not of attention_forward", d ? d->function : "nothing");
        return;
    }
    expect("threadgroups over heads and blocks of queries, odd", (long long)d->threadgroups[0] % 2, 0);
    expect("threadgroups.height", (long long)d->threadgroups[1], 1);
    expect("threadgroups.depth", (long long)d->threadgroups[2], 1);
    expect("threads.width beyond simdgroups", (long long)d->threads[0] % 32, 0);
    expect("threads.height", (long long)d->threads[1], 1);
    expect("threads.depth", (long long)d->threads[2], 1);
    expect("bytes of Q", (long long)d->buffers[1].length, 2 * 40 * 64 * 2);
}

static void check_runtime(void)
{
    char leaks[4096];
    for (size_t n = 0; metalsim_runtime_finding(n); n++)
        report_fail("the runtime finds: %s", metalsim_runtime_finding(n));
    expect("findings", (long long)metalsim_runtime_findings(), 0);
    if (metalsim_runtime_leaks(leaks, sizeof leaks) > 0)
        report_fail("objects that nobody has released:\n%s", leaks);
}

static mfa_context *open_context(const char *cache)
{
    mfa_context *context = NULL;
    const mfa_context_options options = {.size = sizeof options, .cache = cache};
    const mfa_status status = mfa_context_create(&options, &context);
    if (status != MFA_OK)
        report_fail("no context: %s: %s", mfa_status_name(status), mfa_last_error());
    return context;
}

static void precompile(mfa_context *context, const char *folder)
{
    mfa_problem problem;
    mfa_status status = mfa_problem_parse(problems[0], &problem);
    problem.device = MFA_DEVICE_METAL;
    if (status == MFA_OK)
        status = mfa_precompile(context, &problem, folder, NULL, NULL);
    if (status == MFA_OK)
        report_pass();
    else
        report_fail("precompiling into %s: %s", folder, mfa_last_error());
}

/* Each context is as a process is. The first compiles; the second finds in the cache what the first has left there; the
 * third has an empty cache, and finds what the second has put beside the library. */
int main(int count, char **words)
{
    char caches[2][4096], beside[4096];
    struct metalsim_counts counts[3];
    report_begin("check_metal_dylib", 1);
    if (count != 2)
        return printf("usage: MFA_DYLIB=FILE check_metal_dylib EMPTY_FOLDER\n"), 2;
    snprintf(caches[0], sizeof caches[0], "%s/first", words[1]);
    snprintf(caches[1], sizeof caches[1], "%s/second", words[1]);
    const char *library = getenv("MFA_DYLIB"), *name = strrchr(library, '/');
    snprintf(beside, sizeof beside, "%.*s/kernels", name ? (int)(name - library) : 1, name ? library : ".");
    macho_libraries.open = open_apples, macho_libraries.find = find_apples;
    for (int n = 0; n < 3; n++) {
        metalsim_runtime_clear();
        mfa_context *context = open_context(caches[n / 2]);
        if (!context)
            return report_end();
        check_problem(problems[0], context);
        check_sizes();
        metalsim_runtime_count(&counts[n]);
        for (size_t more = 1; more < sizeof problems / sizeof *problems && n == 0; more++)
            check_problem(problems[more], context);
        if (n == 1) {
            check_torch(context);
            precompile(context, beside);
        }
        mfa_context_destroy(context);
        check_runtime();
    }
    expect("whether the first context compiled for the GPU", counts[0].functions > 0, 1);
    expect("functions that the second compiled", (long long)counts[1].functions, 0);
    expect("functions that the third compiled", (long long)counts[2].functions, 0);
    return report_end();
}
