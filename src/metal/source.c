#include "metal/source.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "core/problem.h"

/* kernels/ and what it includes, as text. The build makes it (tools/embed.cmake); a plain compilation of the sources
 * goes without. */
static const struct file {
    const char *name, *text;
} files[] = {
#if defined(MFA_METAL_SOURCES)
#include MFA_METAL_SOURCES
#endif
    {NULL, NULL}};

_Static_assert(sizeof files / sizeof *files <= 33, "a bit for each file in a set of 32");

enum { FORWARD = 1 << MFA_FORWARD, BACKWARD = 1 << MFA_BACKWARD, BOTH = FORWARD | BACKWARD };

/* Sets of buffers. */
#define ONE(n) (UINT32_C(1) << (n))
#define OPERAND(name) ONE(MFA_METAL_BUFFER_OPERAND + MFA_OPERAND_##name)
#define PART(name) ONE(MFA_METAL_BUFFER_##name)
#define CALL PART(CALL)
#define QKV (OPERAND(q) | OPERAND(k) | OPERAND(v))
#define SCORE /* SCORE_BUFFERS of score.h */ \
    (OPERAND(mask) | PART(BLOCK_MASK) | OPERAND(slopes) | OPERAND(seed) | OPERAND(block_map))
#define INDEX /* INDEX_BUFFERS of sequence.h */                                                \
    (OPERAND(cu_seqlens_q) | OPERAND(cu_seqlens_k) | OPERAND(seqused_k) | OPERAND(leftpad_k) | \
     OPERAND(cache_batch_idx) | OPERAND(block_table))
#define SCALES (PART(K_SCALE) | PART(V_SCALE)) /* KV_BUFFERS of kv_source.h */
#define RESULTS (OPERAND(o) | OPERAND(lse) | OPERAND(o_low))
#define GRADIENTS (QKV | SCORE | OPERAND(d_o) | PART(D) | PART(L)) /* what every kernel of gradients reads */

static const struct entry {
    const char *function, *file;
    int passes;
    enum { NOTHING, MASK, ADDITIVE, VARLEN } needs; /* of the problem */
    uint32_t buffers;
} entries[MFA_METAL_KERNELS] = {
    [MFA_METAL_FORWARD] = {"attention_forward", "attention_forward", FORWARD, NOTHING,
                           CALL | INDEX | QKV | SCORE | RESULTS | OPERAND(sinks) | PART(PARTIALS)},
    [MFA_METAL_DECODE] = {"attention_decode", "attention_decode", FORWARD, NOTHING,
                          CALL | INDEX | QKV | SCORE | RESULTS | OPERAND(sinks) | PART(PARTIALS)},
    [MFA_METAL_DECODE_VECTOR] = {"attention_decode_vector", "attention_decode_vector", FORWARD, NOTHING,
                                 CALL | INDEX | QKV | SCORE | RESULTS | OPERAND(sinks) | PART(PARTIALS)},
    [MFA_METAL_MERGE] = {"attention_merge", "attention_merge", FORWARD, NOTHING,
                         CALL | INDEX | RESULTS | OPERAND(sinks) | PART(PARTIALS)},
    [MFA_METAL_BACKWARD_PREPROCESS] = {"backward_preprocess", "backward_preprocess", BACKWARD, NOTHING,
                                       CALL | RESULTS | OPERAND(d_o) | OPERAND(dlse) | PART(D) | PART(L)},
    [MFA_METAL_BACKWARD_DQ] = {"attention_backward_dq", "attention_backward_dq", BACKWARD, NOTHING,
                               CALL | INDEX | GRADIENTS | OPERAND(dq)},
    [MFA_METAL_BACKWARD_DKV] = {"attention_backward_dkv", "attention_backward_dkv", BACKWARD, NOTHING,
                                CALL | INDEX | GRADIENTS | OPERAND(dk) | OPERAND(dv)},
    [MFA_METAL_DBIAS] = {"attention_dbias", "attention_dbias", BACKWARD, ADDITIVE,
                         CALL | INDEX | GRADIENTS | OPERAND(dbias) | PART(PARTIALS)},
    [MFA_METAL_DBIAS_SUM] = {"attention_dbias_sum", "attention_dbias", BACKWARD, ADDITIVE,
                             CALL | OPERAND(dbias) | PART(PARTIALS)},
    [MFA_METAL_DSINKS] = {"attention_dsinks", "attention_dsinks", BACKWARD, NOTHING,
                          CALL | INDEX | OPERAND(sinks) | OPERAND(dsinks) | PART(D) | PART(L)},
    [MFA_METAL_BLOCK_MASK] = {"block_mask", "block_mask", BOTH, MASK, CALL | INDEX | OPERAND(mask) | PART(BLOCK_MASK)},
    [MFA_METAL_UNUSED_QUERIES] = {"unused_queries", "unused_rows", BOTH, VARLEN,
                                  CALL | INDEX | RESULTS | OPERAND(sinks) | OPERAND(dq)},
    [MFA_METAL_UNUSED_KEYS] = {"unused_keys", "unused_rows", BACKWARD, VARLEN,
                               CALL | INDEX | OPERAND(dk) | OPERAND(dv)},
    [MFA_METAL_LAYOUT_TEST] = {"layout_test", "layout_test", BOTH, NOTHING, PART(PARTIALS)},
};

