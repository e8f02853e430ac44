"""The command line: what libmfa is on this machine, and what a problem would run on.

python -m mps_flash_attn info
python -m mps_flash_attn explain forward f16 b2 h8/2 q512 kv512 d64 causal
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from .attention import Explanation
from .library import library

_SMALL = "forward f32 b1 h1 q1 kv1 d64"


def _table(title, rows):
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _info():
    found = library()
    small = Explanation.of(found.parse(_SMALL))
    return _table(
        "libmfa",
        (
            ("version", found.version),
            ("library", found.path),
            ("backend", small.backend),
            ("instruction set", small.machine),
            ("threads", f"{found.threads}, as PyTorch"),
            ("thread pool", "PyTorch's own" if found.host else "libmfa's own"),
            ("PyTorch", torch.__version__),
        ),
    )


def _explain(problem):
    found = Explanation.of(library().parse(problem))
    if not found:
        return _table(problem, [("not supported", found.reason)])
    return _table(
        problem,
        (
            ("backend", found.backend),
            ("kernel", found.kernel),
            ("threads", found.threads),
            ("workspace", f"{found.workspace_bytes} bytes"),
        ),
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m mps_flash_attn", description="Exact flash attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, library file, instruction set, threads")
    explain = commands.add_parser("explain", help="the kernel and the workspace of a problem, or why there is none")
    explain.add_argument("problem", nargs="+", help='such as "forward f16 b2 h8/2 q512 kv512 d64 causal"')
    arguments = parser.parse_args()
    try:
        table = _info() if arguments.command == "info" else _explain(" ".join(arguments.problem))
    except (ImportError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    Console().print(table)


if __name__ == "__main__":
    main()
