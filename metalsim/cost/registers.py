"""How many registers of a lane are in use at once, in the order of the optimised code.

A compiler may find a better order, or make numbers again rather than keep them, so this is an estimate. Values that are
the same for all threads lie in registers of their own, and do not count.
"""

import re

import ir

# What lies in the registers of its operands: parts of vectors, indices of 32 bits made wider for an address, and floats
# of 16 bits, which a GPU takes as they are.
PARTS = set(
    "insertelement shufflevector extractelement bitcast freeze extractvalue insertvalue zext sext fpext".split()
)
# Made again rather than kept where the other operand is a constant; of an address, that is a part of the access.
CHEAP = set("getelementptr add sub or and xor shl".split())


class Liveness:
    """For each block, the most 16-bit registers in use at once."""

    def __init__(self, text: str, function: ir.Function):
        self.function = function
        header = text.split("\n")[function.first]
        of_lane = {name for name in function.arguments if re.search(rf"range\([^)]*\) {re.escape(name)}[,)]", header)}
        self.uniform = {name: name not in of_lane for name in function.arguments}
        self.held: dict[str, frozenset[str]] = {}
        self.most: dict[str, int] = {}
        live_in = self.flow()
        for block in function.blocks:
            live = self.live_out(block, live_in)
            most = self.weigh(live)
            for number, i in enumerate(reversed(block.instructions)):
                if number % 4 == 0:
                    most = max(most, self.weigh(live))
                self.step(live, i)
            self.most[block.label] = most

    def is_uniform(self, value: str) -> bool:
        if value in self.uniform:
            return self.uniform[value]
        made = self.function.made.get(value)
        self.uniform[value] = False
        if made and made.op == "call":
            self.uniform[value] = "@cost_threadgroup_array(" in made.operands
        elif made and made.op not in ("phi", "alloca"):
            if made.op != "load" or ir.space_of(made.operands) == "constant":
                self.uniform[value] = all(self.is_uniform(use) for use in made.uses)
        return self.uniform[value]

    def holders(self, value: str) -> frozenset[str]:
        """The values in whose registers this one lies."""
        if value not in self.held:
            made = self.function.made.get(value)
            if made is not None and (made.op in PARTS or (made.op in CHEAP and len(made.uses) == 1)):
                self.held[value] = frozenset().union(*(self.holders(use) for use in made.uses))
            else:
                self.held[value] = frozenset([value])
        return self.held[value]

    def weigh(self, live: set[str]) -> int:
        held = frozenset[str]().union(*(self.holders(value) for value in live if not self.is_uniform(value)))
        total = 0
        for value in (value for value in held if not self.is_uniform(value)):
            made = self.function.made.get(value)
            kind = ir.read_type(made.type) if made else ir.Type(1, 32, False)
            if kind.bits > 1:  # others are bits of a mask
                total += kind.elements * max(1, kind.bits // 16)
        return total

    def step(self, live: set[str], i: ir.Instruction) -> None:
        """From what is live after an instruction to what is live before it."""
        live.discard(i.result or "")
        if i.op != "phi":
            live.update(use for use in i.uses if use in self.function.made or use in self.function.arguments)

    def live_out(self, block: ir.Block, live_in: dict[str, set[str]]) -> set[str]:
        live: set[str] = set()
        for label in block.successors:
            live |= live_in[label]
            for i in self.phis[label]:
                live.discard(i.result or "")
            for i in self.phis[label]:
                live.update(value for value, source in self.sources[i] if source == block.label)
        return live

    def flow(self) -> dict[str, set[str]]:
        """What is live at the beginning of each block, its phis included."""
        blocks = self.function.blocks
        labels = {block.label for block in blocks}
        self.phis = {block.label: [i for i in block.instructions if i.op == "phi"] for block in blocks}
        self.sources = {}
        for i in (i for phis in self.phis.values() for i in phis):
            pairs = re.findall(r"\[ ([^,]+), %(\S+) \]", i.operands)
            # the first block has no label of its own
            self.sources[i] = [(v, s if s in labels else blocks[0].label) for v, s in pairs if v.startswith("%")]
        live_in: dict[str, set[str]] = {block.label: set() for block in blocks}
        changed = True
        while changed:
            changed = False
            for block in reversed(blocks):
                live = self.live_out(block, live_in)
                for i in reversed(block.instructions):
                    self.step(live, i)
                live.update(i.result or "" for i in self.phis[block.label])
                if live != live_in[block.label]:
                    live_in[block.label], changed = live, True
        return live_in
