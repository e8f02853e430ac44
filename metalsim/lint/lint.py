"""Finds what Apple's compiler rejects in a .metal text and clang alone does not, and what our dialect forbids.

    metalsim/lint/lint.py [-D NAME[=VALUE]] ... FILE ...      finds nothing in good files
    metalsim/lint/lint.py --distinct FILE ...                 reads only files that have something not yet read
    metalsim/lint/lint.py --expect FILE ...                   finds what // EXPECT-ERROR: lines say, and no more

Files are whole programs: their own #includes are already in them, with #line. Clang reads a file as metalsim executes
it: its errors and warnings are findings, and rules look at its syntax tree. It reads it as C++17, which newer versions
of Metal are, for errors and warnings alone; and with a type of its own for `thread`: there, a pointer or reference that
names no address space shows. Rules on the text come on top. The stand-in headers are compiled once (`precompiled`).
--distinct is for the texts of many variants of the same sources (`distinct_files`).
It prints a line per finding, and at last N passed, N failed.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zlib

INCLUDE = pathlib.Path(__file__).resolve().parent.parent / "include"
CLANG = os.environ.get("METALSIM_CLANG", "clang-19")
# What every pass says: the language that Metal 3 is, the stand-in headers as a system's.
LANGUAGE = ["-x", "c++", "--target=x86_64-linux-gnu", "-march=x86-64-v3", "-nostdinc", "-isystem", str(INCLUDE)]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-attributes", "-Wno-duplicate-decl-specifier"]

# Words of the text that are wrong wherever they stand.
WORDS = {
    "double": "Metal has no double",
    "asm": "Metal has no inline assembly",
    "goto": "Metal has no goto",
    "thread_local": "Metal has no thread_local",
    "register": "Metal has no register variables",
    "noexcept": "Metal has no exceptions, and no noexcept",
    "typeid": "Metal has no run-time types",
    "dynamic_cast": "Metal has no run-time types",
    "try": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "new": "Metal has no heap",
    "delete": "Metal has no heap",
    "assert": "Metal has no assert",
    "printf": "Metal has no printf",
    "std": "Metal has its own library, not C++'s",
    "function_constant": "variants are made by #define, not by function constants",
    "simdgroup_async_copy": "it is private to Apple, and gone from newer systems",
    "INFINITY": "fast math assumes that there is none: use a large finite number, or bits",
    "NAN": "fast math assumes that there is none: use bits",
    "isnan": "fast math makes it false: look at bits",
    "isinf": "fast math makes it false: look at bits",
    "isfinite": "fast math makes it true: look at bits",
}
# Keywords of Metal that are names to clang.
RESERVED = set(
    """vertex fragment intersection visible mesh object_data ray_data threadgroup_imageblock imageblock sampler
    texture1d texture2d texture3d texturecube texture_buffer depth2d depthcube patch_control_point
    command_buffer""".split()
)
SPACES = ("__global", "__local", "__private", "__constant", "threadgroup_array::memory")  # the last: THREADGROUP_ARRAY
POSITIONS = (
    "thread_position_in_grid|threads_per_grid|thread_position_in_threadgroup|threads_per_threadgroup"
    "|threadgroup_position_in_grid|threadgroups_per_grid"
)
INDICES = "thread_index_in_threadgroup|thread_index_in_simdgroup|simdgroup_index_in_threadgroup"
TOGETHER = re.compile(r"threadgroup_barrier|simdgroup_barrier|simd_\w+|simdgroup_(?:load|store|multiply\w*)")


class Text:
    """A file, and which line of which of ours each of its lines is."""

    def __init__(self, path):
        self.path = str(path)
        self.lines = pathlib.Path(path).read_text().split("\n")
        self.places = []
        file, number = self.path, 0
        for line in self.lines:
            number += 1
            self.places.append((file, number))
            directive = re.match(r'\s*#\s*line\s+(\d+)(?:\s+"([^"]*)")?', line)
            if directive:
                file, number = directive[2] or file, int(directive[1]) - 1
        self.code = without_comments("\n".join(self.lines)).split("\n")

    def place(self, number):
        return self.places[number - 1]


def without_comments(text):
    """The text with comments and strings blanked out; lines stay where they are."""

    def blank(match):
        return '""' if match[0].startswith('"') else re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def clang(path, defines, *options, text=True):
    words = [CLANG, *LANGUAGE, *(f"-D{define}" for define in defines), *options, str(path)]
    return subprocess.run(words, capture_output=True, text=text)


@functools.cache
def folder_of_headers():
    folder = tempfile.TemporaryDirectory()
    (pathlib.Path(folder.name) / "all.h").write_text("#include <metal_stdlib>\n")
    return folder  # removed with it, at the end of the program


@functools.cache
def precompiled(defines, options):
    """The stand-in headers, compiled with these options, as options: neither read nor in the tree for each file."""
    folder = pathlib.Path(folder_of_headers().name)
    made = folder / f"{len(list(folder.iterdir()))}.pch"
    done = clang(folder / "all.h", defines, *options, "-x", "c++-header", "-o", str(made))
    return ("-include-pch", str(made)) if done.returncode == 0 else ()  # else the file says what is wrong


class Findings:
    def __init__(self):
        self.found = set()

    def add(self, place, sentence):
        self.found.add((*place, sentence))

    def lines(self):
        return [f"{file}:{line}: {sentence}" for file, line, sentence in sorted(self.found)]


# --- What clang says --------------------------------------------------------------------------------------------------


MESSAGES = ("error", "fatal error", "warning")


def read_messages(text, errors, findings, kinds):
    """Clang's messages name places as #line has them already."""
    for file, line, kind, sentence in re.findall(r"^(.*?):(\d+):\d+: ((?:fatal )?\w+): (.*)$", errors, re.MULTILINE):
        if kind in kinds:
            findings.add((file, int(line)), sentence)


