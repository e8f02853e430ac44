/* Maps a library, applies its fixups and reads its exports. Every offset is looked at before it is followed. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "format.h"
#include "macho.h"
#include "thread.h"

struct macho_image {
    const macho_image *next;
    const char *path;
    unsigned char *base;
    size_t size;
    const unsigned char *exports; /* the trie */
    size_t exports_size;
    struct macho_threads threads;
};

static const macho_image *images; /* all that are open */

struct file {
    unsigned char *bytes;
    size_t size;
    char *error;
    size_t capacity;
};

__attribute__((format(printf, 2, 3))) static int refuse(const struct file *file, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(file->error, file->capacity, format, values);
    va_end(values);
    return 0;
}

static int read_file(struct file *file, const char *path)
{
    FILE *stream = fopen(path, "rbe");
    if (!stream)
        return refuse(file, "%s cannot be opened", path);
    if (fseek(stream, 0, SEEK_END) == 0 && ftell(stream) > 0) {
        file->size = (size_t)ftell(stream);
        file->bytes = malloc(file->size);
    }
    rewind(stream);
    const int whole = file->bytes && fread(file->bytes, 1, file->size, stream) == file->size;
    fclose(stream);
    return whole ? 1 : refuse(file, "%s cannot be read", path);
}

/* The load command after `command`, or the first; NULL at the end. check_commands has been here before. */
static const struct command *next_command(const struct file *file, const struct command *command)
{
    const struct header *header = (const void *)file->bytes;
    const unsigned char *end = file->bytes + sizeof *header + header->commands_size;
    const unsigned char *at = command ? (const unsigned char *)command + command->size : file->bytes + sizeof *header;
    return at < end ? (const void *)at : NULL;
}

static int check_commands(const struct file *file)
{
    const struct header *header = (const void *)file->bytes;
    if (file->size < sizeof *header || header->magic != MH_MAGIC_64 || header->cpu != CPU_TYPE_ARM64 ||
        header->type != MH_DYLIB)
        return refuse(file, "the file is no Mach-O library for arm64");
    if (header->commands_size > file->size - sizeof *header)
        return refuse(file, "the load commands reach beyond the file");
    for (const struct command *command = NULL; (command = next_command(file, command)) != NULL;) {
        const size_t left = sizeof *header + header->commands_size - (size_t)((unsigned char *)command - file->bytes);
        if (left < sizeof *command || command->size < sizeof *command || command->size > left)
            return refuse(file, "a load command is of %u bytes where %zu are left", command->size, left);
    }
    return 1;
}

static const struct segment *next_segment(const struct file *file, const struct segment *segment)
{
    const struct command *command = segment ? &segment->command : NULL;
    while ((command = next_command(file, command)) != NULL)
        if (command->number == LC_SEGMENT_64)
            return (const void *)command;
    return NULL;
}

static int check_segment(const struct file *file, const struct segment *segment)
{
    const size_t room = segment->command.size;
    if (room < sizeof *segment || (room - sizeof *segment) / sizeof(struct section) < segment->sections)
        return refuse(file, "segment %.16s has a load command of %zu bytes for %u sections", segment->name, room,
                      segment->sections);
    if (segment->file_offset > file->size || segment->file_size > file->size - segment->file_offset ||
        segment->file_size > segment->size || segment->address > UINT32_MAX || segment->size > UINT32_MAX)
        return refuse(file, "segment %.16s is not within the file, or too large", segment->name);
    return 1;
}

