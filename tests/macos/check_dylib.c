/* What libmfa.dylib itself does on a system that is not Linux's: text and numbers through variable arguments, a
 * sentence for each thread, threads of its own. That it computes right is for check_attention_dylib. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mfa.h"
#include "support/report.h"

#define TEXT(number) #number
#define VERSION(major, minor, patch) TEXT(major) "." TEXT(minor) "." TEXT(patch)

static void expect(const char *what, const char *got, const char *expected)
{
    if (!strcmp(got, expected))
        report_pass();
    else
        report_fail("%s\n        got:      %s\n        expected: %s", what, got, expected);
}

static void expect_status(const char *what, mfa_status got, mfa_status expected)
{
    expect(what, mfa_status_name(got), mfa_status_name(expected));
}

/* Numbers and words of all kinds go out and come in again. */
static void check_text(void)
{
    static const char *const lines[] = {
        "forward f32 b1 h1 q1 kv1 d64",
        "backward bf16 b3 h12/4 q1099511627776 kv33 d96v80 lower-17 upper-5 scale0.1 softcap30 mask_f16",
        "forward f64 b2 h8 q512 kv700 d128 causal scale-1e-300 softcap0.30000000000000004 mask_bool",
    };
    for (size_t n = 0; n < sizeof lines / sizeof *lines; n++) {
        char printed[256] = "";
        mfa_problem problem;
        expect_status(lines[n], mfa_problem_parse(lines[n], &problem), MFA_OK);
        expect_status(lines[n], mfa_problem_print(&problem, printed, sizeof printed), MFA_OK);
        expect("printed", printed, lines[n]);
    }
}

static void check_sentences(void)
{
    mfa_context *context;
    const mfa_context_options options = {.size = 3};
    expect_status("size", mfa_context_create(&options, &context), MFA_INVALID);
    const char *sentence = "size of mfa_context_options is 3; ";
    expect("size", strstr(mfa_last_error(), sentence) ? sentence : mfa_last_error(), sentence);
}

/* The sentence of another thread is its own. */
static void *have_sentence(void *context)
{
    mfa_problem problem;
    if (*mfa_last_error())
        return "a new thread has a sentence";
    mfa_problem_init(&problem, 1, 3, 2, 1, 1, 8, 8);
    if (mfa_problem_supported(context, &problem) != MFA_INVALID)
        return "3 heads on 2 are not refused";
    return (void *)(strstr(mfa_last_error(), "q_heads is 3") ? "" : "the sentence does not say that q_heads is 3");
}

static void check_threads(void)
{
    enum { COUNT = 5 };
    pthread_t threads[COUNT];
    void *wrong;
    mfa_context *context;
    expect_status("context", mfa_context_create(NULL, &context), MFA_OK);
    for (int n = 0; n < COUNT; n++)
        if (pthread_create(&threads[n], NULL, have_sentence, context) != 0)
            report_fail("no thread");
    for (int n = 0; n < COUNT; n++) {
        pthread_join(threads[n], &wrong);
        expect("a thread", wrong, "");
    }
    mfa_context_destroy(context);
}

static void check_plan(void)
{
    char text[256] = "";
    mfa_context *context;
    mfa_plan *plan;
    mfa_problem problem;
    expect_status("context", mfa_context_create(NULL, &context), MFA_OK);
    expect_status("parse", mfa_problem_parse("forward f32 b1 h2 q64 kv64 d64 causal", &problem), MFA_OK);
    expect_status("plan", mfa_plan_create(context, &problem, &plan), MFA_OK);
    expect_status("describe", mfa_plan_describe(plan, text, sizeof text), MFA_OK);
    char *word = strstr(text, "_neon threads 2 ");
    expect("the plan's machine and threads", word ? "neon, 2" : text, "neon, 2");
    mfa_plan_destroy(plan);
    mfa_context_destroy(context);
}

/* On threads of the library's own. */
static mfa_status run(mfa_context *context)
{
    enum { HEADS = 2, LENGTH = 64, WIDTH = 8 };
    static float q[HEADS * LENGTH * WIDTH], o[HEADS * LENGTH * WIDTH];
    mfa_problem problem;
    mfa_problem_init(&problem, 1, HEADS, HEADS, LENGTH, LENGTH, WIDTH, WIDTH);
    const mfa_buffers buffers = {.size = sizeof buffers, .q = {q, 0}, .k = {q, 0}, .v = {q, 0}, .o = {o, 0}};
    return mfa_attention(context, &problem, &buffers, NULL);
}

/* The child does not take the threads of its parent for its own. */
static void check_fork(void)
{
    mfa_context *context;
    int status = -1;
    expect_status("context", mfa_context_create(NULL, &context), MFA_OK);
    expect_status("run", run(context), MFA_OK);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); /* a child that hangs is a failure, too */
        const mfa_status ran = run(context);
        mfa_context_destroy(context);
        _exit(ran != MFA_OK);
    }
    const int ended = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status);
    expect("a child after fork()", ended && WEXITSTATUS(status) == 0 ? "runs" : "fails", "runs");
    expect_status("run after fork()", run(context), MFA_OK);
    mfa_context_destroy(context);
}

int main(void)
{
    report_begin("check_dylib", 1);
    expect("version", mfa_version(), VERSION(MFA_VERSION_MAJOR, MFA_VERSION_MINOR, MFA_VERSION_PATCH));
    expect("the sentence before any", mfa_last_error(), "");
    check_text();
    check_sentences();
    check_threads();
    check_plan();
    check_fork();
    return report_end();
}
