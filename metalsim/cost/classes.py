"""What each instruction of the optimised code is on an Apple GPU.

An instruction of LLVM is none, one or several of a GPU: a product and the sum that takes it are one, so are a
comparison and the select or branch that takes it; addresses with constant offsets, or with a 32-bit index in device
memory, are part of the load; 16-bit floats are operands as they are; neighbours in memory are loaded as vectors.
"""

import collections
import re

import ir

Counts = collections.Counter[str]

NOTHING = set(
    "phi fneg bitcast extractelement insertelement shufflevector freeze ret unreachable ptrtoint inttoptr alloca "
    "addrspacecast extractvalue insertvalue".split()
)
OPERATIONS = {  # calls of metalsim/include/metalsim/counted.h
    "cost_multiply_add": "mma",
    "cost_shuffle": "shuffle",
    "cost_shuffle_xor": "shuffle",
    "cost_ballot": "vote",
    "cost_mulhi": "i32 mulhi",
    "cost_threadgroup_barrier": "barrier",
    "cost_simdgroup_barrier": "simdgroup barrier",
    "cost_own_lane": "",
    "cost_threadgroup_array": "",  # a constant address
}
INTRINSICS: tuple[tuple[str, dict[str, int]], ...] = (  # a part of the name, classes of one element
    (r"(?:exp|log)2\.", {"exp2": 1}),
    (r"(?:exp|log)\.", {"exp2": 1, "f32": 1}),
    (r"(?:tanh|pow|sin|cos)\.", {"exp2": 3, "f32": 20}),
    (r"sqrt\.", {"recip": 1}),
    (r"(?:max|min)num\.|maximum\.|minimum\.|fma\.|fmuladd\.", {"float": 1}),
    (r"fabs\.|copysign\.|assume|lifetime|experimental", {}),
    (r"[us]?(?:max|min)\.i64", {"i64": 1, "select": 2}),
    (r"[us](?:max|min)\.", {"select": 1}),
    (r".*\.i64", {"i64": 1}),
    (r"abs\.|ctpop\.|fsh|[us](?:add|sub)\.sat\.|ct[lt]z\.|bitreverse\.|(?:floor|ceil|trunc|rint|round)", {"i32": 1}),
)
FLOATING_USERS = {"fadd", "fsub", "fmul", "fneg", "fcmp", "fdiv", "select"}


