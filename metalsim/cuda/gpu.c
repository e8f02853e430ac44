/* tests/metal/gpu.h on an NVIDIA GPU: programs are compiled by nvcc through include/metal_stdlib, once for each
 * text, and kept in the cache folder. Without a GPU, METALSIM_CUDA_ARCH (as "sm_90") says what to compile for; then
 * nothing runs. NVCC is the compiler, if it is not found as nvcc. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "metal/gpu.h"

static struct gpu_settings settings;
static char reason[4096];

void gpu_set(const struct gpu_settings *given)
{
    settings = *given;
}

static const char *failed(const char *what, cudaError_t error)
{
    snprintf(reason, sizeof reason, "%s: %s", what, cudaGetErrorString(error));
    return reason;
}

/* --- Memory --------------------------------------------------------------------------------------- */

/* What is on the device between begin and end. */
static struct copy {
    struct copy *next;
    const void *base;
    void *there;
} *copies;

void gpu_begin(struct gpu_buffer *buffers, int count)
{
    for (int n = 0; n < count; n++) {
        const struct gpu_buffer *b = &buffers[n];
        struct copy *copy = b->base ? malloc(sizeof *copy) : NULL;
        if (!copy)
            continue;
        *copy = (struct copy){copies, b->base, NULL};
        copies = copy;
        /* Scratch memory is not set, so that initcheck sees who reads it too early. */
        if (cudaMalloc(&copy->there, b->length ? b->length : 1) == cudaSuccess && !b->scratch)
            cudaMemcpy(copy->there, b->base, b->length, cudaMemcpyHostToDevice);
    }
}

void gpu_end(struct gpu_buffer *buffers, int count)
{
    for (int n = 0; n < count; n++)
        for (struct copy **at = &copies; *at; at = &(*at)->next)
            if ((*at)->base == buffers[n].base) {
                struct copy *copy = *at;
                if (buffers[n].written && !buffers[n].scratch)
                    cudaMemcpy(buffers[n].base, copy->there, buffers[n].length, cudaMemcpyDeviceToHost);
                cudaFree(copy->there);
                *at = copy->next;
                free(copy);
                break;
            }
}

static void *find_copy(const void *base)
{
    for (struct copy *copy = copies; copy; copy = copy->next)
        if (copy->base == base)
            return copy->there;
    return NULL;
}

/* --- Programs ------------------------------------------------------------------------------------- */

/* What each kernel is called with: C the call, LENGTHS those of sequence.h, B(n) buffer n, KV those of
 * kv_source.h, SCORE those of score.h, then positions. */
static const char *arguments_of(const char *function)
{
    static const char *const table[][2] = {
        {"attention_forward",
         "C LENGTHS, B(6), KV, SCORE, B(10), B(11), B(18), B(20), B(2), B(5), GROUP, INDEX, SIMDGROUP, LANE"},
        {"attention_decode",
         "C LENGTHS, B(6), KV, SCORE, B(10), B(11), B(18), B(20), B(2), B(5), GROUP, INDEX, SIMDGROUP, LANE"},
        {"attention_decode_vector",
         "C LENGTHS, B(6), KV, SCORE, B(10), B(11), B(18), B(20), B(2), B(5), GROUP, INDEX, SIMDGROUP, LANE"},
        {"attention_merge", "C LENGTHS, B(10), B(11), B(18), B(20), B(2), GROUP, SIMDGROUP, LANE"},
        {"backward_preprocess", "C, B(10), B(11), B(12), B(13), B(18), B(3), B(4), GROUP, SIMDGROUP, LANE"},
        {"attention_backward_dq",
         "C LENGTHS, B(6), KV, SCORE, B(12), B(14), B(3), B(4), B(5), GROUP, INDEX, SIMDGROUP, LANE"},
        {"attention_backward_dkv",
         "C LENGTHS, B(6), KV, SCORE, B(12), B(15), B(16), B(3), B(4), B(5), GROUP, INDEX, SIMDGROUP, LANE"},
        {"attention_dbias", "C LENGTHS, B(6), KV, SCORE, B(12), B(17), B(2), B(3), B(4), GROUP, SIMDGROUP, LANE"},
        {"attention_dbias_sum", "C, B(17), B(2), GROUP, INDEX"},
        {"attention_dsinks", "C LENGTHS, B(20), B(21), B(3), B(4), GROUP, INDEX, SIMDGROUP, LANE"},
        {"block_mask", "C LENGTHS, B(9), B(1), GROUP, SIMDGROUP, LANE"},
        {"unused_queries", "C LENGTHS, B(10), B(11), B(14), B(18), B(20), GROUP, SIMDGROUP, LANE"},
        {"unused_keys", "C LENGTHS, B(15), B(16), GROUP, SIMDGROUP, LANE"},
        {"layout_test", "B(2), LANE"},
        {"narrow_test", "B(1), B(2), B(3), POSITION"},
    };
    for (size_t n = 0; n < sizeof table / sizeof *table; n++)
        if (!strcmp(table[n][0], function))
            return table[n][1];
    return NULL;
}