def compile_as_cpp17(text, defines, findings):
    options = ("-std=c++17", *WARNINGS, "-ferror-limit=0")
    done = clang(text.path, defines, *options, *precompiled(defines, options), "-fsyntax-only")
    read_messages(text, done.stderr, findings, MESSAGES)


# --- The syntax tree --------------------------------------------------------------------------------------------------


class Tree:
    """Walks clang's tree in the order in which it was printed, since a place is printed only where it changes."""

    def __init__(self, text, defines, *options):
        # The tree is printed after errors, too: what is sound in it is looked at. After too many, templates would stay
        # without their types.
        options = ("-std=c++14", "-ferror-limit=0", *options)
        tree = ("-fsyntax-only", "-Xclang", "-ast-dump=json")
        done = clang(text.path, defines, *options, *precompiled(defines, options), *tree, text=False)
        self.root = json.loads(done.stdout)
        self.messages = done.stderr.decode()
        self.text = text
        self.file, self.line = "", 0
        self.nodes = []  # (node, line or None, ancestors) of the file itself
        self.walk(self.root, (), None, True)

    def locate(self, location):
        """Follows a printed place; returns the line if it is in our file."""
        if "expansionLoc" in location:
            self.locate(location["spellingLoc"])
            return self.locate(location["expansionLoc"])
        self.file = location.get("file", self.file)
        self.line = location.get("line", self.line)
        return self.line if location and "offset" in location and self.file == self.text.path else None

    def walk(self, node, ancestors, line, written):
        if "loc" in node:
            line = self.locate(node["loc"]) or line
        if "range" in node:
            begin = self.locate(node["range"].get("begin", {}))
            self.locate(node["range"].get("end", {}))
            line = (begin or line) if not node.get("loc") else line
        ours = line is not None and (self.file == self.text.path or ancestors)
        written = written and not node.get("isImplicit")
        if ours and written:
            self.nodes.append((node, line, ancestors))
        inside = (*ancestors, node) if ours else ancestors
        for child in node.get("inner", ()):
            if child:
                self.walk(child, inside, line if ours else None, written)


def type_of(node):
    kind = node.get("type", {})
    return kind.get("desugaredQualType", kind.get("qualType", ""))


