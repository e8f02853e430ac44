/* The Metal kernels on long sequences, against the CPU backend: lengths that a simulator cannot reach. Both get the
 * same inputs, and both go backward from what the CPU's forward pass gave. They add in another order: a sum of n terms
 * that is rounded n times is off by sqrt(n / 12) units in its last place on average, and may differ by four times that,
 * or a few units of the tensor's largest element where its dtype has less precision. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "metal/gpu.h"
#include "metal/run.h"
#include "mfa.h"
#include "reference/element.h"
#include "support/arguments.h"
#include "support/compare.h"
#include "support/operands.h"
#include "support/report.h"

static const char *const problems[] = {
    "forward f16 b1 h1 q32768 kv32768 d64",
    "forward bf16 b1 h1 q32768 kv32768 d128 causal",
    "forward f32 b1 h1 q32768 kv32768 d64 causal",
    "forward f16 b1 h2/1 q16384 kv16384 d64 softcap30",
    "forward f32 b1 h1 q8192 kv8192 d256",
    "forward bf16 b1 h2/1 q8192 kv8192 d256 causal",
    "forward f16 b2 h4/2 q8192 kv8192 d80 lower-511 upper0",
    "forward f16 b1 h1 q5000 kv9000 d96v72 upper4000",
    "forward bf16 b1 h1 q4096 kv4096 d64 mask_bool",
    "forward f16 b1 h1 q3000 kv3500 d64 mask_f16",
    "forward f16 b4 h32/8 q1 kv32768 d128",
    "forward f32 b1 h8/1 q4 kv32768 d64 upper32764",
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* One pass on both: the CPU's results into `truth`, and compared. */
static int check_pass(const char *text, const struct inputs *inputs, mfa_context *context, int backward,
                      struct reference *truth)
{
    const unsigned all = FORWARD_OUTPUTS | BACKWARD_OUTPUTS;
    struct operands cpu, gpu;
    struct reference results = {0};
    struct metal_trace trace;
    operands_open(&cpu, inputs, DENSE, all);
    operands_open(&gpu, inputs, DENSE, all);
    if (backward) {
        operands_turn(&cpu, DENSE, truth);
        operands_turn(&gpu, DENSE, truth);
    }
    double begin = seconds();
    mfa_status status = operands_run(&cpu, context, 0);
    const double on_cpu = seconds() - begin;
    if (status == MFA_OK) {
        operands_collect(&cpu, truth);
        begin = seconds();
        status = metal_run(&gpu, (struct metal_target){.family = 7}, 0, &trace);
        operands_collect(&gpu, &results);
    }
    if (status != MFA_OK)
        report_fail("%s: %s", text, mfa_last_error());
    int good = status == MFA_OK;
    for (int tensor = backward ? REFERENCE_dQ : REFERENCE_O;
         tensor < (backward ? REFERENCE_TENSORS : REFERENCE_dQ) && good; tensor++) {
        const double *got = *reference_member(&results, tensor), *right = *reference_member(truth, tensor);
        const mfa_problem *p = &inputs->problem;
        const int64_t count = reference_count(p, tensor);
        const int32_t dtype = reference_dtype(p, tensor);
        int64_t shape[4];
        double largest = 0, worst = 0;
        reference_shape(p, tensor, shape);
        for (int64_t n = 0; right && n < count; n++)
            largest = isfinite(right[n]) ? fmax(largest, fabs(right[n])) : largest;
        const double walk = 4 * sqrt((double)(p->q_len > p->kv_len ? p->q_len : p->kv_len) / 12);
        const double tolerance = (dtype == MFA_F32 ? fmax(64, walk) : 2) * element_ulp(dtype) * largest;
        if (got && right)
            good = compare_close(text, tensor_name(tensor), shape, got, right, tolerance, &worst) && good;
    }
    if (good)
        report_pass();
    printf("%-6s %-8s CPU %7.2f s, GPU with copies and compiling %6.2f s, %d commands  %s\n", good ? "ok" : "FAILED",
           backward ? "backward" : "forward", on_cpu, seconds() - begin, trace.commands, text);
    fflush(stdout);
    reference_close(&results);
    operands_close(&cpu);
    operands_close(&gpu);
    return good;
}

static void check(const char *text, uint64_t seed, mfa_context *context)
{
    struct inputs inputs;
    struct reference truth = {0};
    mfa_problem problem;
    if (mfa_problem_parse(text, &problem) != MFA_OK) {
        report_fail("%s: %s", text, mfa_last_error());
        return;
    }
    const struct variant variant = {.mask_broadcast = problem.mask ? ALONG_BATCH | ALONG_HEAD : 0, .dlse = 1};
    inputs_open(&inputs, &problem, variant, seed, text);
    /* A decode step is not gone back from. */
    if (check_pass(text, &inputs, context, 0, &truth) && problem.q_len > 16)
        check_pass(text, &inputs, context, 1, &truth);
    reference_close(&truth);
    inputs_close(&inputs);
}

int main(int count, char **words)
{
    struct arguments arguments;
    mfa_context *context;
    if (!arguments_parse(&arguments, count, words, NULL))
        return 2;
    report_begin("check_large", arguments.seed);
    const char *cache = getenv("MFA_CACHE");
    const struct gpu_settings settings = {.cache = cache ? cache : "build/metalsim"};
    gpu_set(&settings);
    if (mfa_context_create(NULL, &context) != MFA_OK) {
        fprintf(stderr, "%s\n", mfa_last_error());
        return 2;
    }
    for (int n = 0; n < arguments.problem_count; n++)
        check(arguments.problems[n], arguments.seed, context);
    for (size_t n = 0; n < sizeof problems / sizeof *problems && !arguments.problem_count; n++)
        check(problems[n], arguments.seed, context);
    mfa_context_destroy(context);
    return report_end();
}
