/* mfa.h by itself: it needs no other header, is C11 and C++17 alike, and its types have the layout that
 * was promised, whatever the compiler. The build compiles this file in both languages. */
#include "mfa.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

static_assert(sizeof(mfa_layout) == 32, "four strides of 8 bytes");
static_assert(sizeof(mfa_buffer) == 16 && offsetof(mfa_buffer, offset) == 8, "64-bit machines");
static_assert(sizeof(mfa_problem) == 1040, "mfa_problem");
static_assert(offsetof(mfa_problem, pass) == 8, "pass");
static_assert(offsetof(mfa_problem, mask_dtype) == 24, "mask_dtype");
static_assert(offsetof(mfa_problem, batch) == 32, "batch");
static_assert(offsetof(mfa_problem, lower) == 88, "lower");
static_assert(offsetof(mfa_problem, scale) == 104, "scale");
static_assert(offsetof(mfa_problem, q_layout) == 120, "q_layout");
static_assert(offsetof(mfa_problem, mask_layout) == 280, "mask_layout");
static_assert(offsetof(mfa_problem, d_o_layout) == 312, "d_o_layout");
static_assert(offsetof(mfa_problem, dbias_layout) == 472, "dbias_layout");
static_assert(offsetof(mfa_problem, slopes_layout) == 504, "slopes_layout");
static_assert(offsetof(mfa_problem, sinks) == 536, "sinks");
static_assert(offsetof(mfa_problem, sinks_layout) == 544, "sinks_layout");
static_assert(offsetof(mfa_problem, dropout) == 608, "dropout");
static_assert(offsetof(mfa_problem, seed_layout) == 616, "seed_layout");
static_assert(offsetof(mfa_problem, block_map_q) == 648, "block_map_q");
static_assert(offsetof(mfa_problem, block_map_layout) == 664, "block_map_layout");
static_assert(offsetof(mfa_problem, varlen_q) == 696, "varlen_q");
static_assert(offsetof(mfa_problem, total_q) == 720, "total_q");
static_assert(offsetof(mfa_problem, cu_seqlens_q_layout) == 752, "cu_seqlens_q_layout");
static_assert(offsetof(mfa_problem, block_table_layout) == 912, "block_table_layout");
static_assert(offsetof(mfa_problem, k_type) == 944, "k_type");
static_assert(offsetof(mfa_problem, k_scale_layout) == 968, "k_scale_layout");
static_assert(offsetof(mfa_problem, out_type) == 1032, "out_type");
static_assert(offsetof(mfa_problem, fast) == 1036, "fast");
static_assert(sizeof(mfa_buffers) == 448, "mfa_buffers");
static_assert(offsetof(mfa_buffers, q) == 8, "q");
static_assert(offsetof(mfa_buffers, dbias) == 184, "dbias");
static_assert(offsetof(mfa_buffers, workspace) == 200, "workspace");
static_assert(offsetof(mfa_buffers, o_low) == 224, "o_low");
static_assert(offsetof(mfa_buffers, slopes) == 240, "slopes");
static_assert(offsetof(mfa_buffers, sinks) == 256, "sinks");
static_assert(offsetof(mfa_buffers, seed) == 288, "seed");
static_assert(offsetof(mfa_buffers, block_map) == 304, "block_map");
static_assert(offsetof(mfa_buffers, cu_seqlens_q) == 320, "cu_seqlens_q");
static_assert(offsetof(mfa_buffers, block_table) == 400, "block_table");
static_assert(offsetof(mfa_buffers, k_scale) == 416, "k_scale");
static_assert(sizeof(mfa_context_options) == 40, "mfa_context_options");
static_assert(offsetof(mfa_context_options, isa) == 16, "isa");
static_assert(offsetof(mfa_context_options, host) == 32, "host");
static_assert(sizeof(mfa_status) == 4, "mfa_status");
static_assert(MFA_OK == 0 && MFA_INVALID == 1 && MFA_UNSUPPORTED == 2 && MFA_UNAVAILABLE == 3 &&
                  MFA_OUT_OF_MEMORY == 4 && MFA_COMPILE_FAILED == 5 && MFA_DEVICE_FAILED == 6 && MFA_INTERNAL == 7,
              "the codes of a status");
static_assert(MFA_FORWARD == 0 && MFA_BACKWARD == 1, "passes");
static_assert(MFA_DEVICE_CPU == 0 && MFA_DEVICE_METAL == 1, "devices");
static_assert(MFA_F32 == 0 && MFA_F16 == 1 && MFA_BF16 == 2 && MFA_F64 == 3, "dtypes");
static_assert(MFA_MASK_NONE == 0 && MFA_MASK_BOOL == 1 && MFA_MASK_ADDITIVE == 2, "masks");
static_assert(MFA_OUT_SAME == 0 && MFA_OUT_F32 == 1, "types of outputs");