def unqualified(kind):
    """Does a pointer or reference in this type name no address space?"""
    while re.search(r"<[^<>]*>", kind):
        kind = re.sub(r"<[^<>]*>", "", kind)
    if "(" in kind:  # of a function: its parameters are nodes of their own
        kind = kind[: kind.index("(")]
    levels = re.split(r"[*&]", kind.replace("&&", "&"))[:-1]
    return any(not any(space in level for space in SPACES) for level in levels)


def check_declaration(node, line, ancestors, report):
    kind, name, where = node["kind"], node.get("name", ""), type_of(node)
    if kind in ("VarDecl", "ParmVarDecl", "FieldDecl", "FunctionDecl", "CXXMethodDecl"):
        if re.search(r"\bdouble\b", where):
            report(line, "Metal has no double")
        if re.search(r"\blong long\b|__int128", where):
            report(line, "Metal has no long long")
        if re.search(r"\([*&][^()]*\)\(", where):
            report(line, "Metal has no function pointers in kernels")
    if name in RESERVED:
        report(line, f"{name} is a keyword of Metal: take another name")
    if re.match(r"__|_[A-Z]", name):
        report(line, f"{name}: such names are the compiler's")
    if kind == "VarDecl":
        inside = any(a["kind"] in ("FunctionDecl", "CXXMethodDecl") for a in ancestors)
        if node.get("storageClass") == "static" and inside:
            report(line, "Metal has no static variables in functions")
        elif not inside and not node.get("constexpr") and "__constant" not in where:
            report(line, "a variable outside functions must be constant")
        elif not inside and "init" not in node:
            report(line, "a constant needs its value")
    if kind in ("CXXRecordDecl", "ClassTemplateDecl"):
        if node.get("bases"):
            report(line, "no derived classes: Metal restricts them")
        if node.get("tagUsed") == "union":
            report(line, "no unions: use as_type")
    if kind in ("CXXMethodDecl", "CXXDestructorDecl") and node.get("virtual"):
        report(line, "Metal has no virtual functions")
    if kind == "FunctionDecl":
        if node.get("variadic"):
            report(line, "Metal has no variadic functions")
        if name == "main":
            report(line, "main is reserved")


def check_expression(node, line, report):
    kind = node["kind"]
    if kind == "FloatingLiteral" and type_of(node) == "double":
        report(line, "a constant without f: it is a double to C++")
    if kind == "LambdaExpr":
        report(line, "lambdas need Metal 3.2")
    if kind == "ImplicitCastExpr" and node.get("castKind") in ("FloatingCast", "IntegralToFloating"):
        if type_of(node) == "__bf16" and not node.get("isPartOfExplicitCast"):
            report(line, "no conversion to bfloat unasked: write bfloat(x)")


def check_functions(tree, kernels, report):
    """Helpers are METAL_FUNC, nothing is recursive, and no thread leaves a kernel in which others may wait for it."""
    calls, places, names, first, returns, uses = {}, {}, {}, {}, [], []
    for node, _, _ in tree.nodes:
        if node["kind"] == "FunctionDecl":  # a function may be declared more than once
            first[node["id"]] = first.get(node.get("previousDecl"), node["id"])
    for number, (node, line, ancestors) in enumerate(tree.nodes):
        functions = [a for a in ancestors if a["kind"] in ("FunctionDecl", "CXXMethodDecl")]
        if node["kind"] == "FunctionDecl":
            places[node["id"]], names[node["id"]] = line, node.get("name")
            inlined = any(child.get("kind") == "AlwaysInlineAttr" for child in node.get("inner", ()))
            if node.get("name") not in kernels and not inlined:
                report(line, f"{node.get('name')} is neither a kernel nor METAL_FUNC")
        if node["kind"] == "DeclRefExpr" and functions:
            called = node.get("referencedDecl", {})
            names.setdefault(called.get("id"), called.get("name"))
            target = first.get(called.get("id"), called.get("id"))
            calls.setdefault(first.get(functions[-1]["id"]), set()).add(target)
            uses.append((number, functions[-1], target, ancestors))
        if node["kind"] == "ReturnStmt" and functions and functions[-1].get("name") in kernels:
            returns.append((number, functions[-1], line, ancestors))

    def called_from(start):
        seen, todo = set(), list(calls.get(start, ()))
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += calls.get(at, ())
        return seen

    for function, line in places.items():
        if first[function] in called_from(first[function]):
            report(line, f"{names[function]} calls itself: Metal has no recursion")

    def waits(target):
        return any(TOGETHER.fullmatch(names.get(called) or "") for called in {target} | called_from(target))

    for number, kernel, line, ancestors in returns:
        loops = [a["id"] for a in ancestors if a["kind"] in ("ForStmt", "WhileStmt", "DoStmt")]
        for use, function, target, around in uses:
            again = any(a["id"] in loops for a in around)
            if function is kernel and (use > number or again) and waits(target):
                report(line, "no early return: other threads may wait for this one at a barrier")


