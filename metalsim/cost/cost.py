"""What the Metal kernels cost on an Apple GPU, by a model: the table of docs/metal-kernels.md.

    metalsim/cost/cost.py PROGRAM                prints the table
    metalsim/cost/cost.py PROGRAM --write FILE   puts it into the file, between its two marks
    metalsim/cost/cost.py PROGRAM --check FILE   fails if a share is more than a point below the file's

PROGRAM is tests/metal/metal_cost.c's, which runs the kernels. --quick takes some of its cases, --only those whose line
contains a text. Nothing is measured: see docs/metal-kernels.md, "The model".
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import ir
import model
from classes import Classifier
from registers import Liveness

MARKS = "<!-- made by metal-cost -->\n", "<!-- end of metal-cost -->\n"
TOLERANCE = 1.0  # points
SLOWER = 1.03  # times as many cycles a key
QUICK = (
    "attention_forward f16 64 full",
    "attention_forward f16 64 map",
    "attention_forward f16 64 packed",
    "attention_decode f16 128 paged",
    "attention_decode f16 128 int8",
    "attention_decode_vector f16 128 1-head",
    "attention_backward_dq f16 64 full",
    "attention_backward_dkv f16 64 dropout",
)
COLUMNS = {  # of instructions: classes that are added
    "float": ("f32", "f16"),
    "exp2": ("exp2", "recip"),
    "select": ("select",),
    "i32": ("i32", "shift", "i32 mul", "i32 mulhi", "division"),
    "i64": ("i64", "i64 mul", "i64 shift", "i64 division"),
    "branch": ("branch",),
    "tg load": ("threadgroup load",),
    "barrier": ("barrier",),
}
HEADER = (
    "GPU | kernel | dtype | columns | problem | block_q x block_kv | simdgroups | M1 % | M3 % | cycles a key | "
    + " | ".join(COLUMNS)
    + " | i64 in loops | i64 divisions | registers"
).split(" | ")
NAMES = HEADER.index("block_q x block_kv")  # cells before it say what is counted


@dataclasses.dataclass
class Case:
    number: int
    kernel: str
    family: int
    dtype: str
    columns: int
    problem: str
    block: str
    simdgroups: str
    useful: float  # products
    keys: int

    def name(self) -> str:
        """Of the case on any GPU."""
        return f"{self.kernel} {self.dtype} {self.columns} {self.problem}"


@dataclasses.dataclass
class Cost:
    counts: collections.Counter[str]  # of all simdgroups
    loop: collections.Counter[str]  # of what is executed more often than once
    divisions: int  # of 64 bits, in the code
    registers: int  # of 16 bits


def read_cases(program: str) -> list[Case]:
    listed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    cases = []
    for line in listed.splitlines():
        n, kernel, family, dtype, columns, problem, block, groups, useful, keys = line.split()
        case = Case(int(n), kernel, int(family), dtype, int(columns), problem, "", "", float(useful), int(keys))
        case.block, case.simdgroups = (words.replace("x", " x ") for words in (block, groups))
        cases.append(case)
    return cases


def count(program: str, case: Case) -> Cost:
    """Runs the case with counters in its kernel."""
    with tempfile.TemporaryDirectory() as folder:
        counts = pathlib.Path(folder, "counts")
        compiler = pathlib.Path(__file__).with_name("compiler.py").resolve()
        environment = {"METALSIM_CLANG": str(compiler), "MFA_CACHE": folder, "METALSIM_COUNTS": str(counts)}
        subprocess.run([program, str(case.number)], check=True, env={**os.environ, **environment})
        code, simdgroups, *times = counts.read_text().split()
        return evaluate(pathlib.Path(code).read_text(), case.kernel, int(simdgroups), [int(n) for n in times])


def evaluate(text: str, kernel: str, simdgroups: int, times: list[int]) -> Cost:
    function = ir.read_function(text, kernel)
    classifier, liveness = Classifier(function), Liveness(text, function)
    per_block = {}
    for block in function.blocks:
        per_block[block.label] = sum((classifier.classes[i] for i in block.instructions), collections.Counter())
    executed = dict(zip(per_block, times, strict=True))
    loops = {label: n if n > simdgroups else 0 for label, n in executed.items()}
    used = [label for label, n in executed.items() if n]
    return Cost(
        counts=model.total(executed, per_block),
        loop=model.total(loops, per_block),
        divisions=sum(counts["i64 division"] for counts in per_block.values()),
        registers=max(liveness.most[label] for label in used),
    )


def row(case: Case, cost: Cost, families: list[int]) -> list[str]:
    """Cells of the table, for the families that run the case so."""
    cells = [", ".join(model.FAMILIES[family] for family in families)]
    cells += [f"`{case.kernel}`", case.dtype, str(case.columns), case.problem, case.block, case.simdgroups]
    for family in model.FAMILIES:
        cells.append(f"{model.share(cost.counts, case.useful, family):.1f}" if family in families else "")
    cycles = model.cycles(cost.counts, case.family) / case.keys / model.SCHEDULERS
    cells.append(f"{cycles:.1f}" if "decode" in case.kernel else "")
    for classes in COLUMNS.values():
        cells.append(f"{sum(cost.counts[name] for name in classes) / case.useful:.3f}")
    cells.append(f"{sum(cost.loop[name] for name in COLUMNS['i64']) / case.useful:.3f}")
    return [*cells, str(cost.divisions), str(cost.registers)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def table_of(path: pathlib.Path) -> tuple[str, str, str]:
    """The file's text: before the table, the table, and after it."""
    before, begin, rest = path.read_text().partition(MARKS[0])
    table, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"{path}: it has not both of {MARKS[0].strip()} and {MARKS[1].strip()}")
    return before + begin, table, end + after


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of each row, by those that say what is counted."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line]
    return {" ".join(cells[:NAMES]).replace("`", ""): cells for cells in rows}