/* Each function, with the type that callers without the header, such as ctypes, rely on. */
static const struct {
    const char *(*version)(void);
    const char *(*last_error)(void);
    const char *(*status_name)(mfa_status);
    const char *(*isa_name)(int32_t);
    mfa_status (*isa_supported)(const char *);
    mfa_status (*context_create)(const mfa_context_options *, mfa_context **);
    void (*context_destroy)(mfa_context *);
    mfa_status (*context_set_threads)(mfa_context *, int32_t);
    void (*problem_init_sized)(mfa_problem *, size_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    mfa_status (*problem_print)(const mfa_problem *, char *, size_t);
    mfa_status (*problem_parse_sized)(const char *, mfa_problem *, size_t);
    mfa_status (*problem_dropout_mask)(const mfa_problem *, const uint64_t *, uint8_t *);
    mfa_status (*quantize)(int32_t, int32_t, int64_t, int64_t, int64_t, const void *, int64_t, void *, int64_t, float *,
                           int64_t);
    mfa_status (*problem_supported)(mfa_context *, const mfa_problem *);
    mfa_status (*plan_create)(mfa_context *, const mfa_problem *, mfa_plan **);
    void (*plan_destroy)(mfa_plan *);
    size_t (*plan_workspace)(const mfa_plan *);
    mfa_status (*plan_describe)(const mfa_plan *, char *, size_t);
    mfa_status (*plan_run)(const mfa_plan *, const mfa_buffers *, void *);
    mfa_status (*attention)(mfa_context *, const mfa_problem *, const mfa_buffers *, void *);
} mfa = {mfa_version,
         mfa_last_error,
         mfa_status_name,
         mfa_isa_name,
         mfa_isa_supported,
         mfa_context_create,
         mfa_context_destroy,
         mfa_context_set_threads,
         mfa_problem_init_sized,
         mfa_problem_print,
         mfa_problem_parse_sized,
         mfa_problem_dropout_mask,
         mfa_kv_quantize,
         mfa_problem_supported,
         mfa_plan_create,
         mfa_plan_destroy,
         mfa_plan_workspace,
         mfa_plan_describe,
         mfa_plan_run,
         mfa_attention};

static int passed, failed;

static void check(int good, const char *what)
{
    good ? passed++ : failed++;
    if (!good)
        printf("FAILED  %s: %s\n", what, mfa.last_error());
}

int main(void)
{
    char text[256], numbers[64];
    float one = 1, o = 0;
    mfa_context *context = NULL;
    mfa_plan *plan = NULL;
    mfa_problem problem, same;
    mfa_buffers buffers;
    printf("test_header: the version, and a problem of one number by way of every function\n");
    snprintf(numbers, sizeof numbers, "%d.%d.%d", MFA_VERSION_MAJOR, MFA_VERSION_MINOR, MFA_VERSION_PATCH);
    check(!strcmp(mfa.version(), numbers), "the version is that of the header");
    check(!strcmp(mfa.status_name(MFA_OK), "MFA_OK"), "a status has a name");
    int count = 0;
    while (mfa.isa_name(count))
        count++;
    check(count > 1 && !strcmp(mfa.isa_name(0), "scalar"), "the first instruction set");
    check(!mfa.isa_name(-1) && !mfa.isa_name(INT32_MAX), "numbers without an instruction set");
    check(mfa.isa_supported("scalar") == MFA_OK, "every machine has scalar");
    check(mfa.isa_supported("sse") == MFA_INVALID && strstr(mfa.last_error(), "it must be scalar, "), "no such name");
    check(mfa.isa_supported(NULL) == MFA_INVALID && strstr(mfa.last_error(), "isa is NULL"), "no name");
    mfa.problem_init_sized(&problem, sizeof problem, 1, 1, 1, 1, 1, 1, 1);
    check(mfa.problem_print(&problem, text, sizeof text) == MFA_OK, "print");
    check(mfa.problem_parse_sized(text, &same, sizeof same) == MFA_OK && !memcmp(&problem, &same, sizeof same),
          "parse gives it back");
    check(mfa.context_create(NULL, &context) == MFA_OK, "context");
    check(mfa.context_set_threads(context, 1) == MFA_OK, "threads");
    check(mfa.problem_supported(context, &problem) == MFA_OK, "supported");
    check(mfa.plan_create(context, &problem, &plan) == MFA_OK, "plan");
    check(mfa.plan_describe(plan, text, sizeof text) == MFA_OK, "describe");
    check(mfa.plan_workspace(plan) < 1 << 24, "workspace");
    memset(&buffers, 0, sizeof buffers);
    buffers.size = sizeof buffers;
    buffers.q.base = buffers.k.base = buffers.v.base = &one;
    buffers.o.base = &o;
    check(mfa.plan_run(plan, &buffers, NULL) == MFA_OK && o == 1, "run");
    o = 0;
    check(mfa.attention(context, &problem, &buffers, NULL) == MFA_OK && o == 1, "in one call");
    mfa.plan_destroy(plan);
    mfa.context_destroy(context);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
