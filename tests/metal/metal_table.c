/* The table of docs/metal-kernels.md: what each row of src/metal/tiles.c costs.
 *
 *     metal_table          prints it
 *     metal_table FILE     checks that FILE has it, as it is */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/problem.h"
#include "metal/source.h"
#include "metal/tiles.h"

#define FIXED_REGISTERS 24 /* addresses, strides, row sums, temporaries: a guess */

struct cost {
    int barriers, products, registers;
    int64_t matrix_operations, device_bytes;
};

/* For the widest columns of a row, all of them in use. `walked`: the rows that are staged tile by tile. */
static struct cost cost_of(enum mfa_metal_kernel kernel, const struct mfa_metal_tile *tile, int dim, int element)
{
    const int walked = kernel == MFA_METAL_BACKWARD_DKV ? tile->block_q : tile->block_kv;
    const int slice = dim / tile->split / 8, scores = walked / tile->key_groups / 8, cached = element == 2 ? 1 : 2;
    const int simdgroups = mfa_metal_tiles_threads(tile) / 32;
    struct cost c = {.barriers = 2 + (tile->split > 1)};
    switch (kernel) {
    case MFA_METAL_BACKWARD_DQ: /* S, dP, dQ; in registers Q dO dQ S dP */
        c.products = 3, c.barriers += 2 * tile->shared;
        c.registers = slice * (2 * cached + 2) + 4 * scores;
        break;
    case MFA_METAL_BACKWARD_DKV: /* S, dP, dV, dK; in registers K V dK dV S dP */
        c.products = 4, c.barriers += 4 * tile->shared;
        c.registers = slice * (2 * cached + 4) + 4 * scores;
        break;
    default: /* S, O; in registers Q O S */
        c.products = 2, c.barriers += tile->shared;
        c.registers = slice * (cached + 2) + 2 * scores;
    }
    c.registers += FIXED_REGISTERS;
    c.matrix_operations = (int64_t)simdgroups * c.products * scores * slice;
    const int staged = kernel == MFA_METAL_BACKWARD_DKV && tile->shared ? 3 : 2;
    c.device_bytes = (int64_t)staged * walked * dim * element;
    return c;
}

static const struct mfa_metal_tile *tile_of(enum mfa_metal_kernel kernel, int family, struct mfa_key *key)
{
    snprintf(key->machine, sizeof key->machine, "apple%d", family);
    return mfa_metal_tiles_find(kernel, key);
}

static void write_row(FILE *to, enum mfa_metal_kernel kernel, const struct mfa_metal_tile *tile,
                      const struct mfa_key *key)
{
    const int dim = key->head_dim;
    int32_t bytes[2];
    mfa_metal_tiles_memory(kernel, tile, key, bytes);
    const struct cost c = cost_of(kernel, tile, dim, (int)mfa_dtype_size(key->dtype));
    const double least = (double)c.products * tile->block_q * tile->block_kv * dim / 512;
    fprintf(to, "| `%s` | %s | %d | %d x %d | %d x %d x %d | %d | %d | %lld | %.2f | %lld | %d |\n",
            mfa_metal_source_function(kernel), key->dtype == MFA_F32 ? "f32" : "f16, bf16", dim, tile->block_q,
            tile->block_kv, tile->row_groups, tile->split, tile->key_groups,
            bytes[0] + (tile->split > 1 ? bytes[1] : 0), c.barriers, (long long)c.matrix_operations,
            (double)c.matrix_operations / least, (long long)c.device_bytes, c.registers);
}

/* The rows of a family; those of a later one only where they are its own. */
static void write_family(FILE *to, int family)
{
    static const enum mfa_metal_kernel kernels[] = {MFA_METAL_FORWARD, MFA_METAL_DECODE, MFA_METAL_BACKWARD_DQ,
                                                    MFA_METAL_BACKWARD_DKV};
    fprintf(to, "| kernel | dtype | columns to | block_q x block_kv | simdgroups: rows x slices x keys | "
                "threadgroup bytes | barriers | matrix products | to the least | device bytes | registers |\n"
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++)
        for (int dtype = MFA_F16; dtype >= MFA_F32; dtype--)
            for (int dim = 64; dim <= MFA_DIM_MAX; dim *= 2) {
                struct mfa_key key = {.dtype = dtype, .head_dim = dim, .value_dim = dim};
                const struct mfa_metal_tile *first = tile_of(kernels[k], 7, &key);
                const struct mfa_metal_tile *tile = tile_of(kernels[k], family, &key);
                if (family == 7 || memcmp(tile, first, sizeof *tile))
                    write_row(to, kernels[k], tile, &key);
            }
}

static void write_table(FILE *to)
{
    fprintf(to, "\nM1 and M2 (families 7 and 8), and later ones but for the next table:\n\n");
    write_family(to, 7);
    fprintf(to, "\nM3 and later (family 9 and up):\n\n");
    write_family(to, 9);
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
