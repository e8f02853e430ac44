/* The runtime itself, called through casts of its own: it executes messages, and finds misuse for which a Mac would end
 * the process. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "metal_host/objc.h"
#include "runtime/runtime.h"
#include "support/report.h"

/* --- A program, from text to results -------------------------------------------------------------- */

static const char source[] = "#include <metal_stdlib>\n"
                             "using namespace metal;\n"
                             "kernel void add(device float *x [[buffer(0)]], constant float &step [[buffer(3)]],\n"
                             "                uint i [[thread_position_in_grid]]) { x[i] += step; }\n"
                             "kernel void negate(device float *x [[buffer(0)]], uint i [[thread_position_in_grid]])\n"
                             "{ x[i] = -x[i]; }\n"
                             "kernel void hold(device float *x [[buffer(0)]], threadgroup float *set TG_ARG(1))\n"
                             "{ THREADGROUP_ARRAY(float, own, 4096); own[0] = set[0] = 1.0f; x[0] = own[0]; }\n"
                             "kernel void overflow() { THREADGROUP_ARRAY(float, own, 8193); own[0] = 1.0f; }\n";

static void *pool;
static id device, queue, library, buffer;
static float *x;

static id text(const char *of)
{
    return SEND(id, (id, SEL, const char *), objc_getClass("NSString"), sel_registerName("stringWithUTF8String:"), of);
}

static id make_pipeline(const char *name)
{
    id error = NULL;
    id function = SEND(id, (id, SEL, id), library, sel_registerName("newFunctionWithName:"), text(name));
    id pipeline = SEND(id, (id, SEL, id, id *), device, sel_registerName("newComputePipelineStateWithFunction:error:"),
                       function, &error);
    DO(function, "release");
    return pipeline;
}

static int open_all(void **state)
{
    (void)state;
    id error = NULL;
    struct metalsim_settings settings;
    metalsim_runtime_clear();
    metalsim_runtime_defaults(&settings);
    metalsim_runtime_set(&settings);
    pool = objc_autoreleasePoolPush();
    device = MTLCreateSystemDefaultDevice();
    queue = GET(device, "newCommandQueue");
    library = SEND(id, (id, SEL, id, id, id *), device, sel_registerName("newLibraryWithSource:options:error:"),
                   text(source), NULL, &error);
    buffer = SEND(id, (id, SEL, unsigned long, unsigned long), device, sel_registerName("newBufferWithLength:options:"),
                  64UL, 0UL);
    x = SEND(void *, (id, SEL), buffer, sel_registerName("contents"));
    for (int i = 0; i < 16; i++)
        x[i] = (float)i;
    return !library || !queue;
}

static int close_all(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    struct metalsim_counts counts;
    char leaks[1024];
    metalsim_runtime_defaults(&settings);
    metalsim_runtime_set(&settings);
    id held[] = {buffer, library, queue, device};
    for (int i = 0; i < 4; i++)
        DO(held[i], "release");
    objc_autoreleasePoolPop(pool);
    metalsim_runtime_count(&counts);
    if (metalsim_runtime_leaks(leaks, sizeof leaks) || counts.pools)
        print_error("leaks: %s, %d pools\n", leaks, (int)counts.pools);
    return counts.objects || counts.pools;
}

/* The number of findings that have these words; the others are printed. */
static int found(const char *words)
{
    int count = 0;
    for (size_t i = 0; i < metalsim_runtime_findings(); i++)
        if (strstr(metalsim_runtime_finding(i), words))
            count++;
        else
            print_error("%s\n", metalsim_runtime_finding(i));
    metalsim_runtime_clear();
    return count;
}

static void add(id encoder, float step, unsigned long threads)
{
    SEND(void, (id, SEL, id, unsigned long, unsigned long), encoder, sel_registerName("setBuffer:offset:atIndex:"),
         buffer, 0UL, 0UL);
    SEND(void, (id, SEL, const void *, unsigned long, unsigned long), encoder,
         sel_registerName("setBytes:length:atIndex:"), &step, sizeof step, 3UL);
    SEND(void, (id, SEL, struct size, struct size), encoder,
         sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), (struct size){16 / threads, 1, 1},
         (struct size){threads, 1, 1});
}

