/* Compiles the Metal kernels that a model needs into a folder, to be shipped as `kernels` beside libmfa, so that users'
 * processes do not compile them: GPU code for this GPU and build of macOS, and, where Apple's Metal compiler is
 * installed, libraries for any. On the CPU there is nothing to do: its kernels are part of libmfa.
 *
 *     cc examples/ship_kernels.c -Iinclude -Lbuild/release -Wl,-rpath,$PWD/build/release -lmfa -o ship_kernels
 *     ./ship_kernels kernels
 */
#include <dirent.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "mfa.h"

/* One problem for each kernel: long prompts, short ones, decode steps, training. Lengths are not part of a kernel,
 * except that few queries have kernels of their own. */
static const char *const problems[] = {
    "forward f16 b1 h32/8 q512 kv512 d128 causal",
    "forward f16 b1 h32/8 q4 kv512 d128 causal bottom_right",
    "forward f16 b1 h32/8 q1 kv512 d128",
    "backward f16 b1 h32/8 q512 kv512 d128 causal",
};
enum { PROBLEMS = sizeof problems / sizeof *problems, TEXTS_MAX = 16 };

extern char **environ;

static void check(mfa_status status)
{
    if (status == MFA_OK)
        return;
    fprintf(stderr, "%s: %s\n", mfa_status_name(status), mfa_last_error());
    exit(1);
}

static mfa_problem problem_on(mfa_device device, int n)
{
    mfa_problem problem;
    check(mfa_problem_parse(problems[n], &problem));
    problem.device = device;
    return problem;
}

/* Runs a program; 0 if it was found and succeeded. */
static int run(const char *const *words)
{
    pid_t child;
    int status = 1;
    if (posix_spawnp(&child, words[0], NULL, NULL, (char *const *)words, environ) != 0)
        return 1;
    while (waitpid(child, &status, 0) < 0)
        ;
    return status;
}

/* The mfa_compiler of Apple's developer tools: the texts of a kernel into a library that serves any Mac. */
static int32_t apple_compiler(const char *const *texts, int32_t count, const char *library, void *argument)
{
    const char *words[7 + TEXTS_MAX + 1] = {"xcrun", "metal", "-std=metal3.1", "-fno-fast-math", "-o", library};
    (void)argument;
    if (count > TEXTS_MAX)
        return 1;
    for (int32_t n = 0; n < count; n++)
        words[6 + n] = texts[n];
    return run(words) != 0;
}

static int has_apple_compiler(void)
{
    /* xcode-select comes first: without developer tools xcrun may open a window that offers to install them. */
    static const char *const tools[] = {"xcode-select", "-p", NULL};
    static const char *const metal[] = {"xcrun", "metal", "--version", NULL};
    return run(tools) == 0 && run(metal) == 0;
}

/* How many files are in the folder, which need not exist; prints their names if `print`. */
static int count_files(const char *folder, int print)
{
    int count = 0;
    DIR *files = opendir(folder);
    for (struct dirent *file; files && (file = readdir(files));) {
        if (file->d_name[0] == '.')
            continue;
        count++;
        if (print)
            printf("    %s\n", file->d_name);
    }
    if (files)
        closedir(files);
    return count;
}

static void fail(const char *sentence)
{
    fprintf(stderr, "%s\n", sentence);
    exit(1);
}

int main(int count, char **words)
{
    const char *folder = count > 1 ? words[1] : "kernels";
    const int before = count_files(folder, 0);
    mfa_context *context;
    check(mfa_context_create(NULL, &context));

    for (int n = 0; n < PROBLEMS; n++) {
        const mfa_problem problem = problem_on(MFA_DEVICE_CPU, n);
        check(mfa_precompile(context, &problem, folder, NULL, NULL));
    }
    if (count_files(folder, 0) != before)
        fail("a kernel of the CPU was written, which should be part of libmfa");
    printf("CPU: %d problems, whose kernels are part of libmfa: there is nothing to do\n", PROBLEMS);

    const mfa_problem first = problem_on(MFA_DEVICE_METAL, 0);
    const mfa_status metal = mfa_problem_supported(context, &first);
    if (metal == MFA_UNAVAILABLE) {
        printf("Metal: %s: no kernels can be compiled here\n", mfa_last_error());
        mfa_context_destroy(context);
        return 0;
    }
    check(metal);

    const mfa_compiler compiler = has_apple_compiler() ? apple_compiler : NULL;
    for (int n = 0; n < PROBLEMS; n++) {
        const mfa_problem problem = problem_on(MFA_DEVICE_METAL, n);
        printf("Metal: %s\n", problems[n]);
        check(mfa_precompile(context, &problem, folder, compiler, NULL));
    }
    mfa_context_destroy(context);
    printf("%s has kernels for this GPU and build of macOS%s:\n", folder,
           compiler ? ", and .metallib files for any" : " only, as Apple's Metal compiler was not found");
    const int left = count_files(folder, 1);

    /* What looks for kernels there finds all, and compiles and writes none. */
    const mfa_context_options options = {.size = sizeof options, .cache = folder};
    check(mfa_context_create(&options, &context));
    for (int n = 0; n < PROBLEMS; n++) {
        const mfa_problem problem = problem_on(MFA_DEVICE_METAL, n);
        mfa_plan *plan;
        check(mfa_plan_create(context, &problem, &plan));
        mfa_plan_destroy(plan);
    }
    mfa_context_destroy(context);
    if (left == 0 || count_files(folder, 0) != left)
        fail("the kernels of these problems should be in the folder, and were not found there");
    return 0;
}
