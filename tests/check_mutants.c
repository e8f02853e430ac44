/* Whether each barrier of the kernels is needed, and its absence is found: every barrier is deleted or weakened, one at
 * a time (metalsim/mutants.h), and each such mutant must be caught on one of the problems below, by metalsim's checker
 * or by wrong results. A mutant that is never caught means that a barrier is redundant or a problem missing. So must
 * mistakes in the random numbers of dropout, in the block map, in the lengths of sequences, in codes of K and V and in
 * outputs in f32, which are made in each kernel that has them.
 * --shard K/N takes one mutant in N. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "metal/gpu.h"
#include "metal/run.h"
#include "metal/test_case.h"
#include "metalsim/error.h"
#include "metalsim/metalsim.h"
#include "metalsim/mutants.h"
#include "support/arguments.h"
#include "support/report.h"

/* Between them they compile every barrier: split and shared tiles, key groups, dbias summed over rows. Each kernel
 * visits several tiles, or a barrier at the end of a tile would have nothing to guard. */
static const struct {
    const char *text;
    int family;
    struct variant variant;
} problems[] = {
    {"both f32 b1 h1 q20 kv40 d264v512 causal mask_f32", 7, {.dbias_broadcast = ALONG_ROW}},
    {"both f16 b1 h2 q40 kv70 d16", 7, {0}},
    {"both f16 b1 h1 q33 kv70 d64", 9, {0}},
    {"both f16 b1 h2 q40 kv70 d136", 7, {0}},
    {"both f16 b1 h1 q3 kv150 d40", 7, {0}},
    {"both f16 b1 h1 q3 kv150 d256", 7, {0}},
    {"forward f16 b1 h2 q1 kv150 d64", 7, {0}},
    {"both f16 b1 h1 q100 kv130 d16 block_map_q48 block_map_kv48 dropout0.4 mask_f32", 7, {0}},
    {"forward f16 b1 h2 q1 kv1050 d64 block_map_q16 block_map_kv48 dropout0.4", 7, {0}},
    {"both f16 b4 h2 q100 kv130 d16 varlen_q total_q250 varlen_kv total_kv350 seqused_k leftpad_k bottom_right upper0",
     7,
     {0}},
    {"both f16 b8 h1 q40 kv100 d16 seqused_k leftpad_k", 7, {0}},
    {"forward f16 b4 h2 q1 kv600 d64 varlen_q total_q3 seqused_k leftpad_k bottom_right upper0 sinks", 7, {0}},
    {"forward f16 b2 h1 q20 kv150 d64 page_size24 kv_batch15", 7, {0}},
    {"forward f16 b2 h1 q20 kv150 d64 page_size64 kv_batch7", 7, {0}},
    {"forward f16 b2 h1 q1 kv150 d64 page_size24 kv_batch15 leftpad_k", 7, {0}},
    {"forward f16 b2 h1 q4 kv150 d64 page_size24 kv_batch15 leftpad_k", 7, {0}},
    {"forward f16 b4 h2 q4 kv600 d64 varlen_q total_q11 seqused_k leftpad_k bottom_right upper0 sinks", 7, {0}},
    {"forward f16 b1 h2 q20 kv150 d64 k_group32 v_group32 k_int4 v_int8", 7, {0}},
    {"forward f16 b1 h2 q4 kv150 d64 k_group32 v_group32 k_int4 v_int8", 7, {0}},
    {"forward f16 b1 h2 q1 kv150 d64 k_group32 v_group32 k_int4 v_int8", 7, {0}},
    {"forward f16 b2 h1 q20 kv150 d64 page_size16 kv_batch22 k_int8 v_e4m3", 7, {0}},
    {"forward f16 b2 h1 q4 kv150 d64 page_size24 kv_batch15 k_int8 v_e4m3", 7, {0}},
    {"forward f16 b2 h1 q1 kv150 d64 page_size24 kv_batch15 k_int8 v_e4m3", 7, {0}},
    {"both f16 b2 h2 q20 kv70 d16 varlen_q total_q30 varlen_kv total_kv100 out_f32", 7, {0}},
    {"forward f16 b1 h2 q3 kv1050 d64 out_f32", 7, {0}},
    {"forward f16 b1 h2 q3 kv150 d64 out_f32", 7, {0}},
    {"forward f16 b1 h2 q1 kv150 d64 out_f32", 7, {0}},
};

