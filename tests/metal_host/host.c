#define _GNU_SOURCE
#include "metal_host/host.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "metal_host/objc.h"
#include "support/cases.h"
#include "support/report.h"

void (*const metal_host_send)(void) = objc_msgSend;

#define ALL_OUTPUTS (FORWARD_OUTPUTS | BACKWARD_OUTPUTS | OUTPUT(O_LOW))
#define WORKSPACE_OFFSET 64 /* of the caller's workspace in its buffer */

/* --- Test cases ------------------------------------------------------------------------------------- */

static struct variant variant_of(const mfa_problem *problem, int number)
{
    const int masked = problem->mask != MFA_MASK_NONE, along = number % 16;
    return (struct variant){.heads_broadcast = number % 4,
                            .mask_broadcast = masked ? along : 0,
                            .dbias_broadcast = masked ? (number % 3 ? along : (along ^ 15) * (number > 0)) : 0,
                            .kv_broadcast = masked ? 0 : number % 4,
                            .dlse = number % 2};
}

int host_test_case_open(struct test_case *s, const char *text, int number, uint64_t seed)
{
    struct one_case one;
    if (!case_parse(text, &one)) {
        report_fail("%s: %s", text, mfa_last_error());
        return 0;
    }
    one.problem.device = MFA_DEVICE_METAL;
    test_case_open(s, &one, variant_of(&one.problem, number), seed);
    s->text = text;
    return 1;
}

/* --- Runs ----------------------------------------------------------------------------------------- */

/* An MTLBuffer over a tensor, from the 64 bytes that it begins in. */
static mfa_buffer wrap(const struct tensor *tensor, int unwritten)
{
    const mfa_buffer at = tensor_buffer(tensor);
    const uintptr_t begin = (uintptr_t)tensor->memory.bytes, base = begin / 64 * 64;
    return (mfa_buffer){metalsim_runtime_buffer((void *)base, begin - base + tensor->memory.size, unwritten),
                        (uintptr_t)at.base + at.offset - base};
}

static int belongs(int tensor, int32_t pass)
{
    return pass == MFA_BACKWARD ? 1 : tensor < REFERENCE_dQ && tensor != REFERENCE_dO && tensor != REFERENCE_dL;
}

static mfa_buffers wrap_all(const struct operands *operands, int outputs_used)
{
    mfa_buffers buffers = {.size = sizeof buffers};
    const int first_output = operands->problem.pass == MFA_BACKWARD ? REFERENCE_dQ : REFERENCE_O;
    for (int tensor = 0; tensor < REFERENCE_TENSORS; tensor++)
        if (operands->tensors[tensor].memory.mapping && belongs(tensor, operands->problem.pass))
            *(mfa_buffer *)reference_buffer(&buffers, tensor) =
                wrap(&operands->tensors[tensor], tensor >= first_output && !outputs_used);
    return buffers;
}

static void release_all(const mfa_buffers *buffers)
{
    for (int tensor = 0; tensor < REFERENCE_TENSORS; tensor++)
        metalsim_runtime_release(reference_buffer(buffers, tensor)->base);
}

mfa_status host_start(mfa_context *context, const struct host_options *options, struct host_pass *pass)
{
    const mfa_problem *problem = &pass->operands.problem;
    pass->buffers = wrap_all(&pass->operands, options->outputs_used);
    if (options->before)
        options->before(pass);
    if (!options->own_workspace)
        return mfa_attention(context, problem, &pass->buffers, options->stream);
    mfa_plan *plan;
    mfa_status status = mfa_plan_create(context, problem, &plan);
    if (status != MFA_OK)
        return status;
    const size_t bytes = mfa_plan_workspace(plan);
    guarded_open(&pass->workspace, "workspace", WORKSPACE_OFFSET + bytes, 64, GUARDED_END, 0xff);
    pass->buffers.workspace.base = metalsim_runtime_buffer(pass->workspace.bytes, WORKSPACE_OFFSET + bytes, 1);
    pass->buffers.workspace.offset = WORKSPACE_OFFSET;
    pass->buffers.workspace_size = bytes;
    status = mfa_plan_run(plan, &pass->buffers, options->stream);
    mfa_plan_destroy(plan);
    return status;
}

void host_collect(struct host_pass *pass, struct reference *results, const char *text)
{
    release_all(&pass->buffers);
    metalsim_runtime_release(pass->buffers.workspace.base);
    const unsigned char *workspace = pass->workspace.bytes;
    for (int n = 0; n < WORKSPACE_OFFSET && pass->workspace.mapping; n++)
        if (workspace[n] != 0xff) {
            report_fail("%s: the workspace is written before its offset", text);
            break;
        }
    if (pass->workspace.mapping)
        guarded_close(&pass->workspace);
    pass->workspace = (struct guarded){.mapping = NULL};
    const char *overrun = operands_collect(&pass->operands, results);
    if (overrun)
        report_fail("%s: %s is written beside its elements", text, overrun);
}

