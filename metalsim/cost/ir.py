"""Reads a function of LLVM's intermediate representation from its text: blocks, instructions, types.

It reads what clang-19 writes, not all of the language. Values are named as in the text, "%name".
"""

import dataclasses
import re

VALUE = re.compile(r'%(?:"[^"]+"|[-\w.$]+)')
LABEL = re.compile(r'^("[^"]+"|[-\w.$]+):')
FLAGS = re.compile(
    r"^(?:nuw|nsw|nusw|exact|disjoint|nneg|fast|nnan|ninf|nsz|arcp|contract|afn|reassoc|samesign|inbounds|volatile|"
    r"noundef|signext|zeroext|range\([^)]*\)|nofpclass\([^)]*\))\s+"
)
CASTS = "fpext fptrunc zext sext trunc bitcast uitofp sitofp fptoui fptosi ptrtoint inttoptr addrspacecast".split()
SPACES = {"1": "device", "2": "constant", "3": "threadgroup"}


@dataclasses.dataclass(eq=False)
class Instruction:
    result: str | None
    op: str
    operands: str  # the text after the operation and its flags
    uses: list[str]
    line: int
    type: str = "void"  # of the result


@dataclasses.dataclass(eq=False)
class Block:
    label: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    successors: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Function:
    symbol: str
    arguments: list[str]
    blocks: list[Block]
    first: int  # the line of `define`
    made: dict[str, Instruction]  # by the name of the result
    users: dict[str, list[Instruction]]


@dataclasses.dataclass(frozen=True)
class Type:
    elements: int
    bits: int  # of one
    floating: bool


def split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def without_flags(text: str) -> str:
    while found := FLAGS.match(text):
        text = text[found.end() :]
    return text


def type_at(text: str) -> str:
    """The type with which the text begins."""
    text, depth = without_flags(text.strip()), 0
    if text[0] in "<[{":
        for at, letter in enumerate(text):
            depth += (letter in "<[{") - (letter in ">]}")
            if depth == 0:
                return text[: at + 1]
    found = re.match(r"ptr addrspace\(\d+\)|[^\s,]+", text)
    return found[0] if found else text


def read_type(text: str) -> Type:
    """A pointer to threadgroup memory has 32 bits, others have 64."""
    if found := re.match(r"<(\d+) x (.+)>$|\[(\d+) x (.+)\]$", text):
        inner = read_type(found[2] or found[4])
        return dataclasses.replace(inner, elements=inner.elements * int(found[1] or found[3]))
    if text.startswith("ptr"):
        return Type(1, 32 if space_of(text) in ("threadgroup", "private") else 64, False)
    if text in ("half", "bfloat", "float", "double"):
        return Type(1, {"float": 32, "double": 64}.get(text, 16), True)
    return Type(1, int(text[1:]) if re.match(r"i\d+$", text) else 32, False)


def space_of(text: str) -> str:
    """The address space of the pointer that the text has."""
    found = re.search(r"ptr addrspace\((\d+)\)", text)
    return SPACES.get(found[1], "private") if found else "private"


def result_type(op: str, operands: str) -> str:
    if op in CASTS:
        return operands.split(" to ")[-1].strip()
    if op in ("icmp", "fcmp"):
        compared = read_type(type_at(operands.split(" ", 1)[1]))
        return "i1" if compared.elements == 1 else f"<{compared.elements} x i1>"
    if op == "select":
        return type_at(split(operands)[1])
    if op == "getelementptr":
        return type_at(split(operands)[1])
    if op == "extractelement":
        return type_at(operands).split(" x ", 1)[1][:-1]
    if op == "load":
        return type_at(split(operands)[0])
    return type_at(operands)


def read_instruction(text: str, line: int) -> Instruction:
    text = re.sub(r", !(?:\S+ !\S+|\S+)", "", text)
    text = re.sub(r"\s#\d+\b", "", text)
    result, _, rest = text.partition(" = ") if re.match(r"%\S+ = ", text) else ("", "", text)
    rest = re.sub(r"^(?:tail|musttail|notail) call", "call", rest)
    op, _, operands = rest.partition(" ")
    operands = without_flags(operands.strip())
    instruction = Instruction(result or None, op, operands, VALUE.findall(operands), line)
    if result:
        instruction.type = result_type(op, operands)
    return instruction


def read_function(text: str, name: str) -> Function:
    """The function whose symbol contains the name."""
    lines = text.split("\n")
    first = next(n for n, line in enumerate(lines) if re.match(rf"define .*@[^(]*{name}", line))
    header = lines[first]
    found = re.search(r'@("[^"]+"|[^(]+)\((.*)\)', header)
    if not found:
        raise ValueError(f"{header}: not the beginning of a function")
    arguments = [VALUE.findall(part)[-1] for part in split(found[2]) if VALUE.search(part)]
    blocks, number = [Block("entry")], first + 1
    while lines[number] != "}":
        line = lines[number].strip()
        begin = number
        if label := LABEL.match(lines[number]):
            blocks.append(Block(label[1]))
        elif line and not line.startswith(";"):
            if line.startswith("switch"):
                while not line.endswith("]"):
                    number += 1
                    line += " " + lines[number].strip()
            blocks[-1].instructions.append(read_instruction(line, begin))
        number += 1
    blocks = [block for block in blocks if block.instructions]
    for block in blocks:
        last = block.instructions[-1]
        if last.op in ("br", "switch"):
            block.successors = [to[1:] for to in re.findall(r"label (%[^\s,\]]+)", last.operands)]
    made = {i.result: i for block in blocks for i in block.instructions if i.result}
    users: dict[str, list[Instruction]] = {}
    for block in blocks:
        for instruction in block.instructions:
            for use in instruction.uses:
                users.setdefault(use, []).append(instruction)
    return Function(found[1], arguments, blocks, first, made, users)
