"""Reads an arm64 Mach-O library: what the tests ask of libmfa.dylib. It shares nothing with the loader in metalsim."""

import struct

MAGIC, ARM64, DYLIB = 0xFEEDFACF, 0x0100000C, 6
SEGMENT, SYMTAB, LOAD_DYLIB, ID_DYLIB, CODE_SIGNATURE = 0x19, 0x2, 0xC, 0xD, 0x1D
BUILD_VERSION, FIXUPS, EXPORTS = 0x32, 0x34, 0x33
LOADS = {LOAD_DYLIB, 0x18, 0x1F, 0x20, 0x23}  # also weak, re-exported, lazy, upward


class Library:
    """The parts of the file, by the numbers of the load commands."""

    def __init__(self, data):
        self.data = data
        magic, cpu, _, kind, count, size, self.flags, _ = struct.unpack_from("<8I", data)
        assert (magic, cpu, kind) == (MAGIC, ARM64, DYLIB)
        self.commands, at = [], 32
        for _ in range(count):
            number, length = struct.unpack_from("<2I", data, at)
            self.commands.append((number & 0x7FFFFFFF, data[at : at + length]))
            at += length
        assert at == 32 + size

    def all(self, number):
        return [body for found, body in self.commands if found == number]

    def one(self, number):
        (body,) = self.all(number)
        return body

    def part(self, number):
        """The bytes that a command such as FIXUPS points to."""
        offset, size = struct.unpack_from("<2I", self.one(number), 8)
        return self.data[offset : offset + size]

    def segments(self):
        """(name, address, size, file offset, file size, protection at first)"""
        for body in self.all(SEGMENT):
            name, address, size, offset, stored, _, protection = struct.unpack_from("<16s4Q2I", body, 8)
            yield name.rstrip(b"\0").decode(), address, size, offset, stored, protection

    def name(self):
        return text_at(self.one(ID_DYLIB), 24)

    def loads(self):
        return [text_at(body, 24) for number, body in self.commands if number in LOADS]

    def build(self):
        """(platform, least version of the system)"""
        platform, least = struct.unpack_from("<2I", self.one(BUILD_VERSION), 8)
        return platform, f"{least >> 16}.{least >> 8 & 255}"

    def imports(self):
        """(symbol, number of the library it comes from, whether it may be missing)"""
        table = self.part(FIXUPS)
        _, _, imports, symbols, count, form, _ = struct.unpack_from("<7I", table)
        assert form == 1
        for (word,) in struct.iter_unpack("<I", table[imports : imports + 4 * count]):
            yield text_at(table, symbols + (word >> 9)), word & 255, bool(word >> 8 & 1)

    def exports(self):
        """Symbols of the trie, with their addresses."""
        return dict(walk(self.part(EXPORTS), 0, ""))


def text_at(data, at):
    return data[at : data.index(b"\0", at)].decode()


def number_at(data, at):
    """(ULEB128, where it ends)"""
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number, at


def walk(trie, at, prefix):
    size, at = number_at(trie, at)
    if size:
        flags, after = number_at(trie, at)
        assert flags == 0  # an ordinary symbol
        yield prefix, number_at(trie, after)[0]
    at += size
    children, at = trie[at], at + 1
    for _ in range(children):
        label = text_at(trie, at)
        child, at = number_at(trie, at + len(label) + 1)
        yield from walk(trie, child, prefix + label)
