/* The floating-point mode of the calling thread. Results are those of rounding to nearest, whatever it is, and the same
 * in all threads. Where subnormal numbers count as 0, those are the subnormals of floats, not of halves. */
#define _GNU_SOURCE
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "cpu/float_mode.h"
#include "cpu/kernels/simd/half.h"
#include "cpu/threads.h"
#include "reference/element.h"
#include "support/operands.h"

enum { SEED = 1, THREADS = 3 };

static mfa_cpu_float_mode plain;    /* of this program */
static mfa_cpu_float_mode trapping; /* where the CPU can */

/* The caller's modes: the default, the other roundings, subnormals as 0, and exceptions that trap. */
enum { ROUNDINGS = 3, MODES = ROUNDINGS + 3 };

static mfa_cpu_float_mode mode_number(int n)
{
    static const int roundings[ROUNDINGS] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    if (n == 0)
        return plain;
    if (n == ROUNDINGS + 1)
        return plain | MFA_CPU_FLOAT_FLUSH;
    if (n == ROUNDINGS + 2)
        return trapping;
    assert_int_equal(fesetround(roundings[n - 1]), 0);
    const mfa_cpu_float_mode mode = mfa_cpu_float_mode_get();
    assert_int_equal(fesetround(FE_TONEAREST), 0);
    assert_true(mode != plain);
    return mode;
}

static void test_halves(void **state)
{
    (void)state;
    for (int flush = 0; flush < 2; flush++)
        for (uint32_t bits = 0; bits <= UINT16_MAX; bits++) {
            const uint16_t given = (uint16_t)bits;
            const double expected = element_load(MFA_F16, &given, 0);
            volatile uint16_t half = given, back; /* volatile: not computed by the compiler */
            volatile float got;
            mfa_cpu_float_mode_set(flush ? plain | MFA_CPU_FLOAT_FLUSH : plain);
            got = f16_to_float(half);
            back = f16_of_float(got);
            mfa_cpu_float_mode_set(plain);
            if (isnan(expected)) {
                assert_true(isnan(got) && (back & 0x7fff) > 0x7c00);
                continue;
            }
            assert_true((double)got == expected);
            assert_int_equal(back, half);
        }
}

/* --- The threads of a run ------------------------------------------------------------------------- */

struct numbers {
    atomic_int arrived;
    int threads; /* each takes one of the first tasks, so that all take part */
    double thirds[64], subnormals[64], infinities[64];
};
enum { NUMBERS = sizeof((struct numbers *)0)->thirds / sizeof(double) };

static void compute(void *call, int64_t task, int worker)
{
    struct numbers *numbers = call;
    volatile double zero = 0, one = 1, three = 3, least = 0x1p-1022;
    (void)worker;
    numbers->thirds[task] = one / three;
    numbers->subnormals[task] = least / 2;
    numbers->infinities[task] = one / zero;
    if (task < numbers->threads)
        atomic_fetch_add(&numbers->arrived, 1);
    while (task < numbers->threads && atomic_load(&numbers->arrived) < numbers->threads)
        sched_yield();
}

static mfa_cpu_float_mode hosts_mode;
static atomic_int hosts_mode_lost;

struct range {
    int64_t begin, end;
    void (*worker)(int64_t begin, int64_t end, void *argument);
    void *argument;
};

/* Runs in a host's thread that has another mode. */
static void *run_range(void *argument)
{
    const struct range *range = argument;
    mfa_cpu_float_mode_set(hosts_mode);
    range->worker(range->begin, range->end, range->argument);
    if (mfa_cpu_float_mode_get() != hosts_mode)
        atomic_fetch_add(&hosts_mode_lost, 1);
    return NULL;
}

/* Starts a thread for each number of the range. */
static int32_t threaded_host(int64_t begin, int64_t end, int64_t grain,
                             void (*worker)(int64_t begin, int64_t end, void *argument), void *argument)
{
    struct range ranges[THREADS];
    pthread_t threads[THREADS];
    int count = 0;
    (void)grain;
    for (int64_t i = begin; i < end; i++, count++) {
        ranges[count] = (struct range){i, i + 1, worker, argument};
        if (count == THREADS || pthread_create(&threads[count], NULL, run_range, &ranges[count]) != 0)
            abort();
    }
    while (count > 0)
        pthread_join(threads[--count], NULL);
    return 0;
}

/* A mode that is set after the threads were started: they all round to nearest, and treat subnormals as 0 if the caller
 * does. */
static void run_in_mode(mfa_cpu_threads *threads, int workers, mfa_cpu_float_mode mode)
{
    struct numbers numbers = {.threads = workers};
    mfa_cpu_float_mode_set(mode);
    mfa_cpu_threads_run(threads, workers, NUMBERS, compute, &numbers);
    const mfa_cpu_float_mode after = mfa_cpu_float_mode_get();
    mfa_cpu_float_mode_set(plain);
    assert_true(after == mode);
    for (int n = 0; n < NUMBERS; n++) {
        assert_true(numbers.thirds[n] == 1.0 / 3);
        assert_true(numbers.subnormals[n] == ((mode & MFA_CPU_FLOAT_FLUSH) ? 0 : 0x1p-1023));
        assert_true(numbers.infinities[n] > 0x1.fp1023);
    }
}

