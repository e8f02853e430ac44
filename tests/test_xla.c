/* mfa_xla_attention, called with frames as XLA makes them: the version that it answers, dimensions before the batch
 * that are repeated, merged or neither, and what it refuses. tests/python/test_jax.py has XLA itself. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "mfa.h"
#include "support/generator.h"
#include "support/report.h"
#include "xla/ffi.h"

enum { LEADING = 3, ROWS = 5, KEYS = 7, HEADS = 2, COLUMNS = 8, ARRAYS_MAX = 5 };

static struct {
    int32_t code;
    char message[1024];
} error;

static void *create_error(struct mfa_xla_error_arguments *arguments)
{
    assert_int_equal(arguments->size, sizeof *arguments);
    error.code = arguments->code;
    snprintf(error.message, sizeof error.message, "%s", arguments->message);
    return &error;
}

static const struct mfa_xla_api api = {sizeof api, NULL, {sizeof api.version, NULL, 0, 3}, NULL, create_error};

/* A call with arguments and one result. */
struct call {
    const char *problem, *operands;
    int32_t stage;
    int arguments;
    struct mfa_xla_buffer buffers[ARRAYS_MAX]; /* the arguments, then the result */
};

static void *run(struct call *call)
{
    const int32_t kinds[ARRAYS_MAX] = {MFA_XLA_BUFFER, MFA_XLA_BUFFER, MFA_XLA_BUFFER, MFA_XLA_BUFFER, MFA_XLA_BUFFER};
    const int32_t strings[] = {MFA_XLA_STRING, MFA_XLA_STRING};
    void *values[ARRAYS_MAX];
    for (int n = 0; n < ARRAYS_MAX; n++)
        values[n] = &call->buffers[n];
    const struct mfa_xla_text names[] = {{"operands", 8}, {"problem", 7}};
    const struct mfa_xla_text *const name_places[] = {&names[0], &names[1]};
    struct mfa_xla_text texts[] = {{call->operands, strlen(call->operands)}, {call->problem, strlen(call->problem)}};
    void *const text_places[] = {&texts[0], &texts[1]};
    struct mfa_xla_call_frame frame = {.size = sizeof frame, .api = &api, .stage = call->stage};
    frame.arguments = (struct mfa_xla_values){sizeof frame.arguments, NULL, call->arguments, kinds, values};
    frame.results = (struct mfa_xla_values){sizeof frame.results, NULL, 1, kinds, values + call->arguments};
    frame.attributes = (struct mfa_xla_attributes){sizeof frame.attributes, NULL, 2, strings, name_places, text_places};
    return mfa_xla_attention(&frame);
}

static struct mfa_xla_buffer array(float *data, int64_t rank, const int64_t *dims)
{
    return (struct mfa_xla_buffer){sizeof(struct mfa_xla_buffer), NULL, MFA_XLA_F32, data, rank, dims};
}

static float *random_array(uint64_t seed, int count)
{
    float *data = malloc(sizeof *data * (size_t)count); /* of its size, so that sanitizers see what is read beyond */
    assert_non_null(data);
    struct generator generator;
    generator_seed(&generator, seed, NULL);
    for (int n = 0; n < count; n++)
        data[n] = (float)generator_normal(&generator);
    return data;
}

/* Each entry of the dimension before the batch has queries of its own; all share the keys, and each batch entry the
 * bias of its head. */
