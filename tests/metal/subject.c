#include "metal/subject.h"

#include <stdio.h>
#include <string.h>

#include "metal/source.h"

double subject_tolerance(const struct subject *s, enum reference_tensor tensor)
{
    const struct tolerance *t = &s->tolerance;
    const double tolerances[REFERENCE_TENSORS] = {
        [REFERENCE_O] = t->O,   [REFERENCE_L] = t->L,   [REFERENCE_dQ] = t->dQ,
        [REFERENCE_dK] = t->dK, [REFERENCE_dV] = t->dV, [REFERENCE_DBIAS] = t->dbias};
    return tolerances[tensor];
}

void subject_open(struct subject *s, const mfa_problem *problem, struct variant variant, uint64_t seed)
{
    struct operands operands;
    inputs_open(&s->inputs, problem, variant, seed, s->text);
    const mfa_problem *p = &s->inputs.problem;
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        int backward = tensor >= REFERENCE_dQ, none = tensor == REFERENCE_DBIAS && p->mask != MFA_MASK_ADDITIVE;
        if (!none && (!backward || (s->passes & SUBJECT_BACKWARD)))
            *reference_member(&s->truth, tensor) = reference_allocate(reference_count(p, tensor));
    }
    operands_open(&operands, &s->inputs, DENSE, 0); /* of these, only the inputs matter */
    reference_attention(&operands.problem, &operands.buffers, &s->truth);
    reference_tolerance(&operands.problem, &operands.buffers, &s->truth, &s->tolerance);
    operands_close(&operands);
}

void subject_close(struct subject *s)
{
    reference_close(&s->truth);
    inputs_close(&s->inputs);
}

static const char *run_pass(struct subject *s, struct operands *operands, int64_t chunk, struct reference *results)
{
    static const enum mfa_metal_kernel tiled[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_BACKWARD_DQ,
                                                  MFA_METAL_BACKWARD_DKV};
    static char wrong[4096];
    struct metal_trace trace;
    int64_t expected[MFA_METAL_KERNELS];
    const mfa_status status = metal_run(operands, s->target, chunk, &trace);
    const char *overrun = operands_collect(operands, results);
    if (status != MFA_OK) {
        snprintf(wrong, sizeof wrong, "%s: %s", mfa_status_name(status), mfa_last_error());
        return wrong;
    }
    if (overrun) {
        snprintf(wrong, sizeof wrong, "%s is written beside its elements", overrun);
        return wrong;
    }
    metal_expect(&s->inputs, operands->problem.pass, s->target, expected);
    for (size_t n = 0; n < sizeof tiled / sizeof *tiled; n++) {
        const int64_t visited = trace.visited[tiled[n]], visible = expected[tiled[n]];
        if (visited < 0 || visited == visible)
            continue;
        snprintf(wrong, sizeof wrong, "%s visits %lld tiles, and %lld can be seen", mfa_metal_source_function(tiled[n]),
                 (long long)visited, (long long)visible);
        return wrong;
    }
    return NULL;
}

const char *subject_run(struct subject *s, enum arrangement arrangement, unsigned wanted, int64_t chunk,
                        struct reference *results)
{
    const char *wrong = NULL;
    struct operands operands;
    memset(results, 0, sizeof *results);
    operands_open(&operands, &s->inputs, arrangement, wanted);
    if (s->passes & SUBJECT_FORWARD)
        wrong = run_pass(s, &operands, chunk, results);
    if (!wrong && (s->passes & SUBJECT_BACKWARD)) {
        operands_turn(&operands, arrangement, s->passes & SUBJECT_FORWARD ? results : &s->truth);
        wrong = run_pass(s, &operands, chunk, results);
    }
    operands_close(&operands);
    return wrong;
}
