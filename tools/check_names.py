"""Checks names: public and internal functions, types, constants, folders, kernel keys, words; and exported symbols.

    tools/check_names.py [ROOT]                     the sources
    tools/check_names.py --library FILE [ROOT]      the symbols that a built library exports

Public functions are mfa_<noun>_<verb>, constants MFA_..., functions across files mfa_<noun>_<verb> in base and
core and mfa_<folder>_<verb> in a backend, and no type of ours ends in _t (POSIX keeps those for itself).
Names and prose use the field's words: WORDS lists private ones that the project used once, with the standard terms.
"""

import pathlib
import re
import subprocess
import sys

import tree

NOUNS = "context|problem|plan|status|isa|kv"
# Sentences of their own.
ALONE = {"mfa_version", "mfa_last_error", "mfa_attention", "mfa_precompile", "mfa_xla_attention", "mfa_fail"}
FOLDERS = set(
    """.ci bench docs examples include metalsim metalsim/cost metalsim/cuda metalsim/cuda/include metalsim/include
    metalsim/include/metalsim metalsim/lint metalsim/macho metalsim/runtime metalsim/tests python
    python/mps_flash_attn python/mps_flash_attn/distributed python/mps_flash_attn/flash_attn
    python/mps_flash_attn/sdpa python/mps_flash_attn/transformers requirements
    src src/base src/core src/cpu src/cpu/kernels
    src/cpu/kernels/attention src/cpu/kernels/gemm src/cpu/kernels/simd src/metal src/metal/kernels src/xla tests
    tests/amx tests/macos tests/metal tests/metal_host tests/python tests/python/distributed tests/reference
    tests/support tests/tools tools tools/macos tools/macos/sdk tools/macos/sdk/usr tools/macos/sdk/usr/include
    tools/macos/sdk/usr/include/sys""".split()
)  # closed: what a folder is called is decided here, and none is called util, common, misc, old or new

TEXT = (".c", ".h", ".inc", ".py", ".sh", ".md", ".txt", ".metal", ".cu", ".cmake", ".toml", ".yml", "")

DTYPE = "(?:f32|f16|bf16|f64)"
# The features' parts of a key, in their order.
OPTIONS = (pathlib.Path(__file__).parent.parent / "src/core/options.inc").read_text()
PARTS = re.findall(r'^FEATURE\(\w+, "(\w+)"', OPTIONS, re.MULTILINE)
FEATURES = "".join(f"(?:{part}{DTYPE if part.endswith('_') else ''})?" for part in PARTS)
KEY = re.compile(
    rf"(?:forward|backward|decode|decode_backward)_{DTYPE}_d\d+(?:v\d+)?_q\d+_k\d+"
    rf"{FEATURES}(?:_[kv]_(?:int8|e4m3|e5m2|int4|nf4)){{0,2}}"
    r"_(?:scalar|avx2|avx512bf16|avx512|amxbf16|neonbf16|neon|apple\d+|sm\d+)"
)
LOOKS_LIKE_KEY = re.compile(rf"\b(?:forward|backward|decode|decode_backward)_{DTYPE}_d\d\w*_\w+")

# (words, as a regular expression; the field's term). A word ends where letters and digits end, so that these are also
# found within identifiers and file names; \b before one restricts it to the beginning of an identifier.
WORDS = (
    (r"\bfew_\w+|\bFEW_\w+", "decode"),
    (r"upcoming|\bask_\w+", "prefetch_cursor, prefetch_..."),
    (r"terms\.h|TERM", "packing.h, K_PACK"),
    (r"turn_down|turn_left|left_place", "pack_vnni, pack_a, packed_a_index"),
    (r"squares of (?:sums|\d+)|AMX squares?", "AMX tiles"),
    (r"(?:vector|simd) dialects?|dialects? (?:of (?:a dozen )?vectors?|with|per)", "SIMD backend, vector API"),
    (r"vector vocabulary|vocabulary of vectors", "vector API"),
    (r"EXP2_TILES", "fused gemm_exp2"),
    (r"RAISE_KEYS", "rescale_max"),
    (r"dq_progress|progress->\w+|wait_for_turn", "dq_semaphore, dq_wait_order"),
    (r"attention_rows|prepare_rows", "backward_preprocess"),
    (r"finish_panel", "epilogue"),
    (r"make_roundable", "quiet_nans"),
    (r"hand_in|handed in|shelf|shelves", "store_partial, exchange_slot"),
    (r"seats?|sight", "simdgroup_coord, tickets; block_range"),
    (r"folds?|folded", "pack_gqa, q_heads_per_kv, reduce"),
    (r"bent", "tanh_x"),
    (r"carves?|carved|carving", "arena_alloc"),
    (r"\w*_MOST|MOST_\w+", "..._MAX or MAX_..."),
    (r"mistrusts?|mistrusted", "self_test_error"),
    (r"refusals?", "unavailable_reason, error"),
    (r"judges?|judged|judging", "check_support, verdict"),
    (r"objections?", "fallback_reason"),
    (r"peculiar|peculiarity|peculiarities", "describe_unsupported, unusual"),
    (r"told", "is given, has as an argument"),
    (r"give_way|gives_way|repeat\.py|fast_path", "evict, dispatch_cache.py, native_mha.py"),
    (r"rooms|<room>|(?:cpu|metal|stub|this|one|backend)(?:'s)? room", "backend, module, folder"),
    (r"doors?|houses?|stairs", "entry point, interface; backend; layers"),
    (r"kits?", "tests/support"),
    (r"\bsubject_\w+|struct subject|trials?", "test_case, test_run"),
    (r"hostile|planted", "edge_cases; injected, added"),
)
UNCHECKED = re.compile(r"CHANGELOG\.md|tools/check_names\.py|tests/tools/.*")  # history; these words