static void test_dimension_before_the_batch(void **state)
{
    (void)state;
    for (int batch = 1; batch <= 2; batch++)
        for (int own_keys = 0; own_keys <= 1; own_keys++) {
            char line[80];
            snprintf(line, sizeof line, "forward f32 b%d h2 q5 kv7 d8 mask_f32", batch);
            const int64_t q_dims[] = {LEADING, batch, ROWS, HEADS, COLUMNS}, bias_dims[] = {1, 1, HEADS, 1, KEYS};
            const int64_t k_dims[] = {own_keys ? LEADING : 1, batch, KEYS, HEADS, COLUMNS};
            const int q_size = batch * ROWS * HEADS * COLUMNS, k_size = batch * KEYS * HEADS * COLUMNS;
            float *q = random_array(1, LEADING * q_size), *k = random_array(2, (own_keys ? LEADING : 1) * k_size);
            float *bias = random_array(3, HEADS * KEYS), *o = random_array(4, LEADING * q_size);
            float *expected = random_array(5, q_size);
            struct call call = {line,
                                "q k v mask -> o",
                                MFA_XLA_EXECUTE,
                                4,
                                {array(q, 5, q_dims), array(k, 5, k_dims), array(k, 5, k_dims),
                                 array(bias, 5, bias_dims), array(o, 5, q_dims)}};
            void *failed = run(&call);
            if (failed)
                print_message("%s\n", error.message);
            assert_null(failed);

            mfa_problem problem;
            assert_int_equal(mfa_problem_parse(line, &problem), MFA_OK);
            const mfa_layout rows = {ROWS * HEADS * COLUMNS, COLUMNS, HEADS * COLUMNS, 1};
            problem.q_layout = problem.o_layout = rows;
            problem.k_layout = problem.v_layout = (mfa_layout){KEYS * HEADS * COLUMNS, COLUMNS, HEADS * COLUMNS, 1};
            problem.mask_layout = (mfa_layout){0, KEYS, 0, 1};
            mfa_context *context;
            assert_int_equal(mfa_context_create(NULL, &context), MFA_OK);
            for (int entry = 0; entry < LEADING; entry++) {
                mfa_buffers buffers = {.size = sizeof buffers};
                buffers.q.base = q + entry * q_size;
                buffers.k.base = buffers.v.base = k + own_keys * entry * k_size;
                buffers.mask.base = bias;
                buffers.o.base = expected;
                assert_int_equal(mfa_attention(context, &problem, &buffers, NULL), MFA_OK);
                assert_memory_equal(o + entry * q_size, expected, sizeof *o * (size_t)q_size);
            }
            mfa_context_destroy(context);
            free(q), free(k), free(bias), free(o), free(expected);
            print_message("batch %d, keys %s: %d entries\n", batch, own_keys ? "of each" : "of all", LEADING);
        }
}

static void test_refused(void **state)
{
    (void)state;
    float data[1 * 4 * 1 * 8] = {0}, o[1 * 4 * 1 * 8];
    const int64_t dims[] = {1, 4, 1, 8};
    const struct {
        const char *problem, *operands, *words;
        int32_t stage, code;
    } cases[] = {
        {"forward f32 b1 h1 q4 kv4 d8", "q k v -> o", "stage is 0", 0, MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b1 h1 q4 kv4", "q k v -> o", "d<head_dim>", MFA_XLA_EXECUTE, MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b2 h1 q4 kv4 d8", "q k v -> o", "o has the sizes (1, 4, 1, 8)", MFA_XLA_EXECUTE,
         MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b1 h1 q5 kv4 d8", "q k o -> v", "q has the sizes", MFA_XLA_EXECUTE, MFA_XLA_INVALID_ARGUMENT},
        {"forward bf16 b1 h1 q4 kv4 d8", "q k v -> o", "o has XLA's element type 11", MFA_XLA_EXECUTE,
         MFA_XLA_INVALID_ARGUMENT},
        {"forward bf16 b1 h1 q4 kv4 d8 out_f32", "q k v -> o", "q has XLA's element type 11", MFA_XLA_EXECUTE,
         MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b1 h1 q4 kv4 d8", "q k v", "\"q k v -> o\"", MFA_XLA_EXECUTE, MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b1 h1 q4 kv4 d8", "q k v mask -> o", "which the call does not", MFA_XLA_EXECUTE,
         MFA_XLA_INVALID_ARGUMENT},
        {"forward f32 b1 h1 q4 kv4 d8 k_int8", "q k v -> o", "k_type is 1", MFA_XLA_EXECUTE, MFA_XLA_UNIMPLEMENTED},
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        struct mfa_xla_buffer in = array(data, 4, dims);
        struct call call = {cases[n].problem, cases[n].operands, cases[n].stage, 3, {in, in, in, array(o, 4, dims)}};
        assert_ptr_equal(run(&call), &error);
        print_message("%s\n", error.message);
        assert_non_null(strstr(error.message, cases[n].words));
        assert_int_equal(error.code, cases[n].code);
    }
}

/* A framework accepts its own version and older ones. */
static void test_version(void **state)
{
    (void)state;
    const struct {
        int api, answered; /* minor versions; -1: the framework does not say */
    } cases[] = {{-1, 1}, {1, 1}, {2, 2}, {3, 3}, {9, 3}};
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        struct mfa_xla_api of_framework = api;
        of_framework.version.minor = cases[n].api;
        struct mfa_xla_metadata metadata = {.size = sizeof metadata};
        struct mfa_xla_metadata_extension asked = {{sizeof asked, MFA_XLA_METADATA, NULL}, &metadata};
        struct mfa_xla_extension other = {sizeof other, 99, &asked.extension};
        struct mfa_xla_call_frame frame = {.size = sizeof frame, .extensions = &other};
        frame.api = cases[n].api < 0 ? NULL : &of_framework;
        assert_null(mfa_xla_attention(&frame));
        assert_int_equal(metadata.version.major, 0);
        assert_int_equal(metadata.version.minor, cases[n].answered);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dimension_before_the_batch),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_version),
    };
    report_begin("test_xla", 1);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
