"""The file libmfa.dylib, named by MFA_DYLIB, is one that macOS 14 on arm64 loads; and tools/macos is sound."""

import hashlib
import os
import pathlib
import re
import struct
import subprocess

import lief
import pytest
from lief import MachO

ROOT = pathlib.Path(__file__).resolve().parents[2]
SDK = ROOT / "tools/macos/sdk"
# What no source says, since the compiler puts it there by itself.
OF_COMPILER = {"___stack_chk_fail", "___stack_chk_guard", "__tlv_bootstrap", "_bzero", "_memset_pattern16"}


@pytest.fixture(scope="module")
def data():
    return pathlib.Path(os.environ["MFA_DYLIB"]).read_bytes()


@pytest.fixture(scope="module")
def library():
    file = lief.MachO.parse(os.environ["MFA_DYLIB"])  # it owns what it has parsed
    assert file.size == 1  # architecture
    yield file.at(0)


def allowed():
    text = (SDK / "usr/lib/libSystem.tbd").read_text()
    (symbols,) = re.findall(r"symbols: \[(.*?)\]", text, re.DOTALL)
    return re.findall(r"\b_\w+", re.sub(r"#.*", "", symbols))


def test_is_for_macos_14_on_arm64(library):
    assert library.header.cpu_type == MachO.Header.CPU_TYPE.ARM64
    assert library.header.file_type == MachO.Header.FILE_TYPE.DYLIB
    assert library.build_version.platform == MachO.BuildVersion.PLATFORMS.MACOS
    assert list(library.build_version.minos)[:2] == [14, 0]


def test_is_linked_with_the_system_alone(library):
    """And names itself relative to who loads it."""
    identity, *loads = library.libraries
    assert identity.command == MachO.LoadCommand.TYPE.ID_DYLIB and identity.name == "@rpath/libmfa.dylib"
    assert [load.name for load in loads] == ["/usr/lib/libSystem.B.dylib"]


def test_imports_what_is_allowed_from_the_system(library):
    imports = list(library.dyld_chained_fixups.bindings)
    assert imports and {binding.symbol.name for binding in imports} <= set(allowed())
    assert {(binding.library_ordinal, binding.weak_import) for binding in imports} == {(1, False)}
    assert library.header.has(MachO.Header.FLAGS.NOUNDEFS)
    assert library.header.has(MachO.Header.FLAGS.TWOLEVEL)  # each import names its library


def test_exports_what_is_promised(library):
    """And all of it lies in code."""
    exports = {export.symbol.name: export for export in library.dyld_exports_trie.exports}
    promised = (ROOT / "tests/symbols.txt").read_text().split()
    assert sorted(exports) == ["_" + name for name in promised]
    size = library.get_segment("__TEXT").virtual_size
    for export in exports.values():
        assert export.kind == MachO.ExportInfo.KIND.REGULAR and not export.flags_list
        assert 0 < export.address < size


def test_segments_are_whole_pages_and_never_written_and_executed(library):
    for segment in library.segments:
        assert segment.virtual_address % 0x4000 == 0 and segment.file_offset % 0x4000 == 0, segment.name
        assert segment.init_protection == {"__TEXT": 5, "__LINKEDIT": 1}.get(segment.name, 3), segment.name


def test_says_nothing_of_who_built_it(data):
    for word in (str(ROOT), os.path.expanduser("~"), "/tmp/"):
        assert len(word) < 3 or word.encode() not in data


def test_holds_the_text_of_the_metal_kernels(data):
    kernels = sorted((ROOT / "src/metal/kernels").iterdir())
    assert kernels
    for path in kernels:
        assert path.read_bytes() in data, path.name


# --- The signature: macOS kills a process that loads a page whose hash is wrong --------------------------
# lief says where the signature lies and no more, and codesign runs on macOS only: so its blobs are read here.


def read_signature(library, data):
    """(code directory, where the signature begins in the file)"""
    begin, size = library.code_signature.data_offset, library.code_signature.data_size
    blob = data[begin : begin + size]
    magic, _, count = struct.unpack_from(">3I", blob)
    assert magic == 0xFADE0CC0 and begin + size == len(data)
    slots = dict(struct.unpack_from(">2I", blob, 12 + 8 * n) for n in range(count))
    directory = blob[slots[0] :]
    return directory, begin


def wrong_pages(directory, data):
    """Pages whose SHA-256 is not the one in the directory."""
    hashes, _, _, slots, limit, hash_size, kind, _, page = struct.unpack_from(">5I4B", directory, 16)
    assert (hash_size, kind) == (32, 2)
    page = 1 << page
    assert slots == -(-limit // page)
    return [
        n
        for n in range(slots)
        if hashlib.sha256(data[n * page : min((n + 1) * page, limit)]).digest()
        != directory[hashes + 32 * n : hashes + 32 * n + 32]
    ]


def test_is_signed(library, data):
    directory, begin = read_signature(library, data)
    magic, _, version, flags, _, name, _, _, limit = struct.unpack_from(">9I", directory)
    assert magic == 0xFADE0C02 and version >= 0x20400
    assert flags == 0x20002  # ad hoc, by the linker
    assert limit == begin  # all of the file before it
    assert directory[name:].startswith(b"libmfa")
    assert wrong_pages(directory, data) == []


def test_signature_notices_a_changed_bit(library, data):
    directory, begin = read_signature(library, data)
    for at in (0, begin // 2, begin - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        assert len(wrong_pages(directory, bytes(changed))) == 1


# --- tools/macos -----------------------------------------------------------------------------------------


def test_list_and_prototypes_name_the_same_functions():
    headers = "".join(path.read_text() for path in (SDK / "usr/include").rglob("*.h"))
    declared = re.findall(r"^(?:extern )?[a-z]\w*(?: \w+)?[ *]+(\w+)\([^;]*\)[^;]*;", headers, re.MULTILINE)
    assert len(declared) > 50 and len(set(declared)) == len(declared)
    listed = allowed()
    assert len(set(listed)) == len(listed)
    assert {"_" + name for name in declared} == set(listed) - OF_COMPILER


def test_loader_has_all_that_is_listed():
    text = (ROOT / "metalsim/macho/system.c").read_text()
    known = {"_" + name for name in re.findall(r"SAME\((\w+)\)", text)} | set(re.findall(r'"(_\w+)"', text))
    assert set(allowed()) <= known


def test_facts_hold_with_our_sdk():
    command = ("clang-19", "--target=arm64-apple-macos14.0", "-isysroot", SDK, "-std=gnu11", "-Wall", "-Wextra")
    subprocess.run((*command, "-Werror", "-fsyntax-only", ROOT / "tests/macos/facts.c"), check=True)
