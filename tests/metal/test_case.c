#include "metal/test_case.h"

#include <stdio.h>
#include <string.h>

#include "metal/source.h"

static const char *run_pass(const struct test_case *s, struct metal_target target, struct operands *operands,
                            int64_t chunk, struct reference *results)
{
    static const enum mfa_metal_kernel tiled[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_DECODE_VECTOR,
                                                  MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV};
    static char wrong[4096];
    struct metal_trace trace;
    int64_t expected[MFA_METAL_KERNELS];
    const mfa_status status = metal_run(operands, target, chunk, &trace);
    const char *overrun = operands_collect(operands, results);
    if (status != MFA_OK) {
        snprintf(wrong, sizeof wrong, "%s: %s", mfa_status_name(status), mfa_last_error());
        return wrong;
    }
    if (overrun) {
        snprintf(wrong, sizeof wrong, "%s is written beside its elements", overrun);
        return wrong;
    }
    metal_expect(&s->inputs, operands, target, expected);
    for (size_t n = 0; n < sizeof tiled / sizeof *tiled; n++) {
        const int64_t visited = trace.visited[tiled[n]], nonempty = expected[tiled[n]];
        if (visited < 0 || visited == nonempty)
            continue;
        snprintf(wrong, sizeof wrong, "%s visits %lld blocks, and has to visit %lld",
                 mfa_metal_source_function(tiled[n]), (long long)visited, (long long)nonempty);
        return wrong;
    }
    return NULL;
}

const char *metal_test_case_run(const struct test_case *s, struct metal_target target, enum arrangement arrangement,
                                unsigned wanted, int64_t chunk, struct reference *results)
{
    const char *wrong = NULL;
    struct operands operands;
    memset(results, 0, sizeof *results);
    operands_open(&operands, &s->inputs, arrangement, wanted);
    if (s->passes & CASE_FORWARD)
        wrong = run_pass(s, target, &operands, chunk, results);
    if (!wrong && (s->passes & CASE_BACKWARD)) {
        operands_turn(&operands, arrangement, s->passes & CASE_FORWARD ? results : &s->truth);
        wrong = run_pass(s, target, &operands, chunk, results);
    }
    operands_close(&operands);
    return wrong;
}
