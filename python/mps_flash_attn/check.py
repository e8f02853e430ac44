"""python -m mps_flash_attn check: every kernel of every backend of this machine against attention in double precision.

Each backend, and each instruction set of the CPU, is checked in a process of its own, so that a crash is reported, too.
The report is written to a file that can be attached to a bug.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import display, reference, tensors
from .attention import Explanation
from .autograd import EAGER, Attention, Call
from .library import DEVICES, MASK_ADDITIVE, MASK_BOOL, Scalars, changed, library, scalars, unavailable_reason
from .options import Options
from .problem import Inputs

Row = dict[str, Any]  # of the report, and of JSON
Machine = tuple[str, str, dict[str, str]]  # name, device, environment

SEED = 1
SILENCE = 600  # seconds after which a process that writes nothing counts as hanging
_GPU = "mps"

# What selects a kernel: the head dimension, features, few queries, sizes that do not fill a tile.
_SIZES = "b2 h4/2 q70 kv130"
_WIDTHS = (1, 24, 40, 64, 80, 96, 128, 160, 192, 256, 320, 512)
_FEATURES = (
    "causal",
    "lower-20 upper3",
    "scale-0.3 softcap5",
    "mask_bool",
    "mask_f32",
    "mask_f16",
    "mask_bf16",
    "causal mask_bool",
    "lower-50 upper60 mask_f32 softcap5",
    "alibi",
    "causal mask_bool alibi",
)
_SHAPES = (
    "b1 h2 q37 kv53 d80v96 lower-20 upper3 softcap5 mask_bool",
    "b1 h4/2 q517 kv523 d64 causal",
    "b2 h8/2 q1 kv1100 d64",
    "b1 h8/1 q1 kv300 d128 mask_bool",
    "b1 h2 q3 kv300 d256 lower-100 upper0 mask_f32 softcap5",
    "b1 h1 q1 kv1 d64",
    "b2 h2 q5 kv0 d64",
)


def problems(device: str) -> list[str]:
    """Lines of the problem grammar, without the pass, since forward and backward are checked for each."""
    dtypes = [name for name in ("f32", "f16", "bf16", "f64") if name != "f64" or device != _GPU]
    shapes = [f"{_SIZES} d{width}" for width in _WIDTHS]
    shapes += [f"{_SIZES} d{width} {feature}" for feature in _FEATURES for width in (64, 128)]
    shapes += _SHAPES
    return [f"{dtype} {shape}" for dtype in dtypes for shape in shapes]


# --- One machine, in its own process -------------------------------------------------------------


def examine(line: str, device: str) -> Row:
    """The row of one problem: its kernels, the result whose error is the largest fraction of what is allowed, and what
    is wrong; or why it is not supported."""
    packed = [library().parse(f"{which} {line}") for which in ("forward", "backward")]
    found = [Explanation.of(changed(problem, device=DEVICES[device])) for problem in packed]
    kernels = [explanation.kernel for explanation in found]
    for explanation in found:
        if not explanation:
            return {"kernels": kernels, "unsupported": explanation.reason}
    sizes = scalars(packed[0])
    options = Options(sizes.lower, sizes.upper, sizes.scale, sizes.softcap)

    def ours(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
        moved = [None if operand is None else operand.to(device) for operand in operands]
        out, lse = Attention.apply(*moved, Call(EAGER, options, True))
        return out.cpu(), lse.cpu()

    comparisons = list(reference.compare_results(ours, _operands(sizes), **options._asdict()))
    worst = max(comparisons, key=lambda comparison: comparison.error / (comparison.allowed or 1.0))
    wrong = "; ".join(comparison.wrong for comparison in comparisons if comparison.wrong)
    return {"kernels": kernels, "result": worst.name, "error": worst.error, "allowed": worst.allowed, "wrong": wrong}


def _operands(sizes: Scalars) -> Inputs:
    """The Inputs of a problem in the memory order of models: (batch, length, heads, head_dim)."""
    generator = torch.Generator().manual_seed(SEED)
    dtypes = {code: dtype for dtype, code in tensors.DTYPES.items()}

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = (
        tensor(sizes.batch, length, heads, columns).to(dtypes[sizes.dtype]).transpose(1, 2)
        for length, heads, columns in (
            (sizes.q_len, sizes.q_heads, sizes.head_dim),
            (sizes.kv_len, sizes.kv_heads, sizes.head_dim),
            (sizes.kv_len, sizes.kv_heads, sizes.value_dim),
        )
    )
    mask = None
    if sizes.mask == MASK_BOOL:
        mask = tensor(sizes.batch, 1, sizes.q_len, sizes.kv_len) < 0.5
    elif sizes.mask == MASK_ADDITIVE:
        mask = tensor(sizes.q_heads, sizes.q_len, sizes.kv_len).to(dtypes[sizes.mask_dtype])
    slopes = tensor(sizes.batch, sizes.q_heads).abs() / 8 if sizes.alibi else None
    return Inputs(query, key, value, mask, slopes)


def write_rows(device: str, lines: Iterable[str]) -> None:
    """Checks each line, and writes two rows of JSON for it: one before it begins, and its result."""
    for line in lines:
        print(json.dumps({"begun": line}), flush=True)
        try:
            row = examine(line, device)
        except Exception as error:  # any error is a result of this problem, for the report
            row = {"kernels": [], "wrong": f"{type(error).__name__}: {error}"}
        print(json.dumps({"problem": line} | row), flush=True)


# --- All of them ---------------------------------------------------------------------------------


def machines() -> list[Machine]:
    """(name, device, environment) of all that runs here."""
    found = [(f"cpu {isa}", "cpu", {"MFA_ISA": isa}) for isa in library().instruction_sets()]
    return found + ([] if unavailable_reason(_GPU) else [("metal", _GPU, {})])


def _rows(machine: Machine, lines: list[str], begin: Callable[[str], None]) -> Iterator[Row]:
    """A row for each line. If the process ends or hangs, its line becomes a row that is wrong, and another process
    checks the rest."""
    name, device, environment = machine
    while lines:
        begun = None
        with tempfile.TemporaryFile("w+") as stderr:
            command = [sys.executable, "-m", __package__, "check", "--rows", device]
            process = subprocess.Popen(
                [*command, *lines],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            for row in _answers(process):
                if "begun" in row:
                    begun = row["begun"]
                    begin(f"{name}: {begun}")
                    continue
                lines, begun = lines[1:], None
                yield {"machine": name} | row
            stderr.seek(0)
            last_words = " ".join(stderr.read()[-1000:].split())
        if lines:
            ended = f"the process ended with the status {process.returncode}. {last_words}"
            yield {"machine": name, "problem": begun or lines[0], "kernels": [], "wrong": ended}
            lines = lines[1:] if begun else []


def _answers(process: subprocess.Popen[str]) -> Iterator[Row]:
    """The rows that the process writes. It is killed if it writes nothing for SILENCE seconds."""
    assert process.stdout is not None
    while True:
        clock = threading.Timer(SILENCE, process.kill)
        clock.start()
        line = process.stdout.readline()
        clock.cancel()
        if not line:
            process.wait()
            return
        yield json.loads(line)


def _about() -> list[tuple[str, object]]:
    """(name, value) of each property of this machine."""
    missing = unavailable_reason(_GPU)
    gpu = f"not checked: {missing}" if missing else getattr(torch.backends.mps, "get_name", lambda: "checked")()
    return [
        ("libmfa", library().version),
        ("library", library().path.name),
        ("PyTorch", torch.__version__),
        ("Python", platform.python_version()),
        ("system", platform.platform()),
        ("processor", f"{platform.machine()} {platform.processor()}".strip()),
        ("Metal", gpu),
        ("threads", torch.get_num_threads()),
        ("seed", SEED),
        ("date", datetime.datetime.now().astimezone().isoformat(timespec="seconds")),
    ]


def _state(row: Row) -> str:
    return "WRONG" if row.get("wrong") else "not supported" if "unsupported" in row else "right"


def report_text(rows: list[Row]) -> str:
    """The whole report."""
    lines = ["mps_flash_attn check", *(f"{what}: {which}" for what, which in _about()), ""]
    lines += [f"{row['machine']}: {row['problem']}: {row['wrong']}" for row in rows if row.get("wrong")] + [""]
    for row in rows:
        found = row.get("unsupported") or ""
        if "error" in row:
            found = f"{row['result']} error {row['error']:.3g} allowed {row['allowed']:.3g}"
        lines.append(" | ".join([_state(row), row["machine"], row["problem"], " ".join(row["kernels"]), found]))
    return "\n".join(lines) + "\n"


def _summary(rows: list[Row]) -> Iterator[tuple[object, ...]]:
    """A row for each machine and dtype: how many problems, and the result whose error is the largest fraction of what
    is allowed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["machine"], row["problem"].split()[0]), []).append(row)
    for (machine, dtype), group in groups.items():
        states = Counter(map(_state, group))
        measured = [row for row in group if "error" in row]
        nearest = max(measured, key=lambda row: row["error"] / (row["allowed"] or 1.0), default=None)
        words = ("", "", "")
        if nearest:
            words = (f"{nearest['error']:.2g}", f"{nearest['allowed']:.2g}", nearest["problem"])
        yield machine, dtype, states["right"], states["WRONG"], states["not supported"], *words


