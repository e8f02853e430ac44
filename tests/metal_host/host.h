/* The library on metalsim's runtime: problems whose operands are MTLBuffers, run through the public interface. */
#ifndef TESTS_METAL_HOST_HOST_H
#define TESTS_METAL_HOST_HOST_H

#include <stddef.h>
#include <stdint.h>

#include "mfa.h"
#include "runtime/runtime.h"
#include "support/test_case.h"

/* 0: the text is not a problem, which is reported. `number` selects what is broadcast; 0: nothing. Keeps a pointer to
 * the text. */
int host_test_case_open(struct test_case *test_case, const char *text, int number, uint64_t seed);

/* A pass that has been started. */
struct host_pass {
    struct operands operands;
    mfa_buffers buffers; /* of MTLBuffers over their memory */
    struct guarded workspace;
};

/* How a problem is run. All 0: dense, every output, the library's workspace, its own queue. */
struct host_options {
    enum arrangement arrangement;
    unsigned outputs;                             /* as operands_open has it; 0: all */
    int own_workspace;                            /* the caller's, of exactly the size that the plan states */
    void *stream;                                 /* of mfa_plan_run */
    int outputs_used;                             /* `before` has written the outputs: their contents are valid */
    void (*before)(const struct host_pass *pass); /* called before each pass, and */
    void (*after)(const struct host_pass *pass, void *stream); /* after it: waits, if the call has not. NULL: nothing */
};

/* Runs the passes of a test case; the status of the first that fails. `results`: to be closed by the caller. */
mfa_status host_run(mfa_context *context, struct test_case *test_case, const struct host_options *options,
                    struct reference *results);

/* The same in steps, for concurrent passes; the first is forward. */
void host_pass_open(struct host_pass *pass, const struct test_case *test_case, const struct host_options *options);
mfa_status host_start(mfa_context *context, const struct host_options *options, struct host_pass *pass);
void host_collect(struct host_pass *pass, struct reference *results, const char *text);

/* Runs a problem and checks the results; 0, and a report, if they are wrong. */
int host_check(mfa_context *context, struct test_case *test_case, const struct host_options *options);

/* Whether the outputs of the pass that failed are unchanged: NaN. */
int host_is_untouched(const struct reference *results);

/* A context whose files are in `folder`; NULL, and a report, if there is none. */
mfa_context *host_open(const char *folder);

/* Changes the runtime's settings; restores the defaults. Both reset findings and counts. */
void host_set(const struct metalsim_settings *settings);
void host_reset(void);

/* The counts since that reset. */
struct metalsim_counts host_counts(void);

/* Whether the runtime has no findings and, if `closed`, no live objects; else all are reported. */
int host_is_clean(int closed);

/* Makes a new folder for this test; its path is valid until the next call. Removes a folder and its files. */
const char *host_folder(void);
void host_remove(const char *folder);

#endif
