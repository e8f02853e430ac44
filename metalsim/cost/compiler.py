#!/usr/bin/env python3
"""The compiler that metalsim uses while a kernel is counted: clang, with counters.

A text with the line "#define METALSIM_COST kernel" is compiled twice: its kernel as optimised as for a GPU, with a
counter in each block of its code, and the rest as always. The code goes to a file beside the text, .ll, which
metalsim/cost/cost.py reads. All other texts are clang's as they are.
"""

import os
import pathlib
import re
import subprocess
import sys

import ir

CLANG = os.environ.get("METALSIM_COST_CLANG", "clang-19")
# No vectors that the text does not have, for a GPU has none. spir64 has a GPU's address spaces.
OPTIMISE = "-target spir64-unknown-unknown -O2 -fno-vectorize -fno-slp-vectorize -w".split()
TRANSLATE = (
    "-ffreestanding -fno-exceptions -fno-rtti -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-fno-strict-aliasing -Xclang -cl-single-precision-constant -Xclang -disable-llvm-passes -DMETALSIM_COUNTED"
).split()
LOWER = (
    "-x ir -O1 -fPIC -march=x86-64-v3 -w".split() if os.uname().machine == "x86_64" else "-x ir -O1 -fPIC -w".split()
)


class CompileError(Exception):
    """What clang says of the text."""


def clang(*words: str, text: str | None = None) -> str:
    done = subprocess.run([CLANG, *words], input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def limits(text: str, kernel: str) -> dict[int, int]:
    """Parameters of the kernel that count threads, and what they are less than. `text` is preprocessed."""
    found = re.search(rf"kernel\s+void\s+{kernel}\s*\((.*?)\)\s*\{{", text, re.DOTALL)
    threads = re.search(r"max_total_threads_per_threadgroup\((\d+)\)", text)
    if not found:
        raise CompileError(f"the text has no kernel {kernel}\n")
    most = int(threads[1]) if threads else 1024
    known = {
        "thread_index_in_simdgroup": 32,
        "thread_index_in_threadgroup": most,
        "simdgroup_index_in_threadgroup": most // 32,
    }
    parameters = enumerate(ir.split(found[1]))
    return {n: less for n, part in parameters for name, less in known.items() if f"[[{name}]]" in part}


def optimised(path: pathlib.Path, kernel: str, language: list[str]) -> str:
    """The kernel's code. Constant memory does not change while it runs, so it may be read before a loop, and the
    positions of threads are as small as Metal says."""
    code = clang(*OPTIMISE, *TRANSLATE, *language, "-S", "-emit-llvm", "-o", "-", str(path))
    less = limits(clang(*language, "-DMETALSIM_BINDINGS", "-E", "-P", "-o", "-", str(path)), kernel)
    code = re.sub(r"^(\s+%\S+ = load .*ptr addrspace\(2\).*)$", r"\1, !invariant.load !999999", code, flags=re.M)
    lines = (code + "\n!999999 = !{}\n").split("\n")
    function = ir.read_function(code, kernel)
    for number, limit in less.items():
        value = re.escape(function.arguments[number])
        lines[function.first] = re.sub(
            rf"(i\d+)( noundef)?( {value}[,)])", rf"\1\2 range(\1 0, {limit})\3", lines[function.first]
        )
    return clang(*OPTIMISE, "-x", "ir", "-S", "-emit-llvm", "-o", "-", "-", text="\n".join(lines))


def with_counters(code: str, kernel: str, symbol: str) -> str:
    """The same for this machine, under the symbol: each lane counts the blocks that it executes."""
    function, lines = ir.read_function(code, kernel), code.split("\n")
    for number, block in enumerate(function.blocks):
        counter = f"%metalsim.{number}"
        add = [
            f"  {counter}.p = getelementptr i64, ptr %metalsim.counts, i64 {number}",
            f"  {counter}.n = load i64, ptr {counter}.p",
            f"  {counter}.m = add i64 {counter}.n, 1",
            f"  store i64 {counter}.m, ptr {counter}.p",
        ]
        if number == 0:
            add.insert(0, f"  %metalsim.counts = call ptr @cost_begin(i64 {len(function.blocks)})")
        at = next(i.line for i in block.instructions if i.op not in ("phi", "alloca"))
        lines[at] = "\n".join([*add, lines[at]])
    text = "\n".join(lines) + "\ndeclare ptr @cost_begin(i64)\n"
    text = re.sub(r"^target (?:datalayout|triple) = .*\n", "", text, flags=re.M)
    text = text.replace(f"@{function.symbol}(", f"@{symbol}(")
    return re.sub(r"\bspir_(?:func|kernel) ", "", text)


def compile_counted(words: list[str], unit: pathlib.Path, kernel: str) -> None:
    """`words` are metalsim's: they end with the text, -o and the object."""
    files = {suffix: str(unit.with_suffix(suffix)) for suffix in (".ll", ".native.o", ".counted.o")}
    begin = words.index("-x")
    code = optimised(unit.with_suffix(".metal"), kernel, words[begin : words.index("-w", begin) + 1])
    pathlib.Path(files[".ll"]).write_text(code)
    clang(*words[:-3], f'-DMETALSIM_CODE="{files[".ll"]}"', str(unit), "-o", files[".native.o"])
    symbols = subprocess.run(["nm", files[".native.o"]], check=True, capture_output=True, text=True).stdout
    found = re.search(rf" W (\S*{kernel}\S*)$", symbols, re.M)
    if not found:
        raise CompileError(f"{kernel} is not a weak symbol of its library\n")
    clang(*LOWER, "-c", "-o", files[".counted.o"], "-", text=with_counters(code, kernel, found[1]))
    clang(words[0], "-nostdlib", "-r", files[".native.o"], files[".counted.o"], *words[-2:])


def main() -> int:
    words = sys.argv[1:]
    units = [word for word in words if word.endswith(".cpp")]
    found = re.search(r"^#define METALSIM_COST (\w+)$", pathlib.Path(units[0]).read_text(), re.M) if units else None
    if not found or "-E" in words:
        os.execvp(CLANG, [CLANG, *words])
    try:
        compile_counted(words, pathlib.Path(units[0]), found[1])
    except CompileError as error:
        sys.stderr.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