def _check_writable(path: Path) -> None:
    """Raises before the check, which takes minutes, if its report could not be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--report is {path}; it must be a file that can be written: {error.strerror}") from None


def run(text: str, path: Path) -> int:
    """Checks every problem that contains `text`, and writes a report to `path`; returns the exit status. ValueError,
    before anything is checked, if that file cannot be written."""
    _check_writable(path)
    work = [(machine, [line for line in problems(machine[1]) if text in line]) for machine in machines()]
    with display.progress(sum(len(lines) for _, lines in work)) as begin:
        rows = [row for machine, lines in work for row in _rows(machine, lines, begin)]
    header = ("machine", "dtype", "right", "wrong", "not supported", "largest error", "allowed", "at")
    display.table("forward and backward, beside attention in float64", list(_summary(rows)), header)
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"WRONG {row['machine']}: {row['problem']}: {row['wrong']}")
    if unavailable_reason(_GPU):
        print(f"Metal was not checked: {unavailable_reason(_GPU)}")
    status, report = 1 if wrong or not rows else 0, f"the report is in {path.resolve()}"
    try:
        path.write_text(report_text(rows), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        status, report = 1, f"the report could not be written: {error}"
    print(f"{len(rows) - len(wrong)} passed, {len(wrong)} failed; {report}")
    return status
