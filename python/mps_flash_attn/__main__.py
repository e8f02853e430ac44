"""The command line: shows libmfa and the kernel of a problem on this machine, checks results, and compiles kernels.

python -m mps_flash_attn info
python -m mps_flash_attn explain forward f16 b2 h8/2 q512 kv512 d64 causal
python -m mps_flash_attn check [--all | --tune]
python -m mps_flash_attn precompile --dtype f16 --head-dim 64 128 --features none band --backward
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import check, display, precompiling, sdpa, tuning
from .explanation import Explanation
from .library import DEVICES, changed, library, scalars
from .torch_host import unavailable_reason

_SMALL = "forward f32 b1 h1 q1 kv1 d64"


def _info(_: argparse.Namespace) -> None:
    found = library()
    small = Explanation.of(found.parse(_SMALL))
    rows = (
        ("version", found.version),
        ("library", found.path),
        ("backend", small.backend),
        ("instruction set", small.machine),
        ("threads", f"{found.threads}, as PyTorch"),
        ("thread pool", "PyTorch's own" if found.host else "libmfa's own"),
        ("Metal", unavailable_reason("mps") or "available"),
        ("PyTorch", torch.__version__),
        ("SDPA", f"{'replaced' if sdpa.is_in_force() else 'not replaced'} in this process; each calls replace_sdpa()"),
    )
    display.table("libmfa", rows)


def _explain(arguments: argparse.Namespace) -> None:
    line = " ".join(arguments.problem)
    problem = library().parse(line)
    on_metal = scalars(problem).device == DEVICES["mps"]  # else it is explained for every available device
    for device, code in DEVICES.items():
        if (device == "cpu" and on_metal) or (device == "mps" and not on_metal and unavailable_reason(device)):
            continue
        found = Explanation.of(changed(problem, device=code))
        rows: list[tuple[str, object]] = [("not supported", found.reason)]
        if found:
            rows = [
                ("backend", found.backend),
                ("kernel", found.kernel),
                ("threads", found.threads),
                ("workspace", f"{found.workspace_bytes} bytes"),
            ]
        display.table(line, rows)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.rows:
        check.write_rows(arguments.rows, arguments.problem)
        return 0
    if arguments.tune:
        return tuning.run()
    return check.run(arguments.filter, arguments.report, not arguments.all)


def _precompile(arguments: argparse.Namespace) -> int:
    return precompiling.run(
        arguments.dtype, arguments.head_dim, arguments.features, arguments.backward, arguments.folder
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mps_flash_attn", description="Exact flash attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], int | None], purpose: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__[1:], help=purpose, description=purpose)
        added.set_defaults(run=run)
        return added

    command(_info, "version, library file, instruction set, threads")
    one = command(_explain, "the kernel and the workspace of a problem, or why there is none")
    one.add_argument("problem", nargs="+", help='such as "forward f16 b2 h8/2 q512 kv512 d64 causal"')

    checked = command(_check, "kernels of this machine beside attention in float64 and PyTorch's; writes a report")
    scope = checked.add_mutually_exclusive_group()
    scope.add_argument("--all", action="store_true", help="every kernel, which takes minutes; without it, a quick set")
    scope.add_argument(
        "--tune",
        action="store_true",
        help="on mps, measures which calls of scaled_dot_product_attention are faster than PyTorch's own kernels, and "
        "keeps that for replace_sdpa(); nothing is checked",
    )
    checked.add_argument("--filter", default="", help="only problems that contain this text")
    checked.add_argument("--report", type=Path, default=Path("mfa-check.txt"), help="file to write (mfa-check.txt)")
    checked.add_argument("--rows", metavar="DEVICE", help=argparse.SUPPRESS)  # one machine, in a process of its own
    checked.add_argument("problem", nargs="*", help=argparse.SUPPRESS)

    made = command(_precompile, "compiles Metal kernels into the cache, or into a folder to be shipped")
    made.add_argument("--dtype", nargs="+", default=["f16", "bf16", "f32"], help="f32, f16, bf16 (all)")
    made.add_argument("--head-dim", nargs="+", default=["64", "128"], help="such as 64, or 192v128 (64 128)")
    made.add_argument(
        "--features",
        nargs="+",
        default=["none", "band"],
        help="none, band (causal, windows), mask_bool, mask_f32 etc., softcap, alibi, sinks, dropout, block_map; "
        "both: band+softcap (none band)",
    )
    made.add_argument("--backward", action="store_true", help="those of the backward pass, too")
    made.add_argument("--folder", type=Path, help="where the files go; without it, libmfa's cache")
    return parser


def main() -> int | None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold characters that the encoding lacks
    parser = _parser()
    arguments = parser.parse_args()
    try:
        return arguments.run(arguments)
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    sys.exit(main())
