"""From counts to cycles of one of the four schedulers that a core of an Apple GPU has.

Rates marked "measured" are of github.com/philipturner/metal-benchmarks; the others were chosen so that the published
measurements of docs/metal-kernels.md come out.
"""

import collections
from collections.abc import Mapping

FAMILIES = {7: "M1", 9: "M3"}
PRODUCT = {
    7: 16.3,
    9: 16.0,
}  # cycles of a product: 512 multiply-adds on 32 lanes take 16 at least, and about 17 measured
IDEAL = 16.0
SCHEDULERS = 4  # of a core

# class: cycles in which the scheduler is taken, and in which the pipe for integer products and functions is
CYCLES: dict[str, tuple[float, float]] = {
    "f32": (1, 0),  # measured
    "f16": (1, 0),  # measured
    "select": (1, 0),  # measured
    "i32": (1, 0),  # measured
    "convert": (0, 0),
    "convert int": (2, 4),  # measured
    "exp2": (2, 4),  # measured: one and three products together take 5.2
    "recip": (2, 6),  # measured
    "i32 mul": (2, 4),  # measured
    "i32 mulhi": (4, 8),  # measured: 8, twice as many as a product's
    "shift": (2, 4),  # measured
    "i64": (4, 0),  # measured
    "i64 mul": (8, 16),  # measured
    "i64 shift": (4, 8),
    "division": (12, 20),
    "i64 division": (150, 0),  # where a compiler expands it; Mesa's for these GPUs takes several times as many
    "shuffle": (2, 0),  # measured
    "reduction": (14.5, 0),  # measured
    "vote": (2, 0),
    "branch": (2, 0),
    "threadgroup load": (1, 0),
    "threadgroup store": (1, 0),
    "device load": (1, 0),
    "device store": (1, 0),
    "private load": (2, 0),
    "private store": (1, 0),
    "barrier": (2, 0),
}
# M3 and later issue to several pipes at once, so that a part of this work costs nothing.
SHOWN_M3 = {
    "i32": 0.3,
    "shift": 0.3,
    "i32 mul": 0.5,
    "i32 mulhi": 0.5,
    "i64": 0.3,
    "i64 mul": 0.5,
    "select": 0.5,
    "exp2": 0.5,
    "branch": 0.5,
}
THREADGROUP_BYTES = 32  # of threadgroup memory in a cycle, for one scheduler


def cycles(counts: Mapping[str, float], family: int) -> float:
    """Cycles in which a scheduler executes these instructions of simdgroups, if it never waits."""
    issue = counts.get("mma", 0) * PRODUCT[family]
    functions = 0.0
    for name, number in counts.items():
        scheduler, pipe = CYCLES.get(name, (0, 0))
        issue += number * scheduler * (SHOWN_M3.get(name, 1) if family >= 9 else 1)
        functions += number * pipe
    moved = 32 * (counts.get("threadgroup load bytes", 0) + counts.get("threadgroup store bytes", 0))
    return max(issue, functions, moved / THREADGROUP_BYTES)


def share(counts: Mapping[str, float], useful: float, family: int) -> float:
    """Per cent of the ALU's cycles that useful products take."""
    return 100 * IDEAL * useful / cycles(counts, family)


def total(executed: Mapping[str, int], classes: Mapping[str, Mapping[str, int]]) -> collections.Counter[str]:
    """The instructions of all blocks; `executed` says how often each was."""
    counts: collections.Counter[str] = collections.Counter()
    for block, times in executed.items():
        for name, number in classes[block].items():
            counts[name] += times * number
    return counts
