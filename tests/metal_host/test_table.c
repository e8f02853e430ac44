/* The library's table of messages (src/metal/selectors.inc) against the runtime's (metalsim/runtime/facts.inc), which
 * was made from other sources: selector, types, ownership, and since when. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "runtime/runtime.h"
#include "support/report.h"

static const struct row {
    const char *receiver, *selector, *ownership, *since, *result, *types;
} rows[] = {
#define METHOD(name, receiver, selector, ownership, since, result, types) \
    {#receiver, selector, #ownership, #since, #result, #types},
#include "metal/selectors.inc"
#undef METHOD
};
#define ROWS (sizeof rows / sizeof *rows)

/* Messages that only the tests and the substitute for PyTorch send. */
static const char *const of_others[] = {"newComputePipelineStateWithFunction:error:",
                                        "computeCommandEncoderWithDispatchType:",
                                        "commandBufferWithUnretainedReferences",
                                        "commandBufferFromCommandQueue:",
                                        "commitAndContinue",
                                        "setThreadgroupMemoryLength:atIndex:"};

static const struct metalsim_fact *find_fact(const struct row *row)
{
    const char kind = row->receiver[0] == '+' ? '+' : '-';
    const char *class_name = row->receiver + (kind == '+');
    const struct metalsim_fact *fact;
    for (size_t i = 0; (fact = metalsim_runtime_fact(i)) != NULL; i++)
        if (fact->kind == kind && !strcmp(fact->class_name, class_name) && !strcmp(fact->selector, row->selector))
            return fact;
    return NULL;
}

/* Whether the fact is of a class that conforms to the protocol that the row is of. */
static int is_inherited(const struct metalsim_fact *fact, const struct row *row)
{
    return !strcmp(fact->class_name, "MPSCommandBuffer") && !strcmp(row->receiver, "MTLCommandBuffer") &&
           !strcmp(fact->selector, row->selector);
}

/* A list of types without blanks, SELF spelt out. */
static void normalize(const char *types, char text[256])
{
    size_t length = 0;
    for (const char *at = types; *at && length < 250; at++)
        if (!strncmp(at, "SELF", 4)) {
            length += (size_t)snprintf(text + length, 256 - length, "id,SEL");
            at += 3;
        } else if (*at != ' ') {
            text[length++] = *at;
        }
    text[length] = 0;
}

static int count_of(const char *text, char wanted)
{
    int count = 0;
    for (; *text; text++)
        count += *text == wanted;
    return count;
}

static void test_rows(void **state)
{
    (void)state;
    for (size_t n = 0; n < ROWS; n++) {
        const struct row *row = &rows[n];
        const struct metalsim_fact *fact = find_fact(row);
        char ours[256], theirs[256];
        print_message("%s %s: %s\n", row->receiver, row->selector, fact ? fact->source : "no fact");
        assert_non_null(fact);
        normalize(row->types, ours), normalize(fact->arguments, theirs);
        assert_string_equal(ours, theirs);
        normalize(row->result, ours), normalize(fact->result, theirs);
        assert_string_equal(ours, theirs);
        assert_int_equal(row->ownership[0] - 'A', fact->ownership - 'a');
        const int since = (int)(atof(row->since) * 100 + 0.5);
        assert_int_equal(since, fact->since > 1400 ? fact->since : 1400);
    }
}

/* What Objective-C's conventions say of every row, whatever the documents do. */
static void test_conventions(void **state)
{
    (void)state;
    for (size_t n = 0; n < ROWS; n++) {
        const struct row *row = &rows[n];
        const int is_object = !strcmp(row->result, "id"), is_new = !strncmp(row->selector, "new", 3);
        assert_int_equal(count_of(row->selector, ':'), count_of(row->types, ',') - 1);
        assert_string_equal(row->ownership, !is_object ? "VALUE" : is_new ? "OWNED" : "BORROWED");
    }
}

/* The runtime implements no selector that is never sent. */
static void test_facts_are_used(void **state)
{
    (void)state;
    const struct metalsim_fact *fact;
    for (size_t i = 0; (fact = metalsim_runtime_fact(i)) != NULL; i++) {
        int used = 0;
        for (size_t n = 0; n < ROWS; n++)
            used |= find_fact(&rows[n]) == fact || is_inherited(fact, &rows[n]);
        for (size_t n = 0; n < sizeof of_others / sizeof *of_others; n++)
            used |= !strcmp(of_others[n], fact->selector);
        if (!used)
            fail_msg("nobody sends %s %s", fact->class_name, fact->selector);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_conventions),
        cmocka_unit_test(test_facts_are_used),
    };
    report_begin("test_table", 0);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
