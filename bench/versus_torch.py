"""Our attention beside PyTorch's, as it comes and unfused: time, share of the machine's peak, memory.

    python bench/versus_torch.py --quick                        some of them, under two minutes
    python bench/versus_torch.py --json rows.json               all of them
    python bench/versus_torch.py --group decode                 some
    python bench/versus_torch.py --group scaling --threads 1,4,16 --runs 3
    python bench/versus_torch.py "forward bf16 b1 h32/8 q4096 kv4096 d128 causal"

docs/measure.md describes the method. The exit status is 1 if a result was wrong; a wrong result is not timed.
"""

import argparse
import itertools
import json
import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import report
from measure import machine, measure, versions
from problems import Problem

BANDS = ("", " causal")
BOTH = ("forward", "backward")
DTYPES = ("f32", "f16", "bf16")


def users_table():
    """The size of most published comparisons."""
    return [
        f"{passes} {dtype} b4 h8 q2048 kv2048 d64{band}"
        for passes in ("forward", "forward+backward")
        for dtype in DTYPES
        for band in BANDS
    ]


def speed():
    """The rows that have a goal: a share of the peak."""
    return [
        f"{passes} {dtype} b1 h8 q2048 kv2048 d{head_dim}{band}"
        for dtype in ("f32", "bf16")
        for passes in BOTH
        for head_dim in (64, 128)
        for band in BANDS
    ]


def lengths():
    return [f"{p} f32 b1 h8 q{n} kv{n} d64 causal" for n in (512, 1024, 4096, 8192) for p in BOTH]


def head_sizes():
    rows = [f"{p} f32 b1 h8 q2048 kv2048 d{d}" for d in (16, 32, 40, 80, 96, 111, 256) for p in BOTH]
    rows += [f"{p} bf16 b1 h8 q2048 kv2048 d{d}" for d in (32, 80, 256) for p in BOTH]
    return rows + [f"{p} f32 b1 h8 q2048 kv2048 d192v128 causal" for p in BOTH]


def heads():
    """Query heads that share KV heads, and only one of them."""
    rows = [f"{p} {t} b1 h32/8 q2048 kv2048 d128 causal" for t in ("f32", "bf16") for p in BOTH]
    return rows + [f"{p} f32 b1 h1 q4096 kv4096 d{d}{band}" for d in (64, 128) for band in BANDS for p in BOTH]


def masks():
    rows = [f"{p} f32 b1 h8 q{n} kv{n} d64 lower-255 upper0" for n in (2048, 8192) for p in BOTH]
    rows += [f"{p} f32 b1 h8 q4096 kv4096 d64 lower-128 upper128" for p in BOTH]
    kinds = ("mask_bool", "mask_f32")
    return rows + [f"{p} f32 b2 h8 q2048 kv2048 d64{band} {m}" for m in kinds for band in BANDS for p in BOTH]


def decode():
    """Decode steps: 1 to 16 queries, long K and V."""
    shapes = itertools.product(DTYPES, ("8", "32/8", "64/8"), (1, 4, 16))
    rows = [f"forward {dtype} b1 h{heads} q{n} kv16384 d128" for dtype, heads, n in shapes]
    return [*rows, "forward f32 b1 h1 q1 kv16384 d128", "forward f32 b8 h32 q1 kv2048 d128"]


def small():
    """Sizes at which the overhead of a call matters."""
    sizes = (16, 32, 64, 128, 256)
    passes = ("forward", "forward+backward")
    kinds = [f"f32 {shape}" for shape in ("b1 h1", "b1 h8", "b4 h8")] + ["f16 b1 h8", "bf16 b1 h8"]
    rows = [f"{p} {kind} q{n} kv{n} d64" for kind in kinds for n in sizes for p in passes]
    return rows + [f"{p} f32 b1 h8 q{n} kv{n} d64 causal" for n in sizes for p in passes]


def scaling():
    """Rows for several numbers of threads: compute, few tasks, tile registers, and memory."""
    sizes = ("b1 h8 q4096 kv4096 d64", "b1 h8 q2048 kv2048 d64", "b1 h32 q2048 kv2048 d64")
    rows = [f"{p} f32 {size}{band}" for size in sizes for p, band in (("forward", ""), ("backward", ""))]
    rows += ["backward f32 b1 h8 q4096 kv4096 d64 causal", "backward f32 b1 h8 q2048 kv2048 d64 causal"]
    rows += [f"{p} bf16 b1 h8 q4096 kv4096 d128" for p in BOTH]
    rows += [f"forward {dtype} b1 h32/8 q1 kv65536 d128" for dtype in ("f32", "bf16")]
    return [*rows, "forward bf16 b8 h32/8 q16 kv8192 d128"]


GROUPS = {
    "users": users_table,
    "speed": speed,
    "lengths": lengths,
    "head sizes": head_sizes,
    "heads": heads,
    "masks": masks,
    "decode": decode,
    "small": small,
}
QUICK = ("users", "speed")
NAMED_ONLY = {"scaling": scaling}  # groups that are measured only where --group names them


def parser_of(description, seconds):
    """A parser with the options of every program that measures rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help="problems to measure, instead of the list")
    parser.add_argument("--filter", default="", help="only rows that contain this text")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long to time each row; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the random operands")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    return parser


def numbers(text):
    """The positive numbers of a list such as 1,4,16."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def options_of(parser):
    options = parser.parse_args()
    try:
        for problem in options.problems:
            Problem.parse(problem)
    except ValueError as error:
        parser.error(str(error))
    return options


def measure_all(problems, options, title, columns, **how):
    """Measures [(group, problem, threads or None)], shows and writes the rows, and returns the exit status."""
    problems = [one for one in problems if options.filter in one[1]]
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a log file is not limited to 80 columns
    console.print(f"{machine()}; {versions()}; seed {options.seed}")
    bars = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    rows = []
    try:
        with Progress(*bars, console=console) as progress:
            task = progress.add_task("", total=len(problems))
            for group, problem, threads in problems:
                progress.update(task, description=problem)
                row = measure(problem, options.seconds, options.seed, threads=threads, **how)
                rows.append({"group": group} | row)
                console.print(report.line(rows[-1], columns))
                progress.advance(task)
    finally:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = [row for row in rows if "failed" in row]
    right = [row for row in rows if "failed" not in row]
    console.print(report.table(right, title, columns))
    console.print(report.summary(right))
    if options.json:
        console.print(f"{len(rows)} rows written to {options.json}")
    return 1 if failed else 0


def main():
    parser = parser_of(__doc__, seconds=1.0)
    parser.add_argument("--quick", action="store_true", help="only some rows, for a look or a comparison")
    groups = GROUPS | NAMED_ONLY
    parser.add_argument("--group", choices=groups, action="append", help="only the rows of this group")
    parser.add_argument(
        "--threads",
        type=numbers,
        default=[None],
        metavar="N,...",
        help="each row with so many threads; default: as PyTorch",
    )
    parser.add_argument("--runs", type=int, default=1, help="measure all rows so many times; default %(default)s")
    options = options_of(parser)
    chosen = options.group or (QUICK if options.quick else GROUPS)
    named = [("given", problem) for problem in options.problems]
    named = named or [(group, problem) for group in chosen for problem in groups[group]()]
    problems = [(*one, threads) for _ in range(options.runs) for one in named for threads in options.threads]
    title = "ours, PyTorch's attention as it comes (torch) and its unfused math path (math)"
    columns = report.COLUMNS if options.threads == [None] else report.THREADS | report.COLUMNS
    return measure_all(problems, options, title, columns)


if __name__ == "__main__":
    sys.exit(main())