const char *mfa_metal_source_function(enum mfa_metal_kernel kernel)
{
    return (unsigned)kernel < MFA_METAL_KERNELS ? entries[kernel].function : NULL;
}

int mfa_metal_source_buffer_of(int operand)
{
    return operand == MFA_OPERAND_k_scale   ? MFA_METAL_BUFFER_K_SCALE
           : operand == MFA_OPERAND_v_scale ? MFA_METAL_BUFFER_V_SCALE
                                            : MFA_METAL_BUFFER_OPERAND + operand;
}

int mfa_metal_source_operand_of(int buffer, int32_t pass)
{
    if (pass == MFA_FORWARD && buffer == MFA_METAL_BUFFER_K_SCALE)
        return MFA_OPERAND_k_scale;
    if (pass == MFA_FORWARD && buffer == MFA_METAL_BUFFER_V_SCALE)
        return MFA_OPERAND_v_scale;
    return buffer - MFA_METAL_BUFFER_OPERAND;
}

uint32_t mfa_metal_source_buffers(enum mfa_metal_kernel kernel, const struct mfa_key *key)
{
    const uint32_t buffers = entries[kernel].buffers;
    const int scaled = (key->k_type || key->v_type) && (buffers & OPERAND(k));
    return (key->features & MFA_FEATURE_VARLEN ? buffers : buffers & ~(uint32_t)INDEX) | (scaled ? SCALES : 0);
}

/* --- A growing text ------------------------------------------------------------------------------ */

struct text {
    char *bytes; /* NULL after running out of memory */
    size_t length, capacity;
};