def check_arrays(tree, kernels, report):
    """Arrays in threadgroup memory are declared where Metal allows it."""
    for node, line, ancestors in tree.nodes:
        if node["kind"] == "VarDecl" and "threadgroup_array<" in node.get("type", {}).get("qualType", ""):
            functions = [a.get("name") for a in ancestors if a["kind"] in ("FunctionDecl", "CXXMethodDecl")]
            scopes = [a for a in ancestors if a["kind"] == "CompoundStmt"]
            if not functions or functions[-1] not in kernels:
                report(line, f"{node.get('name')}: Metal has threadgroup variables in kernels only")
            elif len(scopes) > 1:
                report(line, f"{node.get('name')}: threadgroup variables belong to a kernel's outermost scope")


# --- The text ---------------------------------------------------------------------------------------------------------


def check_words(text, findings):
    for number, line in enumerate(text.code, 1):
        for word in re.findall(r"\b[A-Za-z_]\w*", line if not line.lstrip().startswith("#") else ""):
            if word in WORDS:
                findings.add(text.place(number), f"{word}: {WORDS[word]}")
        if re.search(r"\[\[\s*threadgroup\b|\bTG_ARG\b", line) and "define" not in line:
            findings.add(text.place(number), "threadgroup memory is no argument: declare a THREADGROUP_ARRAY")


def kernels_of(text, defines, findings):
    """The names of the kernels. Their heads are read from the preprocessed text: clang drops the attributes."""
    done = clang(text.path, defines, "-DMETALSIM_BINDINGS", "-E")
    file, line, code, lines = "", 0, "", []
    for row in done.stdout.split("\n"):
        marker = re.match(r'# (\d+) "([^"]*)"', row)
        if marker:
            file, line = marker[2], int(marker[1])
            continue
        lines += [(file, line)] * (len(row) + 1)
        code += row + "\n"
        line += 1
    names = set()
    head = r"(?:\[\[\s*kernel\b(?:[^\]]|\](?!\]))*\]\]|\bkernel\b)\s*(?:\[\[.*?\]\]\s*)?([\w ]+?)\s+(\w+)\s*\("
    for match in re.finditer(head, code):
        names.add(match[2])
        place = lines[match.start(2)]
        if match[1].split()[-1] != "void":
            findings.add(place, "a kernel returns void")
        end, depth = match.end(), 1
        while end < len(code) and depth:
            depth += (code[end] == "(") - (code[end] == ")")
            end += 1
        check_positions(code[match.end() : end - 1], place, findings)
    return names


def check_positions(parameters, place, findings):
    grid = re.findall(rf"(\w+)\s+\w+\s*\[\[\s*(?:{POSITIONS})\s*\]\]", parameters)
    if len({re.sub(r"^(u?short|uint)(\d?)$", r"\2", kind) for kind in grid}) > 1 or len(set(grid)) > 1:
        findings.add(place, f"positions in the grid have types {', '.join(grid)}: Metal wants one")
    for kind in re.findall(rf"(\w+)\s+\w+\s*\[\[\s*(?:{INDICES})\s*\]\]", parameters):
        if kind not in ("uint", "ushort"):
            findings.add(place, f"an index in a threadgroup is a uint or a ushort, not {kind}")


# --- Which files ------------------------------------------------------------------------------------------------------