static void test_threads(void **state)
{
    (void)state;
    static const mfa_parallel_for hosts[] = {NULL, threaded_host};
    alarm(60); /* threads that do not meet wait here */
    for (int host = 0; host < 2; host++) {
        mfa_cpu_threads *threads = NULL;
        assert_int_equal(mfa_cpu_threads_open(hosts[host], &threads), MFA_OK);
        hosts_mode = plain;
        run_in_mode(threads, THREADS, plain);
        for (int n = 0; n < MODES; n++)
            for (int workers = 1; workers <= THREADS; workers++) {
                hosts_mode = mode_number((n + 1) % MODES);
                run_in_mode(threads, workers, mode_number(n));
            }
        mfa_cpu_threads_close(threads);
    }
    alarm(0);
    assert_int_equal(atomic_load(&hosts_mode_lost), 0);
}

/* --- Results -------------------------------------------------------------------------------------- */

static size_t bytes_of(const struct operands *operands, enum reference_tensor tensor)
{
    return (size_t)tensor_count(&operands->tensors[tensor]) * sizeof(double);
}

/* Both passes of a problem in every mode, by a context that has its threads already. Smaller K and V of f16 have many
 * subnormal halves. */
static void check(const char *text, double factor)
{
    mfa_problem problem;
    struct inputs inputs;
    struct reference expected = {0};
    mfa_context *context;
    const mfa_context_options options = {.size = sizeof options, .threads = THREADS};
    assert_int_equal(mfa_context_create(&options, &context), MFA_OK);
    assert_int_equal(mfa_problem_parse(text, &problem), MFA_OK);
    assert_int_equal(problem.head_dim, problem.value_dim);
    inputs_open(&inputs, &problem, (struct variant){.dlse = 1}, SEED, text);
    for (int64_t n = 0; n < problem.batch * problem.kv_heads * problem.kv_len * problem.head_dim; n++)
        for (int tensor = REFERENCE_K; tensor <= REFERENCE_V; tensor++)
            inputs.values[tensor][n] = element_round(problem.dtype, factor * inputs.values[tensor][n]);
    for (int pass = 0; pass < 2; pass++)
        for (int n = 0; n < MODES; n++) {
            const unsigned wanted = pass ? BACKWARD_OUTPUTS : FORWARD_OUTPUTS;
            const mfa_cpu_float_mode mode = mode_number(n);
            struct operands operands;
            operands_open(&operands, &inputs, PADDED, wanted);
            if (pass)
                operands_turn(&operands, PADDED, &expected);
            mfa_cpu_float_mode_set(mode);
            const mfa_status status = operands_run(&operands, context, 0);
            const mfa_cpu_float_mode after = mfa_cpu_float_mode_get();
            mfa_cpu_float_mode_set(plain);
            assert_int_equal(status, MFA_OK);
            assert_true(after == mode);
            for (int tensor = 0; n > 0 && tensor < REFERENCE_TENSORS; tensor++) {
                if (!(wanted >> tensor & 1) || !operands.tensors[tensor].memory.mapping)
                    continue;
                double *got = tensor_read(&operands.tensors[tensor]);
                if (memcmp(got, *reference_member(&expected, tensor), bytes_of(&operands, tensor)) != 0)
                    fail_msg("%s: %s differs in mode %d", text, tensor_name(tensor), n);
                free(got);
            }
            if (n == 0)
                assert_null(operands_collect(&operands, &expected));
            operands_close(&operands);
        }
    reference_close(&expected);
    inputs_close(&inputs);
    mfa_context_destroy(context);
}

static void test_results(void **state)
{
    (void)state;
    check("forward f32 b1 h2 q70 kv130 d64 causal", 1);
    check("forward f32 b1 h2 q65 kv66 d24 softcap5 mask_f32", 1);
    check("forward f32 b1 h4/2 q1 kv1100 d64", 1);
    check("forward f64 b1 h2 q40 kv41 d16 lower-9 upper3", 1);
    check("forward bf16 b1 h2 q70 kv130 d64 mask_bf16", 1);
    check("forward f16 b1 h2 q70 kv130 d64", 1);
    check("forward f16 b1 h2 q70 kv130 d64", 0x1p-14);
    check("forward f16 b1 h1 q1 kv300 d40 mask_f16", 0x1p-14);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_halves), cmocka_unit_test(test_threads),
                                       cmocka_unit_test(test_results)};
    plain = trapping = mfa_cpu_float_mode_get();
#if defined(__GLIBC__)
    if (feenableexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW) != -1)
        trapping = mfa_cpu_float_mode_get();
    fedisableexcept(FE_ALL_EXCEPT);
#endif
    if (trapping == plain)
        print_message("           exceptions that trap: not run, this system has none\n");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