class Classifier:
    """The classes of a function's instructions."""

    def __init__(self, function: ir.Function):
        self.function = function
        self.classes: dict[ir.Instruction, Counts] = {}
        self.fused: set[ir.Instruction] = set()  # products that are part of a sum
        for block in function.blocks:
            for instruction in block.instructions:
                self.classes[instruction] = self.classify(instruction)
        for product in self.fused:
            self.classes[product].clear()
        for block in function.blocks:
            self.merge_neighbours(block)

    def users(self, instruction: ir.Instruction) -> list[ir.Instruction]:
        return self.function.users.get(instruction.result or "", [])

    def classify(self, i: ir.Instruction) -> Counts:
        kind = ir.read_type(i.type)
        n, wide = kind.elements, kind.bits == 64
        number = "f32" if kind.bits == 32 else "f16"
        if i.op in NOTHING:
            return Counts()
        if i.op in ("fadd", "fsub", "fmul", "fdiv"):
            if i.op in ("fadd", "fsub"):
                self.fuse(i)
            return Counts({number: n, "recip": n}) if i.op == "fdiv" else Counts({number: n})
        if i.op in ("fptrunc", "fpext"):
            takes_halves = i.op == "fpext" and all(self.is_floating(user) for user in self.users(i))
            return Counts() if takes_halves else Counts({"convert": n})
        if i.op in ("uitofp", "sitofp", "fptoui", "fptosi"):
            return Counts({"convert int": n})
        if i.op in ("icmp", "fcmp"):
            return self.classify_comparison(i, n)
        if i.op == "select":
            return Counts({"select": 2 * n if wide else n})
        if i.op in ("add", "sub", "and", "or", "xor"):
            return Counts({"i64" if wide else "select" if kind.bits == 1 else "i32": n})
        if i.op == "mul":
            return Counts({"i64 mul" if wide else "i32 mul": n})
        if i.op in ("shl", "lshr", "ashr"):
            return self.classify_shift(i, n, wide)
        if i.op in ("udiv", "sdiv", "urem", "srem"):
            constant = re.search(r", (\d+)$", i.operands)
            if constant and int(constant[1]).bit_count() == 1:  # sign, sum, shift
                return Counts({"i32": n, "shift": 2 * n})
            return Counts({"i64 division" if wide else "division": n})
        if i.op in ("zext", "sext", "trunc"):
            part = not wide or all(user.op in ("getelementptr", "mul") for user in self.users(i))
            return Counts() if part else Counts({"i32" if i.op == "zext" else "shift": n})
        if i.op == "getelementptr":
            return self.classify_address(i)
        if i.op in ("load", "store"):
            return self.classify_access(i)
        if i.op == "call":
            return self.classify_call(i, kind)
        if i.op in ("br", "switch"):
            return Counts({"branch": 2 if i.op == "switch" else int(i.operands.startswith("i1 "))})
        raise ValueError(f"{i.op} {i.operands}: metalsim/cost knows no such instruction")

    def is_floating(self, i: ir.Instruction) -> bool:
        return i.op in FLOATING_USERS or (i.op == "call" and "@llvm." in i.operands)

    def fuse(self, total: ir.Instruction) -> None:
        for use in total.uses:
            product = self.function.made.get(use)
            if product and product.op == "fmul" and product not in self.fused:
                if all(user is total for user in self.users(product)):
                    self.fused.add(product)
                    return

    def classify_comparison(self, i: ir.Instruction, n: int) -> Counts:
        compared = ir.read_type(ir.type_at(i.operands.split(" ", 1)[1]))
        if i.op == "icmp" and compared.bits == 64:
            return Counts({"i64": n})
        users = self.users(i)
        if len(users) == 1 and (users[0].op == "br" or (users[0].op == "select" and users[0].uses[0] == i.result)):
            return Counts()
        return Counts({"select": n})

    def classify_shift(self, i: ir.Instruction, n: int, wide: bool) -> Counts:
        constant = re.search(r", (\d+)$", i.operands)
        amount = int(constant[1]) if constant else -1
        if wide:
            return Counts({"i64 shift": n})
        if i.op == "shl" and 0 <= amount <= 4:
            if all(user.op in ("add", "sub", "or", "getelementptr") for user in self.users(i)):
                return Counts()  # a part of the sum
        return Counts({"i32": n} if amount == 16 else {"shift": n})  # halves of a register have names

    def classify_address(self, i: ir.Instruction) -> Counts:
        space, counts, variable = ir.space_of(i.type), Counts(), False
        for index in ir.split(i.operands)[2:]:
            value = ir.VALUE.search(index)
            if not value:
                continue
            variable = True
            source = self.function.made.get(value[0])
            narrow = source is not None and source.op in ("zext", "sext")
            if space in ("threadgroup", "private"):
                counts["i32"] += 1
            elif not (narrow and all(user.op in ("load", "store") for user in self.users(i))):
                counts["i64"] += 1
        if not variable:  # the offset is a part of the access, unless the address itself is kept
            if space == "device" and any(user.op not in ("load", "store", "getelementptr") for user in self.users(i)):
                counts["i64"] += 1
            elif space != "device" and any(user.op == "phi" for user in self.users(i)):
                counts["i32"] += 1
        return counts

    def classify_access(self, i: ir.Instruction) -> Counts:
        kind, space = ir.read_type(ir.type_at(i.operands)), ir.space_of(i.operands)
        if space == "constant":
            return Counts({"constant load": 1})
        size = kind.elements * kind.bits // 8
        return Counts({f"{space} {i.op}": max(1, (size + 15) // 16), f"{space} {i.op} bytes": size})

    def classify_call(self, i: ir.Instruction, kind: ir.Type) -> Counts:
        called = re.search(r"@([\w.]+)\(", i.operands)
        name = called[1] if called else ""
        if name.startswith("cost_"):
            operation = OPERATIONS.get(name, "reduction")
            return Counts({operation: 1} if operation else {})
        if re.match(r"llvm\.mem(?:set|cpy)", name):
            size = re.search(r"i64 (\d+)", i.operands)
            return Counts({"private store": int(size[1]) // 8 if size else 1})
        for pattern, classes in INTRINSICS:
            if re.match(r"llvm\.(?:vector\.)?(?:" + pattern + ")", name):
                number = "f32" if kind.bits == 32 else "f16"
                return Counts({key if key != "float" else number: kind.elements * n for key, n in classes.items()})
        raise ValueError(f"call {i.operands}: metalsim/cost knows no such function")

    def place(self, value: str) -> tuple[str, int]:
        """Of an address: what it is counted from, and the constant offset."""
        offset = 0
        while (made := self.function.made.get(value)) and made.op == "getelementptr":
            element, pointer, *indices = ir.split(made.operands)
            if len(indices) != 1 or ir.VALUE.search(indices[0]):
                break
            kind = ir.read_type(element)
            offset += int(indices[0].split()[-1]) * kind.elements * kind.bits // 8
            value = ir.VALUE.findall(pointer)[-1]
        return value, offset

    def merge_neighbours(self, block: ir.Block) -> None:
        """Accesses to neighbours, between two barriers, are one of up to 16 bytes."""
        stretch = 0
        groups: dict[tuple[str, str, int, int], list[tuple[int, ir.Instruction]]] = {}
        for i in block.instructions:
            counts = self.classes[i]
            stretch += "barrier" in counts
            for name in ("device load", "device store", "threadgroup load", "threadgroup store"):
                if name in counts:
                    root, offset = self.place(i.uses[-1])
                    key = (name, root, stretch, counts[name + " bytes"])
                    groups.setdefault(key, []).append((offset, i))
        for (name, _, _, size), members in groups.items():
            members.sort(key=lambda member: member[0])
            first, last = members[0][1], members[0][0]
            length = size
            for offset, i in members[1:]:
                if offset == last + size:
                    length += size
                    self.classes[i][name] = 0
                    self.classes[first][name] = (length + 15) // 16
                else:
                    first, length = i, size
                last = offset