static id begin(id commands, const char *function, unsigned long type)
{
    id encoder =
        SEND(id, (id, SEL, unsigned long), commands, sel_registerName("computeCommandEncoderWithDispatchType:"), type);
    id pipeline = make_pipeline(function);
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), pipeline);
    DO(pipeline, "release");
    return encoder;
}

static void test_runs(void **state)
{
    (void)state;
    struct metalsim_counts counts;
    id commands = GET(queue, "commandBuffer"), encoder = begin(commands, "add", 0);
    add(encoder, 1, 4);
    add(encoder, 2, 8);
    DO(encoder, "endEncoding");
    DO(commands, "commit");
    assert_true(x[1] == 1.0F); /* nobody has waited */
    assert_int_equal(NUMBER(commands, "status"), 2);
    DO(commands, "waitUntilCompleted");
    assert_int_equal(NUMBER(commands, "status"), 4);
    assert_null(GET(commands, "error"));
    for (int i = 0; i < 16; i++)
        assert_true(x[i] == (float)(i + 3));
    const struct metalsim_recorded *last = metalsim_runtime_dispatch(0);
    float step;
    memcpy(&step, last->buffers[3].bytes, sizeof step);
    assert_string_equal(last->function, "add");
    assert_int_equal(last->threadgroups[0], 2);
    assert_int_equal(last->threadgroups[2], 1);
    assert_int_equal(last->threads[0], 8);
    assert_ptr_equal(last->buffers[0].buffer, buffer);
    assert_int_equal(last->buffers[0].length, 64);
    assert_true(step == 2.0F);
    metalsim_runtime_count(&counts);
    assert_int_equal(counts.sources, 1);
    assert_int_equal(counts.functions, 1);
    assert_int_equal(counts.buffers, 1);
    assert_int_equal(counts.command_buffers, 1);
    assert_int_equal(counts.encoders, 1);
    assert_int_equal(counts.dispatches, 2);
    assert_int_equal(counts.commits, 1);
    assert_int_equal(counts.waits, 1);
    assert_int_equal(metalsim_runtime_findings(), 0);
}

/* Without a barrier, a concurrent encoder's dispatches come in another order. */
static void test_concurrent(void **state)
{
    (void)state;
    for (int barrier = 0; barrier < 2; barrier++) {
        id commands = GET(queue, "commandBuffer"), encoder = begin(commands, "add", 1),
           negate = make_pipeline("negate");
        x[3] = 1;
        add(encoder, 2, 8);
        if (barrier)
            SEND(void, (id, SEL, unsigned long), encoder, sel_registerName("memoryBarrierWithScope:"), 1UL);
        SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), negate);
        add(encoder, 0, 8);
        DO(encoder, "endEncoding");
        DO(commands, "commit");
        DO(commands, "waitUntilCompleted");
        DO(negate, "release");
        assert_true(x[3] == (barrier ? -3.0F : 1.0F));
    }
}

/* --- What it finds -------------------------------------------------------------------------------- */

static void test_messages(void **state)
{
    (void)state;
    assert_null(GET(NULL, "newCommandQueue"));
    assert_null(GET(device, "newComandQueue"));
    assert_int_equal(found("unrecognized selector -[MTLDevice newComandQueue]"), 1);
    assert_null(objc_getClass("MTLDevice"));
    id options = GET(objc_getClass("MTLCompileOptions"), "new");
    SEND(void, (id, SEL, long), options, sel_registerName("setMathMode:"), 2L);
    assert_int_equal(found("unrecognized selector -[MTLCompileOptions setMathMode:], as of macOS 14"), 1);
    assert_false(
        SEND(bool, (id, SEL, SEL), options, sel_registerName("respondsToSelector:"), sel_registerName("setMathMode:")));
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.macos = 15;
    metalsim_runtime_set(&settings);
    assert_true(
        SEND(bool, (id, SEL, SEL), options, sel_registerName("respondsToSelector:"), sel_registerName("setMathMode:")));
    SEND(void, (id, SEL, long), options, sel_registerName("setMathMode:"), 2L);
    assert_int_equal(metalsim_runtime_findings(), 0);
    DO(options, "release");
    DO(options, "release");
    assert_int_equal(found("is released once too often"), 1);
}