/* One range of memory for all segments, as the file has them; writable until seal(). */
static int map_segments(const struct file *file, macho_image *image)
{
    for (const struct segment *s = NULL; (s = next_segment(file, s)) != NULL;) {
        if (!check_segment(file, s))
            return 0;
        if (s->address + s->size > image->size)
            image->size = s->address + s->size;
    }
    image->base = mmap(NULL, image->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (image->base == MAP_FAILED)
        return refuse(file, "no memory for %zu bytes", image->size);
    for (const struct segment *s = NULL; (s = next_segment(file, s)) != NULL;)
        memcpy(image->base + s->address, file->bytes + s->file_offset, s->file_size);
    return 1;
}

/* Gives each segment the protection that it asks for. PROT_ are VM_PROT_ on arm64. */
static int seal(const struct file *file, const macho_image *image)
{
    for (const struct segment *s = NULL; (s = next_segment(file, s)) != NULL;) {
        const int protection = s->flags & SG_READ_ONLY ? PROT_READ : (int)s->protection;
        if (mprotect(image->base + s->address, s->size, protection) != 0)
            return refuse(file, "segment %.16s cannot be protected", s->name);
    }
    __builtin___clear_cache((char *)image->base, (char *)image->base + image->size);
    return 1;
}

/* --- Thread-local variables ----------------------------------------------------------------------- */

static int read_section(const struct file *file, macho_image *image, const struct section *section)
{
    const uint32_t type = section->flags & SECTION_TYPE;
    if (section->address > image->size || section->size > image->size - section->address)
        return refuse(file, "section %.16s reaches beyond the image", section->name);
    unsigned char *begin = image->base + section->address;
    if ((type == S_MOD_INIT_FUNC_POINTERS || type == S_INIT_FUNC_OFFSETS) && section->size > 0)
        return refuse(file, "section %.16s holds initialisers, which this loader does not run", section->name);
    if (type == S_THREAD_LOCAL_REGULAR || type == S_THREAD_LOCAL_ZEROFILL)
        macho_threads_extend(&image->threads, begin, section->size);
    if (type == S_THREAD_LOCAL_VARIABLES)
        for (size_t at = 0; at + sizeof(struct thread_variable) <= section->size; at += sizeof(struct thread_variable))
            ((struct thread_variable *)(void *)(begin + at))->image = &image->threads;
    return 1;
}

static int read_sections(const struct file *file, macho_image *image)
{
    for (const struct segment *s = NULL; (s = next_segment(file, s)) != NULL;) {
        const struct section *sections = (const void *)(s + 1);
        for (uint32_t n = 0; n < s->sections; n++)
            if (!read_section(file, image, &sections[n]))
                return 0;
    }
    return 1;
}

/* --- Fixups --------------------------------------------------------------------------------------- */

struct table { /* LC_DYLD_CHAINED_FIXUPS */
    const unsigned char *bytes;
    size_t size;
    struct fixups fixups;
};

static const char *import_name(const struct table *table, uint32_t number)
{
    uint32_t import;
    const size_t at = table->fixups.imports + (size_t)number * sizeof import;
    if (number >= table->fixups.import_count || at + sizeof import > table->size)
        return NULL;
    memcpy(&import, table->bytes + at, sizeof import);
    const size_t name = table->fixups.symbols + (import >> 9);
    return name < table->size && memchr(table->bytes + name, 0, table->size - name) ? (const char *)table->bytes + name
                                                                                    : NULL;
}

/* One word of a chain becomes an address. Returns the bytes to the next; 0: it was the last; -1: refused. Both formats
 * count from 0, where the image begins. */
static int fix(const struct file *file, const struct macho_image *image, const struct table *table,
               unsigned char *place, macho_resolver resolve)
{
    uint64_t word;
    memcpy(&word, place, sizeof word);
    uintptr_t address = (uintptr_t)image->base + (word & 0xfffffffff);
    if (word >> 63) {
        const char *name = import_name(table, word & 0xffffff);
        void *found = name ? resolve(name) : NULL;
        if (!found) {
            refuse(file, "it imports %s, which the loader's system does not have", name ? name : "a nameless symbol");
            return -1;
        }
        address = (uintptr_t)found + (word >> 24 & 0xff);
    }
    memcpy(place, &address, sizeof address);
    return (int)(word >> 51 & 0xfff) * 4;
}

static int fix_segment(const struct file *file, const macho_image *image, const struct table *table,
                       const struct starts *starts, macho_resolver resolve)
{
    if (starts->format != DYLD_CHAINED_PTR_64 && starts->format != DYLD_CHAINED_PTR_64_OFFSET)
        return refuse(file, "its fixups are of format %d; the loader knows 2 and 6", starts->format);
    for (int page = 0; page < starts->page_count; page++) {
        if (starts->page_start[page] == DYLD_CHAINED_PTR_START_NONE)
            continue;
        uint64_t at = starts->segment_offset + (uint64_t)page * starts->page_size + starts->page_start[page];
        for (int next = 1; next != 0; at += (uint64_t)next) {
            if (at + 8 > image->size)
                return refuse(file, "a chain of fixups leaves the image");
            next = fix(file, image, table, image->base + at, resolve);
            if (next < 0)
                return 0;
        }
    }
    return 1;
}

static int fix_all(const struct file *file, const macho_image *image, const struct table *table, macho_resolver resolve)
{
    const struct fixups *fixups = &table->fixups;
    if (fixups->version != 0 || fixups->import_format != DYLD_CHAINED_IMPORT || fixups->symbol_format != 0)
        return refuse(file,
                      "its fixups are of version %u, imports of format %u, symbols of %u; the loader knows 0, 1, 0",
                      fixups->version, fixups->import_format, fixups->symbol_format);
    uint32_t count = 0, offset;
    if (fixups->starts <= table->size - 4)
        memcpy(&count, table->bytes + fixups->starts, 4);
    if (count == 0 || count > (table->size - fixups->starts - 4) / 4)
        return refuse(file, "its fixups have %u segments", count);
    for (uint32_t n = 0; n < count; n++) {
        memcpy(&offset, table->bytes + fixups->starts + 4 + (size_t)n * 4, 4);
        const struct starts *starts = (const void *)(table->bytes + fixups->starts + offset);
        const size_t left = table->size - fixups->starts;
        if (offset == 0)
            continue;
        if (offset > left - sizeof *starts || starts->page_count > (left - offset - sizeof *starts) / 2)
            return refuse(file, "the fixups of segment %u lie beyond their table", n);
        if (!fix_segment(file, image, table, starts, resolve))
            return 0;
    }
    return 1;
}

/* --- Opening -------------------------------------------------------------------------------------- */

/* What a command of that number points to; NULL: there is none, or it is not within the file. */
static const unsigned char *find_linkedit(const struct file *file, uint32_t number, size_t *size)
{
    for (const struct command *command = NULL; (command = next_command(file, command)) != NULL;) {
        const struct linkedit *found = (const void *)command;
        if ((command->number & ~LC_REQ_DYLD) != number || command->size < sizeof *found)
            continue;
        if (found->offset > file->size || found->size > file->size - found->offset)
            return NULL;
        *size = found->size;
        return file->bytes + found->offset;
    }
    return NULL;
}

static int load(const struct file *file, macho_image *image, macho_resolver resolve)
{
    struct table table;
    if (!check_commands(file) || !map_segments(file, image))
        return 0;
    image->exports = find_linkedit(file, LC_DYLD_EXPORTS_TRIE, &image->exports_size);
    table.bytes = find_linkedit(file, LC_DYLD_CHAINED_FIXUPS, &table.size);
    if (!image->exports || !table.bytes || table.size < sizeof table.fixups)
        return refuse(file, "it lacks chained fixups or a trie of exports");
    memcpy(&table.fixups, table.bytes, sizeof table.fixups);
    return fix_all(file, image, &table, resolve) && read_sections(file, image) && seal(file, image);
}

const macho_image *macho_open(const char *path, macho_resolver resolve, char *error, size_t capacity)
{
    struct file file = {.error = error, .capacity = capacity};
    macho_image *image = calloc(1, sizeof *image); /* it and the file stay: threads and exports read them */
    if (!image)
        return refuse(&file, "no memory for an image"), NULL;
    if (!read_file(&file, path) || !load(&file, image, resolve))
        return NULL;
    image->path = strdup(path);
    image->next = images;
    return images = image;
}

const char *macho_file_of(const void *address)
{
    for (const macho_image *image = images; image; image = image->next)
        if ((uintptr_t)address - (uintptr_t)image->base < image->size)
            return image->path;
    return NULL;
}

/* --- Exports -------------------------------------------------------------------------------------- */

struct cursor {
    const unsigned char *at, *end;
};

static uint64_t read_number(struct cursor *cursor) /* ULEB128 */
{
    uint64_t number = 0;
    for (unsigned shift = 0; cursor->at < cursor->end && shift < 64; shift += 7) {
        const unsigned char byte = *cursor->at++;
        number |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            break;
    }
    return number;
}

/* Follows the edge that `*rest` begins with. 0: there is none. */
static int follow(struct cursor *cursor, const unsigned char *trie, const char **rest)
{
    int children = cursor->at < cursor->end ? *cursor->at++ : 0;
    for (; children > 0; children--) {
        const char *label = (const char *)cursor->at;
        const size_t length = strnlen(label, (size_t)(cursor->end - cursor->at));
        if ((size_t)(cursor->end - cursor->at) <= length)
            return 0;
        cursor->at += length + 1;
        const uint64_t child = read_number(cursor);
        if (length == 0 || strncmp(*rest, label, length) != 0)
            continue;
        *rest += length;
        cursor->at = trie + child;
        return child < (uint64_t)(cursor->end - trie);
    }
    return 0;
}

void *macho_find(const macho_image *image, const char *symbol)
{
    struct cursor cursor = {image->exports, image->exports + image->exports_size};
    for (const char *rest = symbol;;) {
        const uint64_t terminal = read_number(&cursor);
        if (*rest == '\0') {
            const uint64_t flags = terminal ? read_number(&cursor) : EXPORT_SYMBOL_FLAGS_REEXPORT;
            const uint64_t address = read_number(&cursor);
            return flags & EXPORT_SYMBOL_FLAGS_REEXPORT || address >= image->size ? NULL : image->base + address;
        }
        if (terminal > (uint64_t)(cursor.end - cursor.at))
            return NULL;
        cursor.at += terminal;
        if (!follow(&cursor, image->exports, &rest))
            return NULL;
    }
}
