"""Checks that compilers keep the sums of matrix products in registers: reads the disassembly of the CPU kernels.

    tools/check_registers.py [--objdump PROGRAM] BUILD_FOLDER

A product is an innermost loop with many sums that is mostly multiply-adds. One of its sums, or one in 12, may lie on
the stack, and in each object the largest one has as many as the largest register tile of its instruction set.
"""

import argparse
import pathlib
import re
import subprocess
import sys

SUMS = {"avx2": 12, "avx512": 24, "neon": 24}  # rows * vectors of the tile (src/cpu/kernels/simd/*.h)
MIN_SUMS = 6  # sums of a product; a polynomial has one for each vector
MIN_SHARE = 0.3  # of the loop that are multiply-adds

X86 = {
    "multiply": re.compile(r"(?:vfn?m(?:add|sub)\d+p[sd]|vdpbf16ps|vpdpbusd)\b.*?%(\w+)$"),
    "vector": re.compile(r"%[xyz]mm"),
    "stack": re.compile(r"\(%rsp"),
    "frame": re.compile(r"\(%rbp"),
    "framed": re.compile(r"mov\s+%rsp,%rbp"),
    "place": re.compile(r"[-\w]*\(%r[sb]p[^)]*\)"),
    "jump": re.compile(r"j\w+\s+([0-9a-f]+)\b"),
}
ARM64 = {
    "multiply": re.compile(r"(?:fml[as]|bfdot|bfmmla|usdot)\s+(v\d+)\."),
    "vector": re.compile(r"\b[qv]\d+"),
    "stack": re.compile(r"\[sp\b"),
    "frame": re.compile(r"\[x29\b"),
    "framed": re.compile(r"mov\s+x29, sp|add\s+x29, sp"),
    "place": re.compile(r"\[(?:sp|x29)[^]]*\]"),
    "jump": re.compile(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, \S+,)\s+([0-9a-f]+)\b"),
}


def functions(text):
    """(name, [(address, instruction)]) of each function."""
    name, body = None, []
    for line in text.splitlines():
        head = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        code = re.match(r"\s*([0-9a-f]+):\s+(\S.*?)\s*$", line)
        if head:
            if name:
                yield name, body
            name, body = head.group(1), []
        elif code:
            body.append((int(code.group(1), 16), code.group(2)))
    if name:
        yield name, body


def loops(body, isa):
    """The instructions of each loop without another jump in it."""
    places = {address: number for number, (address, _) in enumerate(body)}
    after_jump = 0
    for number, (address, code) in enumerate(body):
        jump = isa["jump"].match(code)
        if not jump:
            continue
        begin = places.get(int(jump.group(1), 16))
        if begin is not None and after_jump <= begin <= number:
            yield address, [code for _, code in body[begin : number + 1]]
        after_jump = number + 1


def products(text, isa):
    """(where, count of sums, places of vectors on the stack) of each product."""
    for name, body in functions(text):
        framed = any(isa["framed"].match(code) for _, code in body[:12])
        for address, loop in loops(body, isa):
            sums = [found.group(1) for found in map(isa["multiply"].match, loop) if found]
            if len(set(sums)) < MIN_SUMS or len(sums) < MIN_SHARE * len(loop):
                continue
            spilled = set()
            for code in filter(isa["vector"].search, loop):
                if isa["stack"].search(code) or (framed and isa["frame"].search(code)):
                    spilled.add(isa["place"].search(code).group())
            yield f"{name} at {address:x}", len(set(sums)), spilled


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("build", type=pathlib.Path)
    options = parser.parse_args()
    passed, failed = 0, 0
    for path in sorted(options.build.glob("CMakeFiles/mfa_objects.dir/src/cpu/kernels/*.c.o")):
        name = path.name.removesuffix(".c.o")
        expected = next((sums for isa, sums in SUMS.items() if name.startswith(isa)), None)
        command = (options.objdump, "-d", "--no-show-raw-insn", path)
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = list(products(text, ARM64 if "aarch64" in text.splitlines()[1] else X86))
        if not expected or not (found or "fm" in text):  # scalar, or a set for another machine
            continue
        problems = [
            f"{where}: of {sums} sums and their operands {len(spilled)} vectors lie on the stack"
            for where, sums, spilled in found
            if len(spilled) > max(1, sums // 12)
        ]
        most = max((sums for _, sums, _ in found), default=0)
        if most < expected:
            problems.append(f"the largest product has {most} sums in registers, not {expected}")
        for problem in problems:
            print(f"{path.name}: {problem}")
        passed, failed = passed + (not problems), failed + bool(problems)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
