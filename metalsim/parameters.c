#include "parameters.h"

#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "include/metalsim/abi.h"
#include "metalsim.h"

static const char *const positions[] = {
    "thread_position_in_grid",        "threads_per_grid",
    "thread_position_in_threadgroup", "threads_per_threadgroup",
    "thread_index_in_threadgroup",    "threadgroup_position_in_grid",
    "threadgroups_per_grid",          "thread_index_in_simdgroup",
    "threads_per_simdgroup",          "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
};

struct span {
    const char *begin, *end;
};

static int word_char(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static struct span trim(struct span s)
{
    while (s.begin < s.end && isspace((unsigned char)*s.begin))
        s.begin++;
    while (s.begin < s.end && isspace((unsigned char)s.end[-1]))
        s.end--;
    return s;
}

static int is(struct span s, const char *word)
{
    size_t length = strlen(word);
    return (size_t)(s.end - s.begin) == length && !memcmp(s.begin, word, length);
}

/* The next word of the text that is this one; NULL: none. */
static const char *find_word(const char *text, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length)
        if ((at == text || !word_char(at[-1])) && !word_char(at[length]))
            return at;
    return NULL;
}

/* Past the bracket that closes the one at `at`; NULL: there is none. */
static const char *past_bracket(const char *at, const char *end)
{
    int depth = 0;
    for (; at < end; at++) {
        depth += *at == '(' || *at == '[' || *at == '{';
        depth -= *at == ')' || *at == ']' || *at == '}';
        if (!depth)
            return at + 1;
    }
    return NULL;
}

/* The content of the next [[...]] in s, which is cut off from it; 0: there is none. */
static int take_attribute(struct span *s, struct span *attribute)
{
    for (const char *at = s->begin; at + 1 < s->end; at++) {
        if (at[0] != '[' || at[1] != '[')
            continue;
        const char *past = past_bracket(at, s->end);
        if (!past || past - at < 4)
            return 0;
        *attribute = trim((struct span){at + 2, past - 2});
        s->begin = past;
        return 1;
    }
    return 0;
}

/* attribute is name(n): 1 and n, which is UINT32_MAX if it is no plain number. */
static int numbered(struct span attribute, const char *name, unsigned *n)
{
    size_t length = strlen(name);
    if ((size_t)(attribute.end - attribute.begin) <= length || memcmp(attribute.begin, name, length))
        return 0;
    struct span rest = trim((struct span){attribute.begin + length, attribute.end});
    if (rest.begin == rest.end || *rest.begin != '(' || rest.end[-1] != ')')
        return 0;
    rest = trim((struct span){rest.begin + 1, rest.end - 1});
    char *past;
    *n = (unsigned)strtoul(rest.begin, &past, 0);
    if (!isdigit((unsigned char)*rest.begin) || past != rest.end)
        *n = UINT32_MAX;
    return 1;
}

struct kernel {
    struct span name;
    unsigned count, arrays, max_threads;
    uint32_t used[2]; /* indices, of buffers and of threadgroup memory */
};

static int refuse(const struct kernel *kernel, struct span what, const char *why, struct metalsim_text *error)
{
    metalsim_text_add(error, "kernel %.*s: \"%.*s\": %s\n", (int)(kernel->name.end - kernel->name.begin),
                      kernel->name.begin, (int)(what.end - what.begin), what.begin, why);
    return 0;
}

/* The name of a parameter: the last word before its attributes. */
static struct span parameter_name(struct span parameter)
{
    struct span name = parameter;
    for (const char *at = parameter.begin; at + 1 < parameter.end; at++)
        if (at[0] == '[' && at[1] == '[') {
            name.end = at;
            break;
        }
    name = trim(name);
    name.begin = name.end;
    while (name.begin > parameter.begin && word_char(name.begin[-1]))
        name.begin--;
    return name;
}