/* The entry that CUDA launches, which calls the kernel. Kernels with tiles define how many THREADS they have, up to
 * 512, and must leave registers for all of them. */
static const char entry[] =
    "\n#include \"core/args.h\"\n#include \"metal/kernels/contract.h\"\n"
    "struct any_pointer {\n    void *at;\n    template <class T> __device__ operator T *() const { return (T *)at; "
    "}\n};\n"
    "struct any_buffers {\n    void *at[%d];\n};\n"
    "#if defined(THREADS)\n#define BOUNDS __launch_bounds__(THREADS)\n#else\n#define BOUNDS\n#endif\n"
    "extern \"C\" __global__ void BOUNDS entry(const __grid_constant__ mfa_metal_call call,\n"
    "    const __grid_constant__ any_buffers buffers)\n{\n"
    "#define C call\n#define B(n) any_pointer{buffers.at[n]}\n"
    "#if defined(ALIBI)\n#define SLOPES , B(19)\n#else\n#define SLOPES\n#endif\n"
    "#if defined(DROPOUT)\n#define SEED , B(22)\n#else\n#define SEED\n#endif\n"
    "#if defined(BLOCK_MAP)\n#define MAP , B(23)\n#else\n#define MAP\n#endif\n"
    "#if defined(PAGED)\n#define TABLE , B(29)\n#else\n#define TABLE\n#endif\n"
    "#if defined(VARLEN)\n#define LENGTHS , B(24), B(25), B(26), B(27), B(28) TABLE\n#else\n#define LENGTHS\n#endif\n"
    "#if defined(CODES)\n#define KV B(7), B(8), B(15), B(16)\n#else\n#define KV B(7), B(8)\n#endif\n"
    "#define SCORE B(9), B(1) SLOPES SEED MAP\n"
    "#define GROUP blockIdx.x\n#define INDEX threadIdx.x\n#define SIMDGROUP (threadIdx.x / 32)\n"
    "#define LANE (threadIdx.x %% 32)\n#define POSITION (blockIdx.x * blockDim.x + threadIdx.x)\n"
    "    %s(%s);\n}\n";

static int write_file(const char *path, const char *text, const char *function)
{
    FILE *file = fopen(path, "w");
    if (!file)
        return 0;
    fputs(text, file);
    fprintf(file, entry, MFA_METAL_BUFFERS, function, arguments_of(function));
    return !fclose(file);
}

/* "sm_90"; NULL: there is no GPU. */
static const char *architecture(void)
{
    static char name[16];
    struct cudaDeviceProp gpu;
    const char *given = getenv("METALSIM_CUDA_ARCH");
    if (given)
        return given;
    if (cudaGetDeviceProperties(&gpu, 0) != cudaSuccess)
        return NULL;
    snprintf(name, sizeof name, "sm_%d%d", gpu.major, gpu.minor);
    return name;
}