#define BIT(kernel) (UINT32_C(1) << MFA_METAL_##kernel)
#define QUERY_BLOCKS (BIT(FORWARD) | BIT(DECODE) | BIT(DECODE_VECTOR) | BIT(BACKWARD_DQ)) /* own these */
#define WALKS (QUERY_BLOCKS | BIT(BACKWARD_DKV))
#define PAGES (BIT(FORWARD) | BIT(DECODE) | BIT(DECODE_VECTOR))
#define READS_CODES PAGES
#define STORES (PAGES | BIT(MERGE) | BIT(BACKWARD_DQ) | BIT(BACKWARD_DKV)) /* O, dQ, dK and dV */
#define ANY UINT32_MAX

static const struct {
    const char *name, *right, *wrong;
    uint32_t kernels; /* in which it is made */
} mistakes[] = {
    {"the bound of dropout is half of it", ">= below", ">= below / 2", ANY},
    {"the words of a counter are swapped", "random.x[n / 2]", "random.x[3 - n / 2]", ANY},
    {"a block of the map that is hidden is visited", "(map.shown >> (block - (map.end - 32)) & 1u) == 0", "false",
     WALKS},
    {"a part of a block that the map hides is visible", "(r.shown >> (uint(t) / 16) & 1u) != 0", "true", ANY},
    {"all keys of an entry count", "if (args.has_seqused_k)", "if (false)", WALKS},
    {"keys begin in the padding", "seq.kv_row += padding", "seq.kv_row += 0", WALKS},
    {"packed queries begin in row 0", "(seq.q_row + i) * s.row", "i * s.row", WALKS},
    {"D and L of packed queries begin in row 0", "q_rows_of(args) + seq.q_row + i", "q_rows_of(args) + i",
     BIT(BACKWARD_DQ) | BIT(BACKWARD_DKV)},
    {"the band counts from the first query and key", "args.bottom_right ?", "false ?", WALKS},
    {"the page of a row is the next one", "mulhi(2 * n, source.multiplier)", "mulhi(2 * n + 64, source.multiplier)",
     PAGES},
    {"a row of a page is that of the first", "at.row * source.page.row_stride", "0 * source.page.row_stride", PAGES},
    {"rows of two pages are taken for a piece of one", "if (source.in_pieces)", "if (true)",
     BIT(FORWARD) | BIT(DECODE)},
    {"columns have the scale of the first group", "uint(column) * scales.divisor", "0u * scales.divisor", READS_CODES},
    {"rows have the scale of the first", "row * int(s.row_stride)", "0 * int(s.row_stride)", READS_CODES},
    {"pages have the scales of the first", "at.page * source.page.scales.page_stride", "0", READS_CODES},
    {"scales that are not given are read", "if (s.given)", "if (true)", READS_CODES},
    {"all codes of 4 bits are in low halves", "(uint(column) & MFA_KV_BLOCK / 2) / 4", "0", READS_CODES},
    {"blocks of codes of 4 bits are the first", "uint(column) / MFA_KV_BLOCK * HALF", "0", READS_CODES},
    {"an int8 is one more", "0x00800080u, 128", "0x00800080u, 127", READS_CODES},
    {"an e4m3 is half of it", "half(256)", "half(128)", READS_CODES},
    {"queries go on after the end of a sequence", "q.first >= q.seq.q_len * int(call.pack_gqa)", "false", QUERY_BLOCKS},
    {"keys go on after the end of a sequence", "k.first >= k.seq.kv_len", "false", BIT(BACKWARD_DKV)},
    {"merged rows have the first entry's sink", "row < rows.first + rows.count ? first", "row >= 0 ? 0", BIT(MERGE)},
    {"a row of no sequence is left out", "r.first - r.begin + r.end - r.last", "r.first - r.begin + r.end - r.last - 1",
     BIT(UNUSED_QUERIES) | BIT(UNUSED_KEYS)},
    {"outputs in f32 are rounded", "narrow_out(float x)\n{\n#if defined(OUT_F32)\n    return x;",
     "narrow_out(float x)\n{\n#if defined(OUT_F32)\n    return widen(narrow(x));", STORES},
    {"outputs in f32 lie in memory as those of the dtype", "typedef float out_storage;", "typedef storage out_storage;",
     STORES | BIT(BACKWARD_PREPROCESS) | BIT(UNUSED_QUERIES) | BIT(UNUSED_KEYS)},
};

enum { MIN_MUTANTS = 100 }; /* mutants, as long as no barrier is taken out of the kernels */

struct mutant {
    struct mutant *next;
    char name[METALSIM_MUTANT_NAME];
    int taken, runs, caught;
};