/* Adds one parameter to the table and to the call. */
static int write_parameter(struct kernel *kernel, struct span parameter, struct metalsim_text *table,
                           struct metalsim_text *call, struct metalsim_text *error)
{
    struct span rest = parameter, attribute, name = parameter_name(parameter);
    if (!take_attribute(&rest, &attribute))
        return refuse(kernel, parameter, "it has no attribute such as [[buffer(0)]]", error);
    unsigned index = 0, i = kernel->count++;
    int threadgroup = numbered(attribute, "threadgroup", &index);
    const char *comma = i ? ", " : "";
    if (threadgroup || numbered(attribute, "buffer", &index)) {
        if (index >= METALSIM_BUFFERS)
            return refuse(kernel, parameter, "its index must be a number from 0 to 30", error);
        if (kernel->used[threadgroup] >> index & 1)
            return refuse(kernel, parameter, "another parameter has this index", error);
        kernel->used[threadgroup] |= UINT32_C(1) << index;
        metalsim_text_add(table,
                          "    {\"%.*s\", %s, %u, metalsim::reach<S::argument<%u>>::where == metalsim::constant_space, "
                          "metalsim::reach<S::argument<%u>>::bytes},\n",
                          (int)(name.end - name.begin), name.begin,
                          threadgroup ? "METALSIM_THREADGROUP" : "METALSIM_BUFFER", index, i, i);
        metalsim_text_add(call, "%smetalsim::%s<S::argument<%u>>(%s[%u])", comma,
                          threadgroup ? "threadgroup_memory" : "buffer", i, threadgroup ? "local" : "buffers", index);
        return 1;
    }
    for (size_t p = 0; p < sizeof positions / sizeof *positions; p++)
        if (is(attribute, positions[p])) {
            metalsim_text_add(table, "    {\"%.*s\", METALSIM_POSITION, 0, 0, 0},\n", (int)(name.end - name.begin),
                              name.begin);
            metalsim_text_add(call, "%smetalsim::position<S::argument<%u>>::from(metalsim::%s())", comma, i,
                              positions[p]);
            return 1;
        }
    return refuse(kernel, parameter, "its attribute is none that metalsim knows for a compute kernel", error);
}

/* The parameters between the brackets. */
static int write_parameters(struct kernel *kernel, struct span list, struct metalsim_text *table,
                            struct metalsim_text *call, struct metalsim_text *error)
{
    const char *begin = list.begin;
    int depth = 0;
    for (const char *at = list.begin; at <= list.end; at++) {
        if (at < list.end) {
            depth += *at == '(' || *at == '[' || *at == '<';
            depth -= *at == ')' || *at == ']' || *at == '>';
            if (*at != ',' || depth)
                continue;
        }
        struct span parameter = trim((struct span){begin, at});
        if (parameter.begin < parameter.end && !write_parameter(kernel, parameter, table, call, error))
            return 0;
        begin = at + 1;
    }
    return 1;
}

/* --- Arrays in threadgroup memory ----------------------------------------------------------------- */

/* What THREADGROUP_ARRAY becomes in the text that is read here. */
static const char *const array_word = "metalsim_threadgroup_array";

/* Adds the array whose (type, name, count) are in `list` to the table. */
static int write_array(struct kernel *kernel, struct span list, int depth, struct metalsim_text *table,
                       struct metalsim_text *error)
{
    if (depth != 1)
        return refuse(kernel, list, "a THREADGROUP_ARRAY must be in the kernel's outermost scope", error);
    if (kernel->arrays == METALSIM_ARRAYS)
        return refuse(kernel, list, "a kernel has up to 31 of THREADGROUP_ARRAY", error);
    const char *first = strchr(list.begin, ','), *second = strchr(first + 1, ','); /* the macro has three arguments */
    struct span type = trim((struct span){list.begin, first}), name = trim((struct span){first + 1, second});
    struct span count = trim((struct span){second + 1, list.end});
    metalsim_text_add(table, "    {\"%.*s\", METALSIM_ARRAY, %u, 0, sizeof(%.*s) * (%.*s)},\n",
                      (int)(name.end - name.begin), name.begin, kernel->arrays++, (int)(type.end - type.begin),
                      type.begin, (int)(count.end - count.begin), count.begin);
    kernel->count++;
    return 1;
}

/* The arrays that the kernel's body declares, which ends at `end`. */
static int write_arrays(struct kernel *kernel, struct span body, struct metalsim_text *table,
                        struct metalsim_text *error)
{
    int depth = 0;
    const size_t length = strlen(array_word);
    for (const char *at = body.begin; at < body.end; at++) {
        depth += *at == '{';
        depth -= *at == '}';
        if (word_char(at[-1]) || strncmp(at, array_word, length) || at[length] != '(')
            continue;
        const char *open = at + length, *past = past_bracket(open, body.end);
        if (!past)
            return refuse(kernel, (struct span){at, open}, "its bracket does not close", error);
        if (!write_array(kernel, (struct span){open + 1, past - 1}, depth, table, error))
            return 0;
        at = past - 1;
    }
    return 1;
}

/* --- Kernels -------------------------------------------------------------------------------------- */

static const char *const threads_attribute = "max_total_threads_per_threadgroup";

/* Reads that attribute, which may stand anywhere in a kernel's head. */
static int read_threads(struct span head, struct kernel *kernel, struct metalsim_text *error)
{
    const char *at = find_word(head.begin, threads_attribute);
    if (!at || at >= head.end)
        return 1;
    const char *open = strchr(at, '('), *past = open ? past_bracket(open, head.end) : NULL;
    if (past && numbered((struct span){at, past}, threads_attribute, &kernel->max_threads) && kernel->max_threads > 0 &&
        kernel->max_threads <= METALSIM_THREADS_MAX)
        return 1;
    metalsim_text_add(error, "kernel %.*s: %s must be a number from 1 to %d\n",
                      (int)(kernel->name.end - kernel->name.begin), kernel->name.begin, threads_attribute,
                      METALSIM_THREADS_MAX);
    return 0;
}