static void test_memory(void **state)
{
    (void)state;
    char leaks[1024];
    id options = GET(objc_getClass("MTLCompileOptions"), "new");
    metalsim_runtime_leaks(leaks, sizeof leaks);
    assert_non_null(strstr(leaks, "MTLCompileOptions (1 references)"));
    DO(options, "release");
    void *inner = objc_autoreleasePoolPush();
    const char *words = SEND(const char *, (id, SEL), text("gone with the pool"), sel_registerName("UTF8String"));
    assert_string_equal(words, "gone with the pool");
    objc_autoreleasePoolPop(inner);
    objc_autoreleasePoolPop(inner);
    assert_int_equal(found("an autorelease pool is popped that is not this thread's"), 1);
}

static void test_limits(void **state)
{
    (void)state;
    char bytes[8192] = {0};
    id commands = GET(queue, "commandBuffer"), encoder = GET(commands, "computeCommandEncoder");
    SEL set_buffer = sel_registerName("setBuffer:offset:atIndex:"),
        set_bytes = sel_registerName("setBytes:length:atIndex:");
    SEL set_threadgroup = sel_registerName("setThreadgroupMemoryLength:atIndex:");
    add(encoder, 1, 4);
    assert_int_equal(found("no pipeline state is set"), 1);
    SEND(void, (id, SEL, id, unsigned long, unsigned long), encoder, set_buffer, buffer, 0UL, 31UL);
    assert_int_equal(found("the index is 31; it must be 0 to 30"), 1);
    SEND(void, (id, SEL, id, unsigned long, unsigned long), encoder, set_buffer, buffer, 65UL, 0UL);
    assert_int_equal(found("the offset is 65; the buffer has 64 bytes"), 1);
    SEND(void, (id, SEL, id, unsigned long, unsigned long), encoder, set_buffer, queue, 0UL, 0UL);
    assert_int_equal(found("is a MTLCommandQueue; it must be a MTLBuffer"), 1);
    SEND(void, (id, SEL, const void *, unsigned long, unsigned long), encoder, set_bytes, bytes, 4097UL, 0UL);
    assert_int_equal(found("the length is 4097; it must be 1 to 4096"), 1);
    SEND(void, (id, SEL, unsigned long, unsigned long), encoder, set_threadgroup, 24UL, 0UL);
    assert_int_equal(found("the length is 24; it must be a multiple of 16"), 1);
    id pipeline = make_pipeline("add");
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), pipeline);
    DO(pipeline, "release");
    SEND(void, (id, SEL, unsigned long, unsigned long), encoder, set_threadgroup, 32768UL, 0UL);
    SEND(void, (id, SEL, unsigned long, unsigned long), encoder, set_threadgroup, 16400UL, 1UL);
    add(encoder, 1, 4);
    assert_int_equal(found("threadgroup memory"), 0); /* lengths count where the kernel has an argument */
    pipeline = make_pipeline("hold");
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), pipeline);
    DO(pipeline, "release");
    add(encoder, 1, 1);
    assert_int_equal(found("hold has 32784 bytes of threadgroup memory, declared and set; there are 32768"), 1);
    pipeline = make_pipeline("add");
    SEND(void, (id, SEL, id), encoder, sel_registerName("setComputePipelineState:"), pipeline);
    DO(pipeline, "release");
    assert_null(make_pipeline("overflow"));
    SEND(void, (id, SEL, struct size, struct size), encoder,
         sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), (struct size){1, 1, 1},
         (struct size){1025, 1, 1});
    assert_int_equal(found("a threadgroup has 1025 threads; add allows 1 to 1024"), 1);
    DO(encoder, "endEncoding");
}

static void test_order(void **state)
{
    (void)state;
    id commands = GET(queue, "commandBuffer"), encoder = GET(commands, "computeCommandEncoder");
    assert_null(GET(commands, "computeCommandEncoder"));
    assert_int_equal(found("A command encoder is already encoding"), 1);
    DO(commands, "waitUntilCompleted");
    assert_int_equal(found("not committed"), 1);
    DO(encoder, "endEncoding");
    add(encoder, 1, 4);
    assert_int_equal(found("the encoder has ended"), 3);
    DO(commands, "commit");
    DO(commands, "commit");
    assert_int_equal(found("already committed"), 1);
    void *inner = objc_autoreleasePoolPush();
    GET(GET(queue, "commandBuffer"), "computeCommandEncoder");
    objc_autoreleasePoolPop(inner);
    assert_int_equal(found("is released with"), 2); /* the encoder, without endEncoding, and its command buffer */
}