def check(path: pathlib.Path, made: str, whole: bool) -> int:
    """Compares with the file's table; prints what is worse, and N passed, N failed."""
    rows, old = rows_of(made), rows_of(table_of(path)[1])
    problems: dict[str, list[str]] = {}
    shares = [HEADER.index(f"{name} %") for name in model.FAMILIES.values()]
    cycles, divisions = HEADER.index("cycles a key"), HEADER.index("i64 divisions")
    for name, cells in rows.items():
        worse = problems[name] = []
        if name not in old:
            worse.append(f"{path} has no such row; make metal-cost writes it")
            continue
        before = old[name]
        for column in (column for column in shares if cells[column]):
            if float(cells[column]) < float(before[column]) - TOLERANCE:
                worse.append(f"{HEADER[column]} is {cells[column]}, and {before[column]} in {path}")
        if cells[cycles] and float(cells[cycles]) > float(before[cycles]) * SLOWER:
            worse.append(f"it takes {cells[cycles]} cycles a key, and {before[cycles]} in {path}")
        if int(cells[divisions]) > int(before[divisions]):
            worse.append(f"it has {cells[divisions]} divisions of 64 bits, and {before[divisions]} in {path}")
    if whole:
        problems |= {name: [f"{path} has the row, and no case makes it"] for name in old if name not in rows}
    for name, lines in problems.items():
        print("".join(f"{name}: {text}\n" for text in lines), end="")
    failed = sum(1 for lines in problems.values() if lines)
    print(f"{len(problems) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    options = parser.parse_args()
    if options.write and (options.quick or options.only):
        parser.error("--write is for all cases; --quick and --only take some")
    cases = read_cases(options.program)
    if missing := set(QUICK) - {case.name() for case in cases}:
        parser.error(f"{options.program} has no case {', '.join(sorted(missing))}, which --quick names")
    newer = {case.name() for case in cases if case.family == 9}
    chosen = [case for case in cases if options.only in case.name()]
    if options.quick:
        chosen = [case for case in chosen if case.name() in QUICK]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        costs = list(pool.map(lambda case: count(options.program, case), chosen))
    table = line(HEADER) + line(["---"] * len(HEADER))
    for case, cost in zip(chosen, costs, strict=True):
        table += line(row(case, cost, [case.family] if case.name() in newer else list(model.FAMILIES)))
    if options.check:
        return check(options.check, table, len(chosen) == len(cases))
    if options.write:
        before, _, after = table_of(options.write)
        options.write.write_text(f"{before}\n{table}\n{after}")
    else:
        print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
