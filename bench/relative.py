"""The cost of an option, a head size or a thread: ours against ours, in turn in one process, each with a goal.

    python bench/relative.py --json relative.json

The cost of a run is its time for a unit of useful work, relative to the peak of the machine with as many threads,
measured just before and after. The program prints the cost of one problem as a multiple of the cost of another. Each
result is compared with the reference in double before it is timed; the exit status is 1 if one was wrong.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape

import report
from measure import (
    MAX_ROUNDS,
    SETTLE_SECONDS,
    Call,
    bounds_of,
    check,
    circumstances,
    in_process,
    kernel,
    machine,
    peak_library,
    probe,
    versions,
)
from problems import Operands, Problem

TURN_SECONDS = 0.02
SPINNING_SECONDS = 0.3  # of a turn beside threads that spin: many slices of the scheduler
OTHER_SIZE = 1024  # of the matrix product that stands for the rest of a model
PLAIN = "f32 b1 h8 q2048 kv2048 d64"
VISIBLE = 0.9  # of a random mask, which excludes no whole tile of the scores
OPTION, MASK, WINDOW, HEAD_SIZE, THREADS, SPINNING = 1.3, 1.2, 1.3, 1 / 0.9, 1 / 0.97, 2.0


@dataclasses.dataclass(frozen=True)
class Side:
    text: str
    threads: int | None = None  # None: as many as the run has
    scattered: bool = False  # with a random bool mask; masked scores count as useful
    after_other: bool = False  # each run follows another operation of PyTorch's
    spinning: bool = False  # beside as many threads as there are processors, which do nothing without a pause


@dataclasses.dataclass(frozen=True)
class Relation:
    name: str
    one: Side
    other: Side
    goal: float | None


def relations():
    made = []
    for passes in ("forward", "backward"):
        plain = Side(f"{passes} {PLAIN}")

        def add(name, one, other, goal, passes=passes):
            made.append(Relation(f"{passes}: {name}", one, other, goal))

        add("a bool mask without order", dataclasses.replace(plain, scattered=True), plain, MASK)
        add("a bool mask of padding", Side(f"{plain.text} mask_bool"), plain, MASK)
        add("softcap", Side(f"{plain.text} softcap30"), plain, OPTION)
        long = f"{passes} f32 b1 h2 q8192 kv8192 d64"
        add("a window of 256 keys", Side(f"{long} lower-255 upper0"), Side(long), WINDOW)
        shared = Side(f"{passes} f32 b1 h16/4 q1024 kv1024 d128 causal")
        add("grouped queries", shared, Side(shared.text.replace("/4", "")), None)
        for dtype in ("f32", "bf16"):
            eight = Side(f"{passes} {dtype} b1 h8 q2048 kv2048 d64")
            add(f"{dtype}, all threads beside one", eight, dataclasses.replace(eight, threads=1), THREADS)
            add(f"{dtype}, one head beside eight", Side(eight.text.replace("h8", "h1")), eight, THREADS)
        model = Side(f"{passes} f32 b1 h8 q1024 kv1024 d64")
        add("after a product of PyTorch's", dataclasses.replace(model, after_other=True), model, THREADS)
        small = Side(f"{passes} f32 b1 h8 q128 kv128 d64 causal")
        add("beside threads that spin", dataclasses.replace(small, spinning=True), small, SPINNING)
        for head_dim, next_dim in ((40, 48), (111, 112)):
            sides = [Side(f"{passes} f32 b1 h8 q1024 kv1024 d{size}") for size in (head_dim, next_dim)]
            add(f"head_dim {head_dim} beside {next_dim}", *sides, HEAD_SIZE)
    return made


# --- Measuring -----------------------------------------------------------------------------------


class Runner:
    """One side, compared with the reference, ready to be timed."""

    def __init__(self, side, seed):
        self.side, self.threads = side, side.threads or torch.get_num_threads()
        problem = Problem.parse(side.text)
        operands = Operands.make(problem, seed)
        if side.scattered:
            generator = torch.Generator().manual_seed(seed)
            visible = torch.rand(1, 1, problem.q_len, problem.kv_len, generator=generator) < VISIBLE
            operands = dataclasses.replace(operands, mask=visible)
        self.call = Call("ours", problem, operands)
        self.call.prepare()
        wrong = check(problem, operands, {"ours": self.call.results(self.call.run())})
        if wrong:
            raise ArithmeticError(f"{side.text}: {wrong['ours']}")
        self.begin()
        (self.bound, *_) = bounds_of(problem, kernel(problem, operands), operands)
        x, w = torch.randn(OTHER_SIZE, OTHER_SIZE), torch.randn(OTHER_SIZE, OTHER_SIZE)
        self.other = (lambda: F.linear(x, w)) if side.after_other else (lambda: None)
        turn = SPINNING_SECONDS if side.spinning else TURN_SECONDS
        self.repeats = max(1, round(turn / self.timed(1)))

    def begin(self):
        """Sets the number of threads, and runs once to start them."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        self.call.run()

    def seconds(self):
        """Of a run, in one turn."""
        time.sleep(SETTLE_SECONDS)
        if not self.side.spinning:
            return self.timed(self.repeats)
        peak_library().mfa_peak_begin_spinning(os.cpu_count())
        try:
            return self.timed(self.repeats)
        finally:
            peak_library().mfa_peak_end_spinning()

    def timed(self, repeats):
        total = 0.0
        for _ in range(repeats):
            self.other()
            begin = time.perf_counter()
            self.call.run()
            total += time.perf_counter() - begin
        return total / repeats

    def share(self):
        """The share of the machine's peak, in one turn."""
        self.begin()
        before = probe([self.bound])
        taken = self.seconds()
        after = probe([self.bound])
        return self.bound.work / taken / max(before["peak"], after["peak"])


def compare_here(relation, budget, seed):
    runners = [Runner(side, seed) for side in (relation.one, relation.other)]
    shares, end = [], time.perf_counter() + budget
    while not shares or (len(shares) < MAX_ROUNDS and time.perf_counter() < end):
        shares.append([runner.share() for runner in runners])
    one, other = (statistics.median(column) for column in zip(*shares, strict=True))
    value = statistics.median(other / one for one, other in shares)
    return {"value": value, "one_share": one, "other_share": other, "rounds": len(shares)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only relations whose name contains this text")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to time each; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the random operands")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 150
    console.print(f"{machine()}; {versions()}; seed {options.seed}")
    rows = []
    for relation in relations():
        if options.filter not in relation.name:
            continue
        about = {"group": "relations", "relation": relation.name, "goal": relation.goal}
        about |= {"one": dataclasses.asdict(relation.one), "other": dataclasses.asdict(relation.other)}
        found = in_process(compare_here, relation, options.seconds, options.seed)
        rows.append(about | circumstances(options.seed) | found)
        words = f"[red]{escape(found['failed'])}[/red]" if "failed" in found else f"{found['value']:.2f}"
        console.print(f"{relation.name}: {words}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [row for row in rows if "failed" in row]
    console.print(report.table_of_relations([row for row in rows if row not in failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