DEFINITION = re.compile(r"^(?!static\b|typedef\b)[A-Za-z_][\w \*]*?\b(\w+)\([^;{]*\)\s*\{", re.MULTILINE)
TYPE_WITH_T = re.compile(
    r"\b(?:struct|enum|union)\s+(\w+_t)\s*\{|^typedef\b[^;{]*\b(\w+_t)\s*;|^\}\s*(\w+_t)\s*;", re.MULTILINE
)


def without_comments(text):
    """The code alone; strings stay."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)


def public_functions(root):
    header = without_comments((root / "include/mfa.h").read_text())
    return re.findall(r"^MFA_API\b[^;(]*?\b(\w+)\(", header, re.MULTILINE)


def check_header(root, report):
    header = without_comments((root / "include/mfa.h").read_text())
    for name in public_functions(root):
        report.check(
            name in ALONE or re.fullmatch(rf"mfa_({NOUNS})_[a-z_]+", name),
            f"include/mfa.h: {name}: a public function is mfa_<noun>_<verb>, the noun one of {NOUNS}",
        )
    constants = re.findall(r"#define\s+(\w+)", header)
    for body in re.findall(r"\benum\s+\w+\s*\{([^}]*)\}", header):
        constants += re.findall(r"(?:^|,)\s*(\w+)", body)
    for name in constants:
        report.check(re.fullmatch(r"MFA_[A-Z0-9_]+", name), f"include/mfa.h: {name}: a constant is MFA_...")
    for name in re.findall(r"\b(?:struct|enum)\s+(\w+)\s*[{;]|^\}\s*(\w+);", header, re.MULTILINE):
        name = "".join(name)
        report.check(re.fullmatch(r"mfa_[a-z_]+", name), f"include/mfa.h: {name}: a type is mfa_...")


def check_sources(root, report):
    for path in tree.files(root, ".c", ".h", ".inc"):
        code = without_comments((root / path).read_text())
        for match in TYPE_WITH_T.finditer(code) if path.parts[0] != "tools" else ():  # where Apple's names are
            report.check(False, f"{path}: {''.join(filter(None, match.groups()))}: no type of ours ends in _t")
        if path.suffix != ".c" or path.parts[0] != "src":
            continue
        folder = path.parts[1] if len(path.parts) > 2 else "core"
        prefix = "mfa_[a-z]+_" if folder in ("base", "core") else f"mfa_{folder}_"
        for name in DEFINITION.findall(code):
            fine = name in ALONE or re.fullmatch(prefix + r"\w+", name)
            report.check(fine, f"{path}: {name}: a function across files begins with {prefix}, else it is static")


def check_folders(root, report):
    folders = {str(parent) for path in tree.files(root, *TEXT) for parent in path.parents} - {"."}
    for folder in sorted(folders):
        report.check(folder in FOLDERS, f"{folder}: not in the list of folders (tools/check_names.py)")


def check_keys(root, report):
    for path in tree.files(root, ".c", ".h", ".inc", ".py", ".md", ".txt"):
        if path.parts[:2] == ("tests", "tools"):  # adds wrong ones
            continue
        for key in LOOKS_LIKE_KEY.findall((root / path).read_text()):
            report.check(KEY.fullmatch(key), f"{path}: {key}: not a kernel key (src/core/key.h)")


def check_words(root, report):
    table = []
    for words, term in WORDS:
        flags = re.IGNORECASE if words == words.lower() else 0
        table.append((re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])", flags), term))
    for path in tree.files(root, *TEXT):
        if UNCHECKED.fullmatch(str(path)):
            continue
        text = f"{path}\n{(root / path).read_text()}"
        problems = []
        for pattern, term in table:
            for found in pattern.finditer(text):
                line = text.count("\n", 0, found.start())  # 0: the path
                problems.append(f"{path}:{line}: {found.group()} is a private word; standard terms: {term}")
        report.check(not problems, "\n".join(problems))


def check_library(root, library, report):
    output = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    exported = {line.split()[-1] for line in output.splitlines()}
    listed = (root / "tests/symbols.txt").read_text().split()
    report.check(listed == sorted(set(listed)), "tests/symbols.txt: not sorted, or a name stands twice")
    declared = set(public_functions(root))
    for name in sorted(exported | set(listed) | declared):
        places = {"exported": exported, "in tests/symbols.txt": listed, "declared in mfa.h": declared}
        missing = [place for place, names in places.items() if name not in names]
        report.check(not missing, f"{name}: not {', not '.join(missing)}")


def main():
    arguments = sys.argv[1:]
    library = None
    if arguments[:1] == ["--library"]:
        library, arguments = arguments[1], arguments[2:]
    root = pathlib.Path(arguments[0]) if arguments else tree.default_root()
    report = tree.Report()
    if library:
        check_library(root, library, report)
    else:
        check_header(root, report)
        check_sources(root, report)
        check_folders(root, report)
        check_keys(root, report)
        check_words(root, report)
    report.finish()


if __name__ == "__main__":
    main()
