/* The table of docs/metal-kernels.md: what each row of src/metal/tiles.c costs. Barriers and products are counted while
 * the kernels run on metalsim; the rest follows from the row.
 *
 *     metal_table          prints it
 *     metal_table FILE     checks that FILE has it, as it is */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "metal/gpu.h"
#include "metal/run.h"
#include "metal/source.h"
#include "metal/tiles.h"
#include "support/operands.h"

#define FIXED_REGISTERS 24 /* addresses, strides, row sums, temporaries: a guess */

/* --- Counting ------------------------------------------------------------------------------------- */

/* Makes a kernel report, in place of the number of visited tiles, 65536 times the number of barriers plus the number
 * of matrix products of thread 0. */
static char *count_operations(enum mfa_metal_kernel kernel, char *text)
{
    static const char *const changes[][2] = {
        /* the texts, in their order, and their replacements */
        {"using namespace metal;\n", "using namespace metal;\n"
                                     "static uint counted;\n"
                                     "#define COUNT(weight) (counted += metalsim::lane()->index == 0 ? weight : 0)\n"
                                     "#define threadgroup_barrier(flags) (COUNT(65536), threadgroup_barrier(flags))\n"
                                     "#define simdgroup_multiply_accumulate(...) "
                                     "(COUNT(1), simdgroup_multiply_accumulate(__VA_ARGS__))\n"},
        {"kernel void", "kernel void"},
        {"\n{\n", "\n{\n    if (index == 0)\n        counted = 0;\n"},
        {"= uint(count);", "= counted + 0 * uint(count);"},
    };
    char *changed = NULL;
    size_t length;
    const char *from = text;
    if (!strstr(text, changes[3][0])) /* not a kernel that visits tiles */
        return text;
    FILE *memory = open_memstream(&changed, &length);
    for (size_t n = 0; memory && n < sizeof changes / sizeof *changes; n++) {
        const char *at = strstr(from, changes[n][0]);
        if (!at) {
            fprintf(stderr, "%s says no longer \"%s\", which is changed here\n", mfa_metal_source_function(kernel),
                    changes[n][0]);
            exit(2);
        }
        fprintf(memory, "%.*s%s", (int)(at - from), from, changes[n][1]);
        from = at + strlen(changes[n][0]);
    }
    if (!memory)
        return text;
    fputs(from, memory);
    fclose(memory);
    free(text);
    return changed;
}

/* A row of the tiles for its widest columns, all of them in use. */
struct line {
    enum mfa_metal_kernel kernel;
    struct metal_target target;
    struct mfa_key key;
    const struct mfa_metal_tile *tile;
};

static struct line line_of(enum mfa_metal_kernel kernel, struct metal_target target, int dtype, int dim)
{
    struct line line = {.kernel = kernel, .target = target};
    struct mfa_choice choice;
    mfa_problem problem;
    const int rows = kernel == MFA_METAL_DECODE_VECTOR ? 1 : kernel == MFA_METAL_DECODE ? 8 : 512;
    mfa_problem_init(&problem, 1, 1, 1, rows, 1, dim, dim);
    problem.dtype = dtype, problem.pass = kernel >= MFA_METAL_BACKWARD_DQ ? MFA_BACKWARD : MFA_FORWARD;
    mfa_problem_check(&problem, &problem);
    metal_choose(target, &problem, &choice);
    line.key = choice.key;
    line.tile = mfa_metal_tiles_find(kernel, &line.key);
    return line;
}

/* The operations of one threadgroup over this many blocks. attention_forward gets two threadgroups if 8 rows would be a
 * decode step; they run one after another, since they share the counter. */
static int64_t count_on_walk(const struct line *line, int tiles)
{
    const int keys_are_rows = line->kernel == MFA_METAL_BACKWARD_DKV;
    const int groups = line->kernel == MFA_METAL_FORWARD && line->tile->block_q == 8 ? 2 : 1;
    mfa_problem problem;
    struct inputs inputs;
    struct operands operands;
    struct reference forward = {0};
    struct metal_trace trace;
    mfa_problem_init(&problem, 1, 1, 1, line->tile->block_q * (keys_are_rows ? tiles : groups),
                     line->tile->block_kv * (keys_are_rows ? 1 : tiles), line->key.head_dim, line->key.value_dim);
    problem.dtype = line->key.dtype;
    inputs_open(&inputs, &problem, (struct variant){0}, 1, "count");
    operands_open(&operands, &inputs, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS);
    mfa_status status = metal_run(&operands, line->target, 1, &trace);
    operands_collect(&operands, &forward);
    if (status == MFA_OK && line->key.pass == MFA_BACKWARD) {
        operands_turn(&operands, DENSE, &forward);
        status = metal_run(&operands, line->target, 1, &trace);
    }
    if (status != MFA_OK)
        fprintf(stderr, "%s\n", mfa_last_error());
    reference_close(&forward);
    operands_close(&operands);
    inputs_close(&inputs);
    return status == MFA_OK ? trace.visited[line->kernel] / groups : 0;
}

/* --- The table ------------------------------------------------------------------------------------ */

struct cost {
    int products, registers; /* products of tiles */
    int64_t barriers, matrix_operations, device_bytes;
};