/* A kernel that reads beside its buffer. */
static void test_checked(void **state)
{
    (void)state;
    struct metalsim_settings settings;
    metalsim_runtime_defaults(&settings);
    settings.checked = 1;
    metalsim_runtime_set(&settings);
    id error = NULL, plain = library;
    library = SEND(id, (id, SEL, id, id, id *), device, sel_registerName("newLibraryWithSource:options:error:"),
                   text(source), NULL, &error);
    id commands = GET(queue, "commandBuffer"), encoder = begin(commands, "add", 0);
    SEND(void, (id, SEL, struct size, struct size), encoder,
         sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), (struct size){1, 1, 1},
         (struct size){1, 1, 1}); /* with nothing bound */
    add(encoder, 1, 4);
    SEND(void, (id, SEL, struct size, struct size), encoder,
         sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), (struct size){1, 1, 1},
         (struct size){17, 1, 1});
    DO(encoder, "endEncoding");
    DO(commands, "commit");
    DO(commands, "waitUntilCompleted");
    assert_int_equal(NUMBER(commands, "status"), 5);
    assert_int_equal(found("nothing is bound at index"), 1);
    commands = GET(queue, "commandBuffer"), encoder = begin(commands, "add", 0);
    add(encoder, 1, 4);
    SEND(void, (id, SEL, struct size, struct size), encoder,
         sel_registerName("dispatchThreadgroups:threadsPerThreadgroup:"), (struct size){1, 1, 1},
         (struct size){17, 1, 1});
    DO(encoder, "endEncoding");
    DO(commands, "commit");
    DO(commands, "waitUntilCompleted");
    assert_int_equal(NUMBER(commands, "status"), 5);
    assert_int_equal(found("out of bounds"), 1);
    DO(library, "release");
    library = plain;
}

static void on_queue(void *context)
{
    assert_true(metalsim_runtime_on_queue(context));
    dispatch_sync_f(context, context, on_queue);
}

static void test_dispatch_queue(void **state)
{
    (void)state;
    void *serial = dispatch_queue_create("serial", NULL);
    assert_false(metalsim_runtime_on_queue(serial));
    dispatch_sync_f(serial, serial, on_queue);
    assert_false(metalsim_runtime_on_queue(serial));
    assert_int_equal(found("it would wait for ever"), 1);
    metalsim_runtime_release(serial);
}

/* As on a Mac. */
static void test_aborts(void **state)
{
    (void)state;
    const pid_t process = fork();
    assert_true(process >= 0);
    if (process == 0) {
        struct metalsim_settings settings;
        metalsim_runtime_defaults(&settings);
        settings.aborts = 1;
        metalsim_runtime_set(&settings);
        GET(device, "newComandQueue");
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(process, &status, 0), process);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGABRT);
}

static void test_system(void **state)
{
    (void)state;
    char build[32];
    size_t length = sizeof build;
    assert_int_equal(sysctlbyname("kern.osversion", build, &length, NULL, 0), 0);
    assert_string_equal(build, "23A344");
    assert_int_equal(length, sizeof "23A344");
    assert_int_equal(sysctlbyname("kern.ostype", build, &length, NULL, 0), -1);
    id all = MTLCopyAllDevices();
    assert_string_equal(
        SEND(const char *, (id, SEL), GET(GET(all, "firstObject"), "name"), sel_registerName("UTF8String")),
        "Apple M1 (metalsim)");
    DO(all, "release");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, open_all, close_all)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_runs),  TEST(test_concurrent), TEST(test_messages),       TEST(test_memory), TEST(test_limits),
        TEST(test_order), TEST(test_checked),    TEST(test_dispatch_queue), TEST(test_system), TEST(test_aborts),
    };
    report_begin("test_runtime", 0);
    return report_group(sizeof tests / sizeof *tests, cmocka_run_group_tests(tests, NULL, NULL));
}