static struct arguments arguments;
static struct mutant *mutants;
static const char *cache;

static char *texts[MFA_METAL_KERNELS]; /* of the kernels that a problem runs */
static struct {
    enum mfa_metal_kernel kernel;
    const char *text;
} replacement;

/* Notes the text, and gives the one kernel that is under test its mutant. */
static char *rewrite(enum mfa_metal_kernel kernel, char *text)
{
    if (!texts[kernel])
        texts[kernel] = strdup(text);
    if (!replacement.text || kernel != replacement.kernel)
        return text;
    free(text);
    return strdup(replacement.text);
}

/* The mutant of this name, if it has appeared. */
static struct mutant *find(const char *name)
{
    struct mutant *m = mutants;
    while (m && strcmp(m->name, name) != 0)
        m = m->next;
    return m;
}

/* A mutant of a new name; whether it is the shard's goes by the order in which names appear. */
static struct mutant *add(const char *name)
{
    struct mutant *m = calloc(1, sizeof *m);
    if (!m)
        abort();
    snprintf(m->name, sizeof m->name, "%s", name);
    m->taken = arguments_take(&arguments);
    m->next = mutants;
    return mutants = m;
}

/* How a run ends, of the problem or of the layout test. */
enum verdict { GOOD, CAUGHT, BROKEN };
typedef enum verdict run_function(void *argument, const char **why);

/* The checker's messages mean that the mutant is caught; any other failure is a fault of the test. */
static enum verdict verdict_of(const char *why)
{
    static const char *const faults[] = {": race at",
                                         ": unwritten: ", ": divergence: ", ": out of bounds: ", "has to visit"};
    for (size_t n = 0; n < sizeof faults / sizeof *faults && why; n++)
        if (strstr(why, faults[n]))
            return CAUGHT;
    return why ? BROKEN : GOOD;
}

struct attempt {
    struct test_case test_case;
    struct metal_target target;
};

static enum verdict run_problem(void *argument, const char **why)
{
    const struct attempt *attempt = argument;
    const struct test_case *s = &attempt->test_case;
    struct reference results, truth = s->truth;
    *why = metal_test_case_run(s, attempt->target, DENSE, FORWARD_OUTPUTS | BACKWARD_OUTPUTS, 0, &results);
    enum verdict verdict = verdict_of(*why);
    for (int tensor = REFERENCE_O; tensor < REFERENCE_TENSORS; tensor++) {
        const double *got = *reference_member(&results, tensor), *right = *reference_member(&truth, tensor);
        const int64_t count = reference_count(&s->inputs.problem, tensor);
        for (int64_t n = 0; got && right && n < count && verdict == GOOD; n++)
            if (got[n] != right[n] && !(fabs(got[n] - right[n]) <= test_case_tolerance(s, tensor)))
                verdict = CAUGHT, *why = "wrong results";
    }
    reference_close(&results);
    return verdict;
}

/* The start-up test of the device's matrices is not part of a problem. */
static enum verdict run_layout_test(void *argument, const char **why)
{
    (void)argument;
    *why = metal_run_layout_test(7) ? NULL : metalsim_last_error();
    return verdict_of(*why);
}

/* Tries a mutant of a kernel's text. */
static void try_mutant(enum mfa_metal_kernel kernel, const char *mutated, struct mutant *m, run_function *run,
                       void *argument, int verbose)
{
    const char *why = NULL;
    replacement.kernel = kernel, replacement.text = mutated;
    const enum verdict verdict = run(argument, &why);
    replacement.text = NULL;
    m->runs++;
    m->caught = verdict == CAUGHT;
    if (verdict == BROKEN)
        report_fail("%s: %s", m->name, why);
    if (verbose && m->caught)
        printf("%s\n    %s\n", m->name, why);
}

/* Puts a mistake in the place of what is right, wherever that stands; NULL: nowhere. */
static char *make_mistake(const char *text, size_t n)
{
    const size_t length = strlen(mistakes[n].right);
    struct metalsim_text made = {0};
    const char *from = text, *at;
    while ((at = strstr(from, mistakes[n].right))) {
        metalsim_text_add_bytes(&made, from, (size_t)(at - from));
        metalsim_text_add(&made, "%s", mistakes[n].wrong);
        from = at + length;
    }
    if (from > text)
        metalsim_text_add(&made, "%s", from);
    return made.bytes;
}

/* Is it one to try? Not if another shard has it, or it was caught before. */
static int is_open(const struct mutant *m)
{
    return m->taken && !m->caught;
}