static struct cost cost_of(const struct line *line)
{
    const struct mfa_metal_tile *tile = line->tile;
    const int dim = line->key.head_dim, element = (int)mfa_dtype_size(line->key.dtype);
    /* rows that are loaded tile by tile */
    const int walked = line->kernel == MFA_METAL_BACKWARD_DKV ? tile->block_q : tile->block_kv;
    const int slice = dim / tile->split / 8, scores = walked / tile->key_groups / 8, cached = element == 2 ? 1 : 2;
    const int row_fragments = line->kernel == MFA_METAL_FORWARD ? tile->block_q / tile->row_groups / 8 : 1;
    const int64_t counted = count_on_walk(line, 3) - count_on_walk(line, 2);
    struct cost c = {.barriers = counted / 65536};
    c.matrix_operations = counted % 65536 * mfa_metal_tiles_threads(tile) / 32;
    switch (line->kernel) {
    case MFA_METAL_BACKWARD_DQ: /* S, dP, dQ; in registers Q dO dQ S dP */
        c.products = 3;
        c.registers = slice * (2 * cached + 2) + 4 * scores;
        break;
    case MFA_METAL_BACKWARD_DKV: /* S, dP, dV, dK; in registers K V dK dV S dP */
        c.products = 4;
        c.registers = slice * (2 * cached + 4) + 4 * scores;
        break;
    case MFA_METAL_DECODE_VECTOR: /* in registers Q O K V, in runs of four columns for each lane */
        c.products = 0;
        c.registers = dim / (dim > 128 ? 32 : dim > 64 ? 16 : 8) * (2 * tile->block_q + 2);
        break;
    default: /* S, O; in registers Q O S */
        c.products = 2;
        c.registers = slice * (cached + 2) + 2 * scores;
        break;
    }
    c.registers = row_fragments * c.registers + FIXED_REGISTERS;
    const int loads = line->kernel == MFA_METAL_BACKWARD_DKV && tile->shared ? 3 : 2;
    c.device_bytes = (int64_t)loads * walked * dim * element;
    return c;
}

static void write_line(FILE *to, const struct line *line)
{
    const struct mfa_metal_tile *tile = line->tile;
    const int dim = line->key.head_dim;
    int32_t bytes[2];
    mfa_metal_tiles_memory(line->kernel, tile, &line->key, bytes);
    const struct cost c = cost_of(line);
    const double least = (double)c.products * tile->block_q * tile->block_kv * dim / 512;
    char to_least[16] = "-";
    if (least > 0)
        snprintf(to_least, sizeof to_least, "%.2f", (double)c.matrix_operations / least);
    fprintf(to, "| `%s` | %s | %d | %d x %d | %d x %d x %d | %d | %lld | %lld | %s | %lld | %d |\n",
            mfa_metal_source_function(line->kernel), line->key.dtype == MFA_F32 ? "f32" : "f16, bf16", dim,
            tile->block_q, tile->block_kv, tile->row_groups, tile->split, tile->key_groups,
            bytes[0] + (tile->split > 1 ? bytes[1] : 0), (long long)c.barriers, (long long)c.matrix_operations,
            to_least, (long long)c.device_bytes, c.registers);
}

/* The lines of a target; after the first only where its tile is another one than `usual` has. */
static void write_target(FILE *to, const char *title, struct metal_target target, const struct metal_target *usual)
{
    static const enum mfa_metal_kernel kernels[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_DECODE_VECTOR,
                                                    MFA_METAL_BACKWARD_DQ, MFA_METAL_BACKWARD_DKV};
    fprintf(to,
            "\n%s:\n\n"
            "| kernel | dtype | columns to | block_q x block_kv | simdgroups: rows x slices x keys | "
            "threadgroup bytes | barriers | matrix products | to the least | device bytes | registers |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
            title);
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++)
        for (int dtype = MFA_F16; dtype >= MFA_F32; dtype--)
            for (int dim = 64; dim <= MFA_DIM_MAX; dim *= 2) {
                const struct line line = line_of(kernels[k], target, dtype, dim);
                if (!usual || memcmp(line.tile, line_of(kernels[k], *usual, dtype, dim).tile, sizeof *line.tile))
                    write_line(to, &line);
            }
}

static void write_table(FILE *to)
{
    const struct metal_target first = {.family = 7}, halved = {.family = 7, .halved = 1}, later = {.family = 9},
                              later_halved = {.family = 9, .halved = 1};
    write_target(to, "M1 and M2 (families 7 and 8), and later ones but for the next table", first, NULL);
    write_target(to, "M3 and later (family 9 and up)", later, &first);
    write_target(to, "Where a device runs no pipeline with so many threads", halved, &first);
    write_target(to, "The same, M3 and later", later_halved, &halved);
    fprintf(to, "\n");
}

/* Whether the file has the text between its two marks. */
static int check(const char *path, const char *text, size_t length)
{
    static const char mark[] = "<!-- made by metal_table -->\n";
    static char document[1 << 18];
    FILE *file = fopen(path, "r");
    const size_t size = file ? fread(document, 1, sizeof document - 1, file) : 0;
    if (file)
        fclose(file);
    document[size] = 0;
    const char *begin = strstr(document, mark);
    begin = begin ? begin + sizeof mark - 1 : document + size;
    if (strlen(begin) > length && !memcmp(begin, text, length) && !strncmp(begin + length, "<!-- end -->", 12)) {
        puts("1 passed, 0 failed");
        return 0;
    }
    printf("%s: its table is not what metal_table prints\n0 passed, 1 failed\n", path);
    return 1;
}

int main(int count, char **words)
{
    char *text = NULL;
    size_t length = 0;
    const struct gpu_settings settings = {.cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim",
                                          .unoptimised = 1};
    gpu_set(&settings);
    metal_rewrite = count_operations;
    FILE *memory = open_memstream(&text, &length);
    if (!memory)
        return 2;
    write_table(memory);
    fclose(memory);
    int status = 0;
    if (count > 1)
        status = check(words[1], text, length);
    else
        fputs(text, stdout);
    free(text);
    return status;
}
