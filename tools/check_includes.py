"""Checks the direction of includes: base <- core <- backends <- mfa.c and backends.c; never upward, never sideways.

    tools/check_includes.py [ROOT]

Includes are written from src/ (tests: from tests/), so that each names the module of the file.
"""

import fnmatch
import pathlib
import re
import sys

import tree

# File pattern, headers of ours that it may include, system headers that it may not. The first row that matches counts.
# {folder} is the file's own, as it is written in an include.
MACHINE = ("immintrin.h", "arm_neon.h", "cpuid.h")
SYSTEM = ("pthread.h", "stdio.h", "stdlib.h", "errno.h", "unistd.h")
RULES = (
    ("include/mfa.h", (), MACHINE + SYSTEM),
    ("src/cpu/kernels/*", ("cpu/kernels/*", "core/args.h", "core/codes.h", "core/philox.h", "core/*.inc"), SYSTEM),
    ("src/*/kernels/*", ("{folder}/*", "core/args.h", "core/codes.h", "core/philox.h", "core/*.inc"), SYSTEM),
    ("src/base/*", ("mfa.h", "base/*"), MACHINE),
    ("src/core/*", ("mfa.h", "base/*", "core/*"), MACHINE),
    ("src/mfa.c", ("mfa.h", "base/*", "core/*"), (*MACHINE, "pthread.h", "stdio.h", "errno.h")),
    ("src/backends.c", ("core/backend.h", "*/backend.h"), MACHINE + SYSTEM),
    ("src/xla/*", ("mfa.h", "base/*", "core/operand.h", "xla/*"), MACHINE),
    ("src/*/*", ("mfa.h", "base/*", "core/*", "{folder}/*"), ()),
    ("tests/reference/*", ("mfa.h", "reference/*", "support/*"), MACHINE),
    ("tests/support/*", ("mfa.h", "reference/*", "support/*"), MACHINE),
    ("tests/check_[ai]*", ("mfa.h", "reference/*", "support/*"), MACHINE),
    ("tests/*", ("*",), ()),
    # The software Metal is a program of its own, which uses only base of the library. Kernels are compiled with its
    # include folder; its tests and its CUDA part count as tests.
    ("metalsim/include/*", ("metalsim/*",), SYSTEM),
    ("metalsim/tests/*", ("*",), ()),
    ("metalsim/cuda/*", ("*",), ()),
    ("metalsim/*", ("[!/]*.h", "*.inc", "include/metalsim/*", "base/*", "mfa.h"), ()),
    ("bench/*", ("mfa.h",), ()),
    ("examples/*", ("mfa.h",), MACHINE),
    ("tools/macos/sdk/*", (), MACHINE),
)
# Where includes are looked for. metalsim and its parts may also name files of their own folder.
TOPS = ("src", "include", "tests", ".", "metalsim", "metalsim/include")


def rule_of(path):
    for pattern, ours, not_system in RULES:
        if fnmatch.fnmatch(str(path), pattern):
            folder = "/".join(path.parts[1:-1])
            return [allowed.format(folder=folder) for allowed in ours], not_system
    return None


def check_file(root, path, report):
    rule = rule_of(path)
    if rule is None:
        report.check(False, f"{path}: no rule says what this file may include (tools/check_includes.py)")
        return
    ours, not_system = rule
    problems = []
    for number, line in enumerate((root / path).read_text().splitlines(), 1):
        match = re.match(r'\s*#\s*include\s+(["<])([^">]+)[">]', line)
        if not match:
            continue
        quote, name = match.groups()
        where = f"{path}:{number}: includes {name}"
        if quote == "<":
            if name in not_system:
                problems.append(f"{where}, which is not for this module")
        elif not any(fnmatch.fnmatch(name, allowed) for allowed in ours):
            problems.append(f"{where}; it may include {', '.join(ours) or 'nothing of ours'}")
        elif not any((root / top / name).is_file() for top in TOPS) and not (root / path.parent / name).is_file():
            problems.append(f"{where}, which is not there; includes are written from src/")
    report.check(not problems, "\n".join(problems))


def main():
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else tree.default_root()
    report = tree.Report()
    for path in tree.files(root, ".c", ".h", ".inc"):
        check_file(root, path, report)
    # One file of the package loads the library, and one accesses torch's memory.
    for path in tree.files(root / "python", ".py"):
        text = (root / "python" / path).read_text()
        for word, owner in (("import ctypes", "library.py"), ("data_ptr(", "tensors.py")):
            report.check(path.name == owner or word not in text, f"python/{path}: {word}: that is the work of {owner}")
    report.finish()


if __name__ == "__main__":
    main()
