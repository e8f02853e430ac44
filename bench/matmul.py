"""Our attention beside a matrix product of PyTorch's, as shares of one peak: what a machine lets products have.

    python bench/matmul.py                            with one thread, and with all
    python bench/matmul.py --threads 1,4,16 --runs 3

A product of two large square matrices in the dtype, which PyTorch leaves to MKL or oneDNN, and ours alternate in one
process, each between two probes of the peak (measure.py). A line has the medians of a run. The result of ours is
compared with the reference first; the exit status is 1 if it was wrong.
"""

import argparse
import statistics
import sys
import time

import torch

from measure import Call, bounds_of, check, in_process, kernel, machine, probe, versions
from mps_flash_attn import display
from problems import DTYPES, Operands, Problem
from versus_torch import numbers

PROBLEMS = ("forward f32 b1 h8 q4096 kv4096 d64", "forward bf16 b1 h8 q4096 kv4096 d128")
SIZE = 2048  # rows and columns of the matrices
SEED = 1
ROUNDS = 9
LEAST_SECONDS = 0.02  # of a round


def seconds_of(function):
    """The time of a call, the mean of as many as take LEAST_SECONDS."""
    calls, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < LEAST_SECONDS:
        function()
        calls += 1
    return (time.perf_counter() - begin) / calls


def shares(text):
    """{"product": its share of the peak, "ours": ours}; {"failed": why}."""
    problem = Problem.parse(text)
    operands = Operands.make(problem, SEED)
    (bound,) = bounds_of(problem, kernel(problem, operands), operands)
    ours = Call("ours", problem, operands)
    if wrong := check(problem, operands, {"ours": ours.run()}):
        return {"failed": wrong["ours"]}
    left, right = (torch.randn(SIZE, SIZE).to(DTYPES[problem.dtype]) for _ in range(2))
    contenders = {"product": (lambda: left @ right, 2e-9 * SIZE**3), "ours": (ours.run, bound.work)}
    taken = {name: [] for name in contenders}
    for function, _ in contenders.values():
        function()
    for _ in range(ROUNDS):
        for name, (function, work) in contenders.items():
            before = probe([bound])
            seconds = seconds_of(function)
            rate = max(before[bound.field], probe([bound])[bound.field])
            taken[name].append(work / seconds / rate)
    return {name: statistics.median(found) for name, found in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=numbers, default=sorted({1, torch.get_num_threads()}), metavar="N,...")
    parser.add_argument("--runs", type=int, default=1, help="measure all lines so many times; default %(default)s")
    options = parser.parse_args()
    table, failed = [], 0
    for text in PROBLEMS:
        for threads in options.threads:
            found = [in_process(shares, text, threads=threads) for _ in range(options.runs)]
            for wrong in (one["failed"] for one in found if "failed" in one):
                print(f"WRONG: {text}: {wrong}")
                failed += 1
            right = [one for one in found if "failed" not in one]
            cells = (", ".join(f"{one[name]:.0%}" for one in right) for name in ("product", "ours"))
            table.append((text, str(threads), *cells))
    title = f"shares of the peak; the product is {SIZE} x {SIZE} x {SIZE}; {machine()}; {versions()}"
    display.table(title, table, ("ours", "threads", "PyTorch's product", "ours"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