/* Does the compiler see a difference to `seen`, what it sees of the original? */
static int differs(const char *seen, const char *mutated)
{
    char *other = mutated ? metalsim_mutants_preprocess(mutated, cache) : NULL;
    const int differ = seen && other && strcmp(seen, other) != 0;
    if (mutated && (!seen || !other))
        report_fail("the compiler does not take %s", seen ? "a mutant" : "a kernel");
    free(other);
    return differ;
}

/* A preprocessor is started for each mutant that may be tried, and for no other: there are thousands. */
static void try_mutants(enum mfa_metal_kernel kernel, const char *text, run_function *run, void *argument, int verbose)
{
    const size_t count = metalsim_mutants_count(text);
    char name[METALSIM_MUTANT_NAME], *seen = metalsim_mutants_preprocess(text, cache);
    for (size_t n = 0; n < count; n++) {
        char *mutated = metalsim_mutants_make(text, n, name);
        struct mutant *m = find(name);
        if (!m)
            m = add(name);
        if (is_open(m) && differs(seen, mutated))
            try_mutant(kernel, mutated, m, run, argument, verbose);
        free(mutated);
    }
    for (size_t n = 0; n < sizeof mistakes / sizeof *mistakes; n++) {
        snprintf(name, sizeof name, "%s: %s", mfa_metal_source_function(kernel), mistakes[n].name);
        struct mutant *m = find(name);
        if ((mistakes[n].kernels >> kernel & 1) == 0 || (m && !is_open(m)))
            continue;
        char *mutated = make_mistake(text, n);
        if (differs(seen, mutated)) {
            if (!m)
                m = add(name);
            if (is_open(m))
                try_mutant(kernel, mutated, m, run, argument, verbose);
        }
        free(mutated);
    }
    free(seen);
}

/* Tries all mutants of all kernels that `run` runs; without a mutant it must pass. */
static void try_kernels(run_function *run, void *argument, const char *what, int verbose)
{
    const char *why = NULL;
    char *originals[MFA_METAL_KERNELS];
    memset(texts, 0, sizeof texts);
    if (run(argument, &why) == GOOD)
        report_pass();
    else
        report_fail("%s: %s, and no barrier was touched", what, why);
    memcpy(originals, texts, sizeof originals);
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++)
        if (originals[kernel])
            try_mutants((enum mfa_metal_kernel)kernel, originals[kernel], run, argument, verbose);
    for (int kernel = 0; kernel < MFA_METAL_KERNELS; kernel++)
        free(texts[kernel]);
}

static void try_problem(const char *text, int family, struct variant variant, uint64_t seed, int verbose)
{
    struct attempt attempt = {.target.family = family};
    struct one_case one;
    if (!case_parse(text, &one)) {
        report_fail("%s: %s", text, mfa_last_error());
        return;
    }
    test_case_open(&attempt.test_case, &one, variant, seed);
    try_kernels(run_problem, &attempt, text, verbose);
    test_case_close(&attempt.test_case);
}

static void report_mutants(void)
{
    int count = 0;
    while (mutants) {
        struct mutant *m = mutants;
        mutants = m->next, count++;
        if (m->caught)
            report_pass();
        else if (m->runs)
            report_fail("%s: not caught in any of %d runs", m->name, m->runs);
        else if (m->taken)
            report_fail("%s: no problem of the list compiles it", m->name);
        free(m);
    }
    if (count < MIN_MUTANTS)
        report_fail("%d mutants; there were %d, and a kernel or a pass may be left out", count, MIN_MUTANTS);
}

int main(int count, char **words)
{
    if (!arguments_parse(&arguments, count, words, NULL))
        return 2;
    report_begin("check_mutants", arguments.seed);
    cache = getenv("MFA_CACHE") ? getenv("MFA_CACHE") : "build/metalsim";
    if (!mfa_file_make_folder(cache)) {
        report_fail("the cache \"%s\" is no folder that can be written", cache);
        return report_end();
    }
    const struct gpu_settings settings = {
        .cache = cache, .checked = 1, .schedule = GPU_SHUFFLED, .seed = arguments.seed};
    gpu_set(&settings);
    metal_rewrite = rewrite;
    try_kernels(run_layout_test, NULL, "layout_test", arguments.verbose);
    for (size_t n = 0; n < sizeof problems / sizeof *problems; n++)
        try_problem(problems[n].text, problems[n].family, problems[n].variant, arguments.seed, arguments.verbose);
    report_mutants();
    return report_end();
}