/* Compiles into a file of this process, which then takes its place: others may be at the same program. */
static const char *compile(const struct gpu_launch *launch, const char *path)
{
    char source[512], object[512], log[512], command[4096];
    const char *compiler = getenv("NVCC"), *arch = architecture();
    snprintf(source, sizeof source, "%s.%d.cu", path, (int)getpid());
    snprintf(object, sizeof object, "%s.%d.cubin", path, (int)getpid());
    snprintf(log, sizeof log, "%s.%d.log", path, (int)getpid());
    if (!arch || !write_file(source, launch->text, launch->function)) {
        snprintf(reason, sizeof reason, arch ? "%s cannot be written" : "no NVIDIA GPU to compile %s for", source);
        return reason;
    }
    snprintf(command, sizeof command,
             "'%s' -cubin -arch=%s -std=c++17 -lineinfo -diag-suppress 1097,177,550 -I'%s' -I'%s' '%s' -o '%s' "
             ">'%s' 2>&1",
             compiler ? compiler : "nvcc", arch, METALSIM_CUDA_INCLUDE, MFA_SOURCES, source, object, log);
    if (system(command) || rename(object, path)) {
        snprintf(reason, sizeof reason, "nvcc did not compile %s: see %s", source, log);
        return reason;
    }
    unlink(source);
    unlink(log);
    return NULL;
}

static struct program {
    struct program *next;
    uint64_t hash;
    cudaKernel_t kernel;
} *programs;

static const char *find_kernel(const struct gpu_launch *launch, cudaKernel_t *kernel)
{
    uint64_t hash = mfa_hash_bytes(MFA_HASH_EMPTY, launch->text, strlen(launch->text));
    hash = mfa_hash_bytes(hash, launch->function, strlen(launch->function) + 1);
    for (struct program *p = programs; p; p = p->next)
        if (p->hash == hash) {
            *kernel = p->kernel;
            return NULL;
        }
    char path[400];
    mkdir(settings.cache, 0700);
    snprintf(path, sizeof path, "%s/%016llx.cubin", settings.cache, (unsigned long long)hash);
    const char *why = access(path, R_OK) ? compile(launch, path) : NULL;
    if (why || getenv("METALSIM_CUDA_ARCH"))
        return why;
    cudaLibrary_t library;
    cudaError_t error = cudaLibraryLoadFromFile(&library, path, NULL, NULL, 0, NULL, NULL, 0);
    if (error == cudaSuccess)
        error = cudaLibraryGetKernel(kernel, library, "entry");
    if (error != cudaSuccess)
        return failed(path, error);
    struct program *program = malloc(sizeof *program);
    if (program) {
        *program = (struct program){programs, hash, *kernel};
        programs = program;
    }
    return NULL;
}

const char *gpu_run(const struct gpu_launch *launch)
{
    cudaKernel_t kernel;
    struct {
        void *at[MFA_METAL_BUFFERS];
    } buffers = {{NULL}};
    struct mfa_metal_call call = launch->call;
    const char *why = find_kernel(launch, &kernel);
    if (why || getenv("METALSIM_CUDA_ARCH"))
        return why;
    for (int n = 0; n < MFA_METAL_BUFFERS; n++)
        if (launch->buffers[n].base)
            buffers.at[n] = (char *)find_copy(launch->buffers[n].base) + launch->buffers[n].offset;
    void *arguments[] = {&call, &buffers};
    const dim3 grid = {(unsigned)launch->groups, 1, 1}, block = {(unsigned)launch->threads, 1, 1};
    cudaError_t error = cudaLaunchKernel((const void *)kernel, grid, block, arguments, 0, 0);
    if (error == cudaSuccess)
        error = cudaDeviceSynchronize();
    return error == cudaSuccess ? NULL : failed(launch->function, error);
}