void host_pass_open(struct host_pass *pass, const struct test_case *s, const struct host_options *options)
{
    *pass = (struct host_pass){.workspace.mapping = NULL};
    operands_open(&pass->operands, &s->inputs, options->arrangement, options->outputs ? options->outputs : ALL_OUTPUTS);
}

static mfa_status run_pass(mfa_context *context, const struct host_options *options, struct host_pass *pass,
                           struct reference *results, const char *text)
{
    const mfa_status status = host_start(context, options, pass);
    if (options->after)
        options->after(pass, options->stream);
    host_collect(pass, results, text);
    return status;
}

mfa_status host_run(mfa_context *context, struct test_case *s, const struct host_options *options,
                    struct reference *results)
{
    mfa_status status = MFA_OK;
    struct host_pass pass;
    memset(results, 0, sizeof *results);
    host_pass_open(&pass, s, options);
    if (s->passes & CASE_FORWARD)
        status = run_pass(context, options, &pass, results, s->text);
    if (status == MFA_OK && s->passes & CASE_BACKWARD) {
        operands_turn(&pass.operands, options->arrangement,
                      s->passes & CASE_FORWARD && results->O && results->L ? results : &s->truth);
        status = run_pass(context, options, &pass, results, s->text);
    }
    operands_close(&pass.operands);
    return status;
}

int host_check(mfa_context *context, struct test_case *s, const struct host_options *options)
{
    struct reference results;
    guarded_testing(s->text);
    const mfa_status status = host_run(context, s, options, &results);
    int good = status == MFA_OK;
    if (good)
        good = test_case_is_right(s, s->text, &results);
    else
        report_fail("%s: %s: %s", s->text, mfa_status_name(status), mfa_last_error());
    reference_close(&results);
    return good;
}

int host_is_untouched(const struct reference *results)
{
    const double *const forward[] = {results->O, results->L}, *const backward[] = {results->dQ, results->dK,
                                                                                   results->dV};
    const int turned = results->dQ || results->dK || results->dV;
    for (size_t i = 0; i < (turned ? 3 : 2); i++) {
        const double *values = turned ? backward[i] : forward[i];
        if (values && !isnan(values[0]))
            return 0;
    }
    return !results->dbias || isnan(results->dbias[0]);
}

/* --- The runtime ---------------------------------------------------------------------------------- */

mfa_context *host_open(const char *folder)
{
    mfa_context *context = NULL;
    const mfa_context_options options = {.size = sizeof options, .cache = folder};
    if (mfa_context_create(&options, &context) != MFA_OK)
        report_fail("mfa_context_create: %s", mfa_last_error());
    return context;
}

void host_set(const struct metalsim_settings *settings)
{
    metalsim_runtime_set(settings);
    metalsim_runtime_clear();
}

void host_reset(void)
{
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    host_set(&settings);
}

struct metalsim_counts host_counts(void)
{
    struct metalsim_counts counts;
    metalsim_runtime_count(&counts);
    return counts;
}

int host_is_clean(int closed)
{
    char leaks[2048];
    int good = 1;
    for (size_t i = 0; i < metalsim_runtime_findings(); i++, good = 0)
        report_fail("the runtime finds: %s", metalsim_runtime_finding(i));
    if (closed && metalsim_runtime_leaks(leaks, sizeof leaks)) {
        report_fail("alive at the end: %s", leaks);
        good = 0;
    }
    if (closed && host_counts().pools) {
        report_fail("%d autorelease pools are not popped", (int)host_counts().pools);
        good = 0;
    }
    return good;
}

/* --- Folders -------------------------------------------------------------------------------------- */

const char *host_folder(void)
{
    static char folder[64];
    snprintf(folder, sizeof folder, "/tmp/metal_host-XXXXXX");
    if (!mkdtemp(folder)) {
        perror("mkdtemp");
        exit(2);
    }
    return folder;
}

void host_remove(const char *folder)
{
    struct stat found;
    DIR *listing = lstat(folder, &found) == 0 && S_ISDIR(found.st_mode) ? opendir(folder) : NULL;
    for (struct dirent *entry; listing && (entry = readdir(listing)) != NULL;) {
        char path[4096];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        host_remove(path);
    }
    if (listing)
        closedir(listing);
    remove(folder);
}