static void append(struct text *text, const char *from, size_t length)
{
    if (!text->bytes)
        return;
    if (text->length + length >= text->capacity) {
        text->capacity = 2 * (text->length + length) + 1;
        char *bytes = realloc(text->bytes, text->capacity);
        if (!bytes)
            free(text->bytes);
        text->bytes = bytes;
        if (!bytes)
            return;
    }
    memcpy(text->bytes + text->length, from, length);
    text->length += length;
    text->bytes[text->length] = 0;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
append_line(struct text *text, const char *format, ...)
{
    char line[256];
    va_list values;
    va_start(values, format);
    const int length = vsnprintf(line, sizeof line - 1, format, values);
    va_end(values);
    line[length] = '\n';
    append(text, line, (size_t)length + 1);
}

/* --- Files and their includes --------------------------------------------------------------------- */

static int find_file(const char *name, size_t length)
{
    for (int n = 0; files[n].name; n++)
        if (strlen(files[n].name) == length && !memcmp(files[n].name, name, length))
            return n;
    return -1;
}

/* Appends a file, with the text of our files in place of their #include lines: each file once, so that no guards are
 * needed. Metal takes one text, without files; #line tells its compiler where each line is from. */
static void splice(struct text *text, int file, uint32_t *included)
{
    *included |= ONE(file);
    append_line(text, "#line 1 \"%s\"", files[file].name);
    int number = 1;
    for (const char *line = files[file].text; *line; number++) {
        static const char include[] = "#include \"";
        const size_t length = strcspn(line, "\n");
        if (!strncmp(line, include, sizeof include - 1)) {
            const char *name = line + sizeof include - 1;
            const int other = find_file(name, strcspn(name, "\""));
            if (other >= 0 && !(*included & ONE(other)))
                splice(text, other, included);
            append_line(text, "#line %d \"%s\"", number + 1, files[file].name);
        } else {
            append(text, line, length);
            append(text, "\n", 1);
        }
        line += length + (line[length] == '\n');
    }
}

/* --- Defines from the key ---------------------------------------------------------------------------- */

static void define_types(struct text *text, const struct mfa_key *key, int family)
{
    static const char *const dtypes[] = {"F32", "F16", "BF16"};
    static const char *const kv_types[] = {"SAME", "INT8", "E4M3", "E5M2", "INT4", "NF4"};
    append_line(text, "#define DTYPE_%s", dtypes[key->dtype]);
    append_line(text, "#define K_TYPE KV_%s", kv_types[key->k_type]);
    append_line(text, "#define V_TYPE KV_%s", kv_types[key->v_type]);
    if (family >= 9) /* M3 and later convert bfloat in one instruction; others' compilers emulate it slowly */
        append_line(text, "#define BF16_NATIVE");
#define FEATURE(name, ...)                  \
    if (key->features & MFA_FEATURE_##name) \
        append_line(text, "#define " #name);
#include "core/options.inc"
    if (key->features & MFA_FEATURE_MASK_ADDITIVE)
        append_line(text, "#define MASK_%s", dtypes[key->mask_dtype]);
}

static void define_tile(struct text *text, const struct mfa_key *key, enum mfa_metal_kernel kernel,
                        const struct mfa_metal_tile *tile)
{
    int32_t bytes[2];
    mfa_metal_tiles_memory(kernel, tile, key, bytes);
    append_line(text, "#define HEAD_DIM %d", mfa_metal_tiles_columns(tile, key->head_dim));
    append_line(text, "#define VALUE_DIM %d", mfa_metal_tiles_columns(tile, key->value_dim));
    append_line(text, "#define BLOCK_Q %d", tile->block_q);
    append_line(text, "#define BLOCK_KV %d", tile->block_kv);
    append_line(text, "#define ROW_GROUPS %d", tile->row_groups);
    append_line(text, "#define SPLIT %d", tile->split);
    append_line(text, "#define KEY_GROUPS %d", tile->key_groups);
    append_line(text, "#define THREADS %d", mfa_metal_tiles_threads(tile));
    append_line(text, "#define SHARED_TILE %d", tile->shared);
    append_line(text, "#define TILE_BYTES %d", bytes[0]);
    append_line(text, "#define EXCHANGE_BYTES %d", bytes[1]);
}

static mfa_status check(const struct mfa_key *key, enum mfa_metal_kernel kernel)
{
    if ((unsigned)kernel >= MFA_METAL_KERNELS)
        return mfa_fail(MFA_UNSUPPORTED, "kernel is %d; they are numbered from 0 to %d", (int)kernel,
                        MFA_METAL_KERNELS - 1);
    const struct entry *entry = &entries[kernel];
    const char *name = entry->function;
    const int additive = key->features & MFA_FEATURE_MASK_ADDITIVE;
    const int masked = additive || (key->features & MFA_FEATURE_MASK_BOOL);
    if (!mfa_pass_name(key->pass) || !(entry->passes & 1 << key->pass))
        return mfa_fail(MFA_UNSUPPORTED, "the key's pass is %d; %s is not a kernel of it", key->pass, name);
    if (key->dtype < 0 || key->dtype > MFA_BF16)
        return mfa_fail(MFA_UNSUPPORTED, "the key's dtype is %d; %s exists for f32, f16 and bf16", key->dtype, name);
    if (additive && (key->mask_dtype < 0 || key->mask_dtype > MFA_BF16))
        return mfa_fail(MFA_UNSUPPORTED, "the key's mask_dtype is %d; %s exists for f32, f16 and bf16", key->mask_dtype,
                        name);
    if (key->head_dim < 1 || key->head_dim > MFA_DIM_MAX || key->value_dim < 1 || key->value_dim > MFA_DIM_MAX)
        return mfa_fail(MFA_UNSUPPORTED, "the key's head_dim is %d and its value_dim %d; %s exists for 1 to %d",
                        key->head_dim, key->value_dim, name, MFA_DIM_MAX);
    if (key->pass == MFA_BACKWARD && (key->features & MFA_FEATURE_PAGED))
        return mfa_fail(MFA_UNSUPPORTED, "the key has pages; %s exists for none in the backward pass", name);
    if (!mfa_kv_type_name(key->k_type) || !mfa_kv_type_name(key->v_type))
        return mfa_fail(MFA_UNSUPPORTED, "the key's k_type is %d and its v_type %d; %s exists for 0 to %d", key->k_type,
                        key->v_type, name, MFA_KV_NF4);
    if (key->pass == MFA_BACKWARD && (key->k_type || key->v_type))
        return mfa_fail(MFA_UNSUPPORTED,
                        "the key's k_type is %s and its v_type %s; %s exists for same in the backward "
                        "pass",
                        mfa_kv_type_name(key->k_type), mfa_kv_type_name(key->v_type), name);
    if (entry->needs == VARLEN && !(key->features & MFA_FEATURE_VARLEN))
        return mfa_fail(MFA_UNSUPPORTED, "the key has no varlen; %s is for those with it", name);
    if ((entry->needs == ADDITIVE && !additive) || (entry->needs == MASK && !masked))
        return mfa_fail(MFA_UNSUPPORTED, "the key has %s; %s is for those with %s", masked ? "a bool mask" : "no mask",
                        name, entry->needs == ADDITIVE ? "an additive one" : "one");
    if (!mfa_metal_tiles_family_of(key))
        return mfa_fail(MFA_UNSUPPORTED, "the key's machine is %.*s; %s exists for apple7 and apple9",
                        (int)sizeof key->machine, key->machine, name);
    return MFA_OK;
}

/* The number of the kernel's file, or -1. */
static int file_of(enum mfa_metal_kernel kernel)
{
    char name[64];
    const int length = snprintf(name, sizeof name, "metal/kernels/%s.metal", entries[kernel].file);
    return find_file(name, (size_t)length);
}

static mfa_status write_text(const struct mfa_key *key, enum mfa_metal_kernel kernel, int with_test,
                             const char *defines, char **result)
{
    const mfa_status status = check(key, kernel);
    if (status != MFA_OK)
        return status;
    const int file = file_of(kernel), test = with_test ? file_of(MFA_METAL_LAYOUT_TEST) : -1;
    if (file < 0 || (with_test && test < 0))
        return mfa_fail(MFA_UNAVAILABLE, "this library was built without the text of %s", entries[kernel].file);
    struct text text = {.bytes = malloc(1 << 16), .capacity = 1 << 16};
    uint32_t included = 0;
    if (defines)
        append(&text, defines, strlen(defines));
    append_line(&text, "#define KERNEL_%s", entries[kernel].function); /* a file may have two */
    define_types(&text, key, mfa_metal_tiles_family_of(key));
    const struct mfa_metal_tile *tile = mfa_metal_tiles_find(kernel, key);
    if (tile)
        define_tile(&text, key, kernel, tile);
    splice(&text, file, &included);
    if (test >= 0)
        splice(&text, test, &included);
    if (!text.bytes)
        return mfa_fail(MFA_OUT_OF_MEMORY, "no memory for the text of %s", entries[kernel].file);
    *result = text.bytes;
    return MFA_OK;
}

mfa_status mfa_metal_source_write(const struct mfa_key *key, enum mfa_metal_kernel kernel, const char *defines,
                                  char **text)
{
    return write_text(key, kernel, 0, defines, text);
}

mfa_status mfa_metal_source_write_with_test(const struct mfa_key *key, enum mfa_metal_kernel kernel, char **text)
{
    return write_text(key, kernel, 1, NULL, text);
}