def keys_of(path, defines):
    """What is compiled of a file: each place in it with the element type, and each with its text after macros, in which
    all numbers are alike."""
    own = path.read_text()
    dtype = tuple(re.findall(r"^#define (DTYPE_\w+)$", own, re.MULTILINE))
    place, number, keys = "", 0, set()
    for row in clang(path, defines, "-std=c++14", "-E").stdout.split("\n"):
        if marker := re.match(r'# (\d+) "([^"]*)"', row):
            place, number = marker[2] if marker[2] != str(path) else "", int(marker[1])
            continue
        if row.strip() and not place.startswith((str(INCLUDE), "<")):
            keys |= {(place, number, dtype), (place, number, re.sub(r"\b\d+\b", "0", row))}
        number += 1
    return keys


def distinct_files(paths, defines):
    """The files that add to what is compiled of those before them, the longest first, and one in 17 of the others."""
    of_file = {path: keys_of(path, defines) for path in paths}
    seen, chosen = set(), []
    for path in sorted(paths, key=lambda path: (-len(of_file[path]), path)):
        if not of_file[path] <= seen or zlib.crc32(path.name.encode()) % 17 == 0:
            chosen.append(path)
        seen |= of_file[path]
    return sorted(chosen)


# --- All of it --------------------------------------------------------------------------------------------------------


def lint(path, defines):
    text, findings = Text(path), Findings()
    compile_as_cpp17(text, defines, findings)
    check_words(text, findings)
    kernels = kernels_of(text, defines, findings)

    def report(line, sentence):
        findings.add(text.place(line), sentence)

    tree = Tree(text, defines, "-pedantic-errors", *WARNINGS)
    read_messages(text, tree.messages, findings, MESSAGES)
    for node, line, ancestors in tree.nodes:
        check_declaration(node, line, ancestors, report)
        check_expression(node, line, report)
    check_functions(tree, kernels, report)
    check_arrays(tree, kernels, report)
    for node, line, _ in Tree(text, defines, "-w", "-DMETALSIM_LINT").nodes:
        if node["kind"] in ("VarDecl", "ParmVarDecl", "FieldDecl", "FunctionDecl") and unqualified(type_of(node)):
            report(line, f"{node.get('name', 'a parameter')}: its pointer or reference has no address space")
    return text, findings


def unmet(text, findings):
    """What --expect misses, and what it did not expect."""
    expected = {}
    for number, line in enumerate(text.lines, 1):
        match = re.search(r"// EXPECT-ERROR: (.*)", line)
        if match:
            expected[text.place(number)] = match[1].strip()
    problems = []
    for place, words in expected.items():
        if not any(words in sentence for *where, sentence in findings.found if tuple(where) == place):
            problems.append(f"{place[0]}:{place[1]}: not found: {words}")
    for file, line, sentence in sorted(findings.found):
        if (file, line) not in expected:
            problems.append(f"{file}:{line}: not expected: {sentence}")
    return problems, len(expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--expect", action="store_true", help="the files hold injected errors")
    parser.add_argument("--distinct", action="store_true", help="leave out files of which all has been read in others")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE", help="or a folder of .metal files")
    options = parser.parse_args()
    gc.disable()  # trees have no cycles, and the collector would walk them again and again
    passed = failed = 0
    wrappers = {}
    files = [sorted(path.glob("*.metal")) if path.is_dir() else [path] for path in options.files]
    files = list(itertools.chain(*files))
    for path in distinct_files(files, options.defines) if options.distinct else files:
        text, findings = lint(path, tuple(options.defines))
        for number, line in enumerate(text.code, 1):
            if "thread_elements" in line:
                wrappers.setdefault(text.place(number)[0], text.place(number))
        if options.expect:
            problems, total = unmet(text, findings)
            passed += max(total - len(problems), 0)
        else:
            problems = findings.lines()
            passed += not problems
        failed += len(problems)
        print("".join(problem + "\n" for problem in problems), end="")
    if len(wrappers) > 1 and not options.expect:
        failed += 1
        print(f"thread_elements stands in {', '.join(sorted(wrappers))}: the layout is for one file to know")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