/* The bracket that opens the list of parameters, and the name before it; NULL: there is none. */
static const char *find_list(const char *at, struct kernel *kernel)
{
    const char *open = at;
    while ((open = strchr(open, '('))) {
        const char *before = open++;
        while (before > at && isspace((unsigned char)before[-1]))
            before--;
        kernel->name = (struct span){before, before};
        while (kernel->name.begin > at && word_char(kernel->name.begin[-1]))
            kernel->name.begin--;
        if (!is(kernel->name, threads_attribute))
            return open - 1;
    }
    return NULL;
}

/* The kernel's body, of which the head ends at `at`; empty if the kernel is only declared. */
static struct span find_body(const char *at)
{
    const char *end = at + strlen(at), *open = trim((struct span){at, end}).begin;
    const char *past = *open == '{' ? past_bracket(open, end) : NULL;
    return past ? (struct span){open, past} : (struct span){at, at};
}

/* The kernel whose head begins at `head` and goes on behind the word "kernel"; *at moves past its body. */
static int write_kernel(const char *head, const char **at, struct kernel *kernel, struct metalsim_text *code,
                        struct metalsim_text *error)
{
    const char *open = find_list(*at, kernel), *close = open ? past_bracket(open, *at + strlen(*at)) : NULL;
    if (!close) {
        metalsim_text_add(error, "a kernel's list of parameters does not end\n");
        return 0;
    }
    if (!read_threads((struct span){head, open}, kernel, error))
        return 0;
    struct metalsim_text table = {0}, call = {0};
    const char *name = kernel->name.begin;
    int length = (int)(kernel->name.end - name);
    const struct span body = find_body(close);
    int fine = write_parameters(kernel, (struct span){open + 1, close - 1}, &table, &call, error) &&
               write_arrays(kernel, body, &table, error);
    if (fine)
        metalsim_text_add(code,
                          "namespace metalsim_of_%.*s {\n"
                          "typedef metalsim::signature<decltype(::%.*s)> S;\n"
                          "const metalsim_parameter parameters[] = {\n%s    {nullptr, 0, 0, 0, 0}};\n"
                          "METALSIM_UNWATCHED void enter(void *const *buffers, void *const *local)\n{\n"
                          "    (void)buffers, (void)local;\n    ::%.*s(%s);\n}\n}\n",
                          length, name, length, name, table.bytes ? table.bytes : "", length, name,
                          call.bytes ? call.bytes : "");
    free(table.bytes);
    free(call.bytes);
    *at = body.end;
    return fine;
}

int metalsim_parameters_write(const char *text, struct metalsim_text *code, struct metalsim_text *error)
{
    struct metalsim_text entries = {0};
    unsigned count = 0, arrays = 0;
    const char *at = text;
    while ((at = find_word(at, "kernel"))) {
        struct kernel kernel = {.name = {NULL, NULL}};
        const char *head = at;
        while (head > text && head[-1] != ';' && head[-1] != '}')
            head--;
        at += strlen("kernel");
        if (!write_kernel(head, &at, &kernel, code, error)) {
            free(entries.bytes);
            return 0;
        }
        int length = (int)(kernel.name.end - kernel.name.begin);
        metalsim_text_add(&entries, "    {\"%.*s\", metalsim_of_%.*s::enter, metalsim_of_%.*s::parameters, %u, %u},\n",
                          length, kernel.name.begin, length, kernel.name.begin, length, kernel.name.begin, kernel.count,
                          kernel.max_threads);
        count++;
        arrays += kernel.arrays;
    }
    for (at = text; (at = find_word(at, array_word)); at += strlen(array_word))
        arrays--;
    if (arrays) {
        metalsim_text_add(error, "a THREADGROUP_ARRAY is outside of a kernel\n");
        free(entries.bytes);
        return 0;
    }
    metalsim_text_add(
        code,
        "static const metalsim_entry metalsim_entries[] = {\n%s    {nullptr, nullptr, nullptr, 0, 0}};\n"
        "extern \"C\" __attribute__((visibility(\"hidden\"))) const char __ehdr_start[], _end[];\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) const metalsim_object metalsim_exports = {\n"
        "    &metalsim_functions, metalsim_entries, %u, __ehdr_start, _end};\n",
        entries.bytes ? entries.bytes : "", count);
    free(entries.bytes);
    return 1;
}
