/* Mach-O as far as the loader reads it. The names are Apple's (mach-o/loader.h, mach-o/fixup-chains.h), without their
 * suffixes; what is not read has no name. */
#ifndef MACHO_FORMAT_H
#define MACHO_FORMAT_H

#include <stdint.h>

enum {
    MH_MAGIC_64 = 0xfeedfacf,
    CPU_TYPE_ARM64 = 0x0100000c,
    MH_DYLIB = 6,

    LC_SEGMENT_64 = 0x19,
    LC_DYLD_CHAINED_FIXUPS = 0x34,
    LC_DYLD_EXPORTS_TRIE = 0x33,

    SG_READ_ONLY = 0x10, /* of a segment: after its fixups */

    SECTION_TYPE = 0xff,
    S_MOD_INIT_FUNC_POINTERS = 0x9,
    S_THREAD_LOCAL_REGULAR = 0x11,
    S_THREAD_LOCAL_ZEROFILL = 0x12,
    S_THREAD_LOCAL_VARIABLES = 0x13,
    S_INIT_FUNC_OFFSETS = 0x16,

    DYLD_CHAINED_IMPORT = 1,
    DYLD_CHAINED_PTR_64 = 2,
    DYLD_CHAINED_PTR_64_OFFSET = 6,
    DYLD_CHAINED_PTR_START_NONE = 0xffff,

    EXPORT_SYMBOL_FLAGS_REEXPORT = 8
};

#define LC_REQ_DYLD UINT32_C(0x80000000) /* a bit in a command's number */

struct header {
    uint32_t magic, cpu, cpu_subtype, type, commands, commands_size, flags, reserved;
};

struct command {
    uint32_t number, size;
};

struct segment {
    struct command command;
    char name[16];
    uint64_t address, size, file_offset, file_size;
    uint32_t most_protection, protection, sections, flags;
};

struct section {
    char name[16], segment[16];
    uint64_t address, size;
    uint32_t file_offset, alignment, relocations, relocation_count, flags, reserved[3];
};

struct linkedit { /* LC_DYLD_CHAINED_FIXUPS, LC_DYLD_EXPORTS_TRIE */
    struct command command;
    uint32_t offset, size;
};

struct fixups {
    uint32_t version, starts, imports, symbols, import_count, import_format, symbol_format;
};

struct starts { /* of the chains of one segment, a chain for each page */
    uint32_t size;
    uint16_t page_size, format;
    uint64_t segment_offset;
    uint32_t most;
    uint16_t page_count, page_start[];
};

struct thread_variable { /* in S_THREAD_LOCAL_VARIABLES; the compiler's code calls `find` with its address */
    void *(*find)(struct thread_variable *variable);
    void *image;
    uint64_t offset;
};

#endif
