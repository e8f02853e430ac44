/* Wrong numbers in the tensors that say where sequences lie. */
#include <stdio.h>
#include <string.h>

#include "metal/basics.h"
#include "metal/run.h"
#include "support/cases.h"
#include "support/generator.h"
#include "support/report.h"

enum { DRAWS = 8 }; /* of wrong numbers, for each problem */

static double draw(struct generator *generator, int64_t most)
{
    const int64_t near = most + 1, kind = (int64_t)(generator_next(generator) % 6);
    const int64_t any = (int64_t)(generator_next(generator) >> 33) - (INT64_C(1) << 30);
    const int64_t numbers[] = {INT32_MIN, INT32_MAX, -1, near, 2 * any, any % near};
    return (double)numbers[kind];
}

/* Sequences that overlap write the same rows, in an order that nobody promises; and no more than that may happen. */
static int is_harmless(mfa_status status)
{
    static const char *const faults[] = {"out of bounds: ", "unwritten: ", "divergence: ", "undefined"};
    for (size_t n = 0; n < sizeof faults / sizeof *faults && status != MFA_OK; n++)
        if (strstr(mfa_last_error(), faults[n]))
            return 0;
    return status == MFA_OK || strstr(mfa_last_error(), ": race at") != NULL;
}

/* Runs both passes; NULL, or what is wrong. */
static const char *run(const struct one_case *one, const struct inputs *inputs)
{
    const struct metal_target target = {.family = 7};
    struct operands operands;
    struct reference results = {0};
    struct metal_trace trace;
    const char *wrong = NULL;
    operands_open(&operands, inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    for (int pass = MFA_FORWARD; pass <= MFA_BACKWARD && !wrong; pass++) {
        if (!(one->passes & (pass == MFA_FORWARD ? CASE_FORWARD : CASE_BACKWARD)))
            continue;
        if (!is_harmless(metal_run(&operands, target, 0, &trace)))
            wrong = mfa_last_error();
        if (operands_collect(&operands, &results) && !wrong)
            wrong = "an output is written beside its elements";
        if (pass == MFA_FORWARD)
            operands_turn(&operands, DENSE, &results);
    }
    reference_close(&results);
    operands_close(&operands);
    return wrong;
}

void basics_check_wrong_lengths(const struct gpu_settings *settings)
{
    static const char *const lines[] = {
        "both f16 b3 h4/2 q33 kv70 d64 varlen_q total_q60 varlen_kv total_kv100 bottom_right upper0 sinks",
        "both f16 b3 h2 q33 kv70 d64 varlen_q total_q60 seqused_k leftpad_k mask_f16 dropout0.5",
        "both f16 b2 h2 q33 kv70 d64 varlen_q total_q40 varlen_kv total_kv90 seqused_k block_map_q16 block_map_kv16",
        "forward f16 b3 h8/2 q1 kv1100 d64 varlen_q total_q3 cache_batch_idx kv_batch2 seqused_k leftpad_k",
        "forward f16 b2 h2 q1 kv900 d64 cache_batch_idx kv_batch2 seqused_k alibi",
        "forward f16 b2 h2 q33 kv150 d64 page_size32 kv_batch3 seqused_k varlen_q total_q50",
        "forward f16 b2 h4/2 q1 kv900 d64 page_size16 kv_batch3 seqused_k leftpad_k",
        "forward f16 b2 h8/2 q1 kv900 d72v40 page_size7 kv_batch3 seqused_k",
        "forward f16 b2 h8/2 q1 kv900 d64 page_size7 kv_batch3 seqused_k k_int8 v_nf4",
        "forward f16 b3 h4/2 q33 kv70 d64 varlen_kv total_kv100 leftpad_k k_group32 k_int4 v_int8",
    };
    struct gpu_settings checked = *settings;
    for (size_t n = 0; n < sizeof lines / sizeof *lines; n++) {
        const char *wrong = NULL;
        struct one_case one;
        if (!case_parse(lines[n], &one)) {
            report_fail("%s: %s", lines[n], mfa_last_error());
            continue;
        }
        guarded_testing(one.text);
        for (int d = 0; d < DRAWS && !wrong; d++) {
            struct generator generator;
            struct inputs inputs;
            generator_seed(&generator, settings->seed + (uint64_t)d, lines[n]);
            inputs_open(&inputs, &one.problem, (struct variant){0}, settings->seed, one.text);
            for (int tensor = REFERENCE_CU_SEQLENS_Q; tensor <= REFERENCE_BLOCK_TABLE; tensor++)
                for (int64_t at = 0; inputs.values[tensor] && at < reference_count(&one.problem, tensor); at++)
                    if (d == 0 || generator_next(&generator) % 3 == 0)
                        inputs.values[tensor][at] = draw(&generator, one.problem.kv_len);
            checked.checked = d % 2;
            gpu_set(&checked);
            wrong = run(&one, &inputs);
            inputs_close(&inputs);
        }
        gpu_set(settings);
        if (wrong)
            report_fail("%s: with wrong lengths\n        %s", one.text, wrong);
        else
            report_pass();
    }
}
