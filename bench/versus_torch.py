"""Our attention beside PyTorch's, as it comes and unfused: time, share of the machine's peak, memory.

    python bench/versus_torch.py --quick                        the README's rows, under two minutes
    python bench/versus_torch.py --json rows.json               all of them
    python bench/versus_torch.py "forward bf16 b1 h32/8 q4096 kv4096 d128 causal"

How it is measured stands in docs/measure.md. The exit status is 1 if a result was wrong: such a one is not timed.
"""

import argparse
import json
import pathlib
import sys

import report
from measure import Problem, machine, measure, versions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

BANDS = ("", " causal")


def users_table():
    """The size at which users compare."""
    return [
        f"{passes} {dtype} b4 h8 q2048 kv2048 d64{band}"
        for passes in ("forward", "forward+backward")
        for dtype in ("f32", "f16", "bf16")
        for band in BANDS
    ]


def speed():
    """The rows that have a goal: a share of the peak."""
    return [
        f"{passes} f32 b1 h8 q2048 kv2048 d{head_dim}{band}"
        for passes in ("forward", "backward")
        for head_dim in (64, 128)
        for band in BANDS
    ]


def breadth():
    """One thing changed at a time."""
    both = ("forward", "backward")
    rows = [f"{p} f32 b1 h8 q{n} kv{n} d64 causal" for n in (256, 512, 1024, 4096, 8192) for p in both]
    rows += [f"{p} {t} b1 h8 q2048 kv2048 d{d}" for d in (32, 80, 256) for t in ("f32", "bf16") for p in both]
    rows += [f"{p} f32 b1 h8 q2048 kv2048 d192v128 causal" for p in both]
    rows += [f"{p} {t} b1 h32/8 q2048 kv2048 d128 causal" for t in ("f32", "bf16") for p in both]
    rows += [f"{p} f32 b1 h8 q{n} kv{n} d64 lower-255 upper0" for n in (2048, 8192) for p in both]
    rows += [f"{p} f32 b1 h8 q4096 kv4096 d64 lower-128 upper128" for p in both]
    for mask in ("mask_bool", "mask_f32"):
        rows += [f"{p} f32 b2 h8 q2048 kv2048 d64{band} {mask}" for band in BANDS for p in both]
    rows += [f"{p} f32 b1 h1 q4096 kv4096 d{d}{band}" for d in (64, 128) for band in BANDS for p in both]
    rows += [f"forward {t} b1 h32/8 q1 kv{n} d128" for t in ("f32", "f16", "bf16") for n in (1024, 4096, 16384)]
    rows += ["forward f32 b1 h1 q1 kv16384 d128", "forward f32 b8 h32 q1 kv2048 d128"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help="problems to measure, instead of the list")
    parser.add_argument("--quick", action="store_true", help="only the rows of the README, each for a shorter time")
    parser.add_argument("--filter", default="", help="only rows that contain this text")
    parser.add_argument("--seconds", type=float, help="how long to time each row; default 6, or 1.5 if --quick")
    parser.add_argument("--seed", type=int, default=1, help="of the random operands")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to this file")
    options = parser.parse_args()
    problems = options.problems or users_table() + speed() + ([] if options.quick else breadth())
    problems = [problem for problem in problems if options.filter in problem]
    try:
        for problem in problems:
            Problem.parse(problem)
    except ValueError as error:
        parser.error(str(error))
    seconds = options.seconds or (1.5 if options.quick else 6.0)

    console = Console()
    if not console.is_terminal:
        console.width = 150  # a log file has room
    console.print(f"{machine()}; {versions()}; seed {options.seed}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    rows = []
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(problems))
            for problem in problems:
                progress.update(task, description=problem)
                rows.append(measure(problem, seconds, options.seed))
                console.print(report.line(rows[-1]))
                progress.advance(task)
    finally:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(report.table(rows, "ours, PyTorch's attention as it comes (torch) and its unfused math path (math)"))
    failed = [row for row in rows if "failed" in row]
    if options.json:
        console.print(f"{len(rows)} rows written to {options.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
