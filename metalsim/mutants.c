#include "mutants.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "error.h"
#include "library.h"

/* A barrier in the text: name(flags). */
struct barrier {
    const char *begin, *open, *end; /* of the name, of the bracket, past the closing one */
    int line, column;
    int threadgroup;
};

/* Where a reader of the text is. */
struct reader {
    const char *at;
    int line, column; /* by #line */
    const char *file; /* what follows its quotation mark */
    int file_length;
};

static int word_char(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static void pass(struct reader *r, const char *to)
{
    for (; r->at < to; r->at++) {
        r->line += *r->at == '\n';
        r->column = *r->at == '\n' ? 1 : r->column + 1;
    }
}

/* At a #: takes over what a #line says. */
static void read_directive(struct reader *r)
{
    int line, read = 0;
    const char *end = r->at + strcspn(r->at, "\n"), *quote = memchr(r->at, '"', (size_t)(end - r->at));
    if (sscanf(r->at, "# line %d%n", &line, &read) == 1 || sscanf(r->at, "#line %d%n", &line, &read) == 1) {
        r->line = line - 1; /* of the line after this one */
        if (quote) {
            r->file = quote + 1;
            r->file_length = (int)strcspn(quote + 1, "\"\n");
        }
    }
    pass(r, r->at + 1);
}

/* Past a comment or a string, if one begins here. */
static int skip(struct reader *r)
{
    const char *end = NULL;
    if (r->at[0] == '/' && r->at[1] == '/') {
        end = r->at + strcspn(r->at, "\n");
    } else if (r->at[0] == '/' && r->at[1] == '*') {
        end = strstr(r->at + 2, "*/");
        end = end ? end + 2 : r->at + strlen(r->at);
    } else if (*r->at == '"') {
        end = r->at + 1 + strcspn(r->at + 1, "\"\n");
        end += *end == '"';
    }
    if (end)
        pass(r, end);
    return end != NULL;
}

/* Is this word at the reader, followed by a bracket? */
static int is_call(const char *at, const char *word, struct barrier *b)
{
    size_t length = strlen(word);
    if (strncmp(at, word, length))
        return 0;
    b->begin = at;
    b->open = at + length + strspn(at + length, " \t\n");
    if (*b->open != '(')
        return 0;
    b->end = strchr(b->open, ')');
    if (b->end)
        b->end++;
    return b->end != NULL;
}

/* The next barrier; 0: there is none. The reader stands behind it. */
static int next_barrier(struct reader *r, struct barrier *b)
{
    int word = 0; /* within one */
    while (*r->at) {
        if (skip(r)) {
            word = 0;
            continue;
        }
        if (*r->at == '#') {
            read_directive(r);
            continue;
        }
        b->threadgroup = !word && is_call(r->at, "threadgroup_barrier", b);
        if (b->threadgroup || (!word && is_call(r->at, "simdgroup_barrier", b))) {
            b->line = r->line;
            b->column = r->column;
            pass(r, b->end);
            return 1;
        }
        word = word_char(*r->at);
        pass(r, r->at + 1);
    }
    return 0;
}

static int holds(const struct barrier *b, const char *word)
{
    const char *found = strstr(b->open, word);
    return found && found < b->end;
}

/* What a barrier turns into; a list of which the ones that differ from it are its mutants. */
enum { DELETED, OF_SIMDGROUP, FOR_NO_MEMORY, FOR_OTHER_MEMORY, KINDS };

static int applies(const struct barrier *b, int kind)
{
    int memory = holds(b, "mem_threadgroup") || holds(b, "mem_device");
    switch (kind) {
    case OF_SIMDGROUP: return b->threadgroup;
    case FOR_NO_MEMORY: return memory;
    case FOR_OTHER_MEMORY: return memory && !(holds(b, "mem_threadgroup") && holds(b, "mem_device"));
    default: return 1;
    }
}

static void write_mutant(const struct barrier *b, int kind, struct metalsim_text *text)
{
    const char *name = b->threadgroup ? "threadgroup_barrier" : "simdgroup_barrier";
    switch (kind) {
    case DELETED: metalsim_text_add(text, "((void)0)"); break;
    case OF_SIMDGROUP:
        metalsim_text_add(text, "simdgroup_barrier");
        metalsim_text_add_bytes(text, b->open, (size_t)(b->end - b->open));
        break;
    case FOR_NO_MEMORY: metalsim_text_add(text, "%s(mem_flags::mem_none)", name); break;
    case FOR_OTHER_MEMORY:
        metalsim_text_add(text, "%s(mem_flags::%s)", name, holds(b, "mem_device") ? "mem_threadgroup" : "mem_device");
        break;
    }
}

static const char *const what[KINDS] = {"deleted", "made one of the simdgroup", "for no memory", "for other memory"};

/* Calls the mutants' numbers out until it is i's turn: 1, and the barrier and kind are those of mutant i. */
static int find(struct reader *r, size_t i, struct barrier *b, int *kind, size_t *count)
{
    *count = 0;
    while (next_barrier(r, b))
        for (*kind = 0; *kind < KINDS; ++*kind)
            if (applies(b, *kind) && (*count)++ == i)
                return 1;
    return 0;
}

size_t metalsim_mutants_count(const char *text)
{
    struct reader r = {text, 1, 1, "", 0};
    struct barrier b;
    int kind;
    size_t count;
    find(&r, (size_t)-1, &b, &kind, &count);
    return count;
}

char *metalsim_mutants_make(const char *text, size_t i, char name[METALSIM_MUTANT_NAME])
{
    struct reader r = {text, 1, 1, "", 0};
    struct barrier b;
    int kind;
    size_t count;
    struct metalsim_text mutant = {0};
    if (!find(&r, i, &b, &kind, &count))
        return NULL;
    snprintf(name, METALSIM_MUTANT_NAME, "%.*s:%d:%d: %.*s %s", r.file_length, r.file, b.line, b.column,
             (int)strcspn(b.begin, "( \t\n"), b.begin, what[kind]);
    metalsim_text_add_bytes(&mutant, text, (size_t)(b.begin - text));
    write_mutant(&b, kind, &mutant);
    for (const char *c = b.begin; c < b.end; c++) /* lines stay what they were */
        if (*c == '\n')
            metalsim_text_add_bytes(&mutant, "\n", 1);
    metalsim_text_add(&mutant, "%s", b.end);
    return mutant.bytes;
}

char *metalsim_mutants_preprocess(const char *text, const char *folder)
{
    struct metalsim_text result = {0};
    char path[MFA_FILE_PATH];
    const int fine = snprintf(path, sizeof path, "%s/mutant-%ld.metal", folder, (long)getpid()) < (int)sizeof path &&
                     mfa_file_write(path, text, strlen(text)) &&
                     metalsim_library_preprocess(path, &result) == METALSIM_OK;
    unlink(path);
    if (!fine) {
        free(result.bytes);
        return NULL;
    }
    return result.bytes;
}
