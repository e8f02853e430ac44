"""python -m mps_flash_attn check: the kernels of this machine against attention in double precision.

By default that is a few problems, which together need decode, masks and grouped heads; they are timed beside PyTorch's
own attention as well. --all checks every kernel of every backend. Each backend, and with --all each instruction set of
the CPU, is checked in a process of its own, so that a crash is reported, too. The report is written to a file that can
be attached to a bug.
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

from . import apple, calls, display, reference, speed, thresholds
from .explanation import Explanation
from .library import (
    BAND_OPEN_LOWER,
    BAND_OPEN_UPPER,
    DEVICES,
    FAST_NAMES,
    KV_NAMES,
    OUT_NAMES,
    changed,
    library,
    scalars,
)
from .options import Options
from .sdpa import torch_mps
from .torch_host import unavailable_reason

Row = dict[str, Any]  # of the report, and of JSON
Machine = tuple[str, str, dict[str, str]]  # name, device, environment

SEED = 1
SILENCE = 600  # seconds after which a process that writes nothing counts as hanging
_GPU = "mps"

# The quick set: a problem to check, and the larger one to time.
QUICK = {
    "f16 b1 h2 q517 kv517 d64 causal": "forward f16 b1 h16 q1024 kv1024 d64 causal",
    "bf16 b1 h4/2 q259 kv259 d80": "forward bf16 b1 h16/4 q1024 kv1024 d80",
    "f32 b2 h4 q200 kv300 d64 mask_bool": "forward f32 b1 h16 q1024 kv1024 d64 mask_bool",
    "f16 b1 h8/2 q1 kv1100 d128": "forward f16 b1 h32/8 q1 kv4096 d128",
    "bf16 b1 h2 q300 kv300 d64 causal": "backward bf16 b1 h16 q512 kv512 d64 causal",
    "f32 b1 h4/2 q200 kv200 d128 mask_f32": "backward f32 b1 h16/4 q512 kv512 d128 mask_f32",
}

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
    "sinks",
    "lower-50 upper60 mask_f32 softcap5 sinks",
    "dropout0.1",
    "causal mask_bool alibi sinks dropout0.5",
    "block_map_q16 block_map_kv32",
    "causal block_map_q48 block_map_kv64 mask_f32 softcap5 dropout0.1",
    "varlen_q varlen_kv total_q120 total_kv230 causal bottom_right",
    "varlen_q varlen_kv total_q120 total_kv230 mask_f32 alibi sinks dropout0.1 seqused_k",
    "seqused_k leftpad_k",
    "cache_batch_idx kv_batch3 seqused_k",
    "page_size16 kv_batch12 seqused_k leftpad_k causal bottom_right",
    "k_int8 v_e4m3 k_group32",
    "k_e5m2 mask_f32 alibi sinks softcap5",
    "k_nf4 v_int4 v_group32 page_size16 kv_batch12 seqused_k causal bottom_right",
    "varlen_q varlen_kv total_q120 total_kv230 mask_f32 out_f32",
)
_SHAPES = (
    "b1 h2 q37 kv53 d80v96 lower-20 upper3 softcap5 mask_bool",
    "b1 h4/2 q517 kv523 d64 causal",
    "b2 h8/2 q1 kv1100 d64",
    "b1 h8/1 q1 kv300 d128 mask_bool",
    "b1 h2 q3 kv300 d256 lower-100 upper0 mask_f32 softcap5",
    "b2 h8/2 q1 kv1100 d64 sinks",
    "b2 h8/2 q1 kv1100 d64 dropout0.1",
    "b2 h8/2 q1 kv1100 d64 page_size32 kv_batch40 seqused_k",
    "b2 h8/2 q1 kv1100 d64 k_e4m3 v_e5m2",
    "b2 h8/2 q1 kv1100 d128 k_int8 v_int8 page_size32 kv_batch40 seqused_k",
    "b2 h8/2 q1 kv1100 d128 k_int4 v_nf4 k_group32 v_group32",
    "b2 h8/2 q1 kv1100 d64 out_f32",
    "b1 h1 q1 kv1 d64",
    "b2 h2 q5 kv0 d64",
)


def problems(device: str) -> list[str]:
    """All lines: of the problem grammar, without the pass, since forward and backward are checked for each."""
    dtypes = [name for name in ("f32", "f16", "bf16", "f64") if name != "f64" or device != _GPU]
    shapes = [f"{_SIZES} d{width}" for width in _WIDTHS]
    shapes += [f"{_SIZES} d{width} {feature}" for feature in _FEATURES for width in (64, 128)]
    shapes += _SHAPES
    # Of f64 there are no outputs in f32.
    return [f"{dtype} {shape}" for dtype in dtypes for shape in shapes if dtype != "f64" or "out_f32" not in shape]


# --- One machine, in its own process -------------------------------------------------------------


def examine(line: str, device: str) -> Row:
    """The row of one problem: its kernels, the result whose error is the largest fraction of what is allowed, and what
    is wrong; or why it is not supported. For one of QUICK, also the times of its larger one."""
    sizes = scalars(library().parse(f"forward {line}"))
    has_gradients = not (sizes.page_size or sizes.cache_batch_idx or sizes.k_type or sizes.v_type)
    packed = [library().parse(f"{which} {line}") for which in ("forward", "backward")[: 1 + has_gradients]]
    found = [Explanation.of(changed(problem, device=DEVICES[device])) for problem in packed]
    kernels = [explanation.kernel for explanation in found]
    for explanation in found:
        if not explanation:
            return {"kernels": kernels, "unsupported": explanation.reason}
    lower = None if sizes.lower == BAND_OPEN_LOWER else sizes.lower
    upper = None if sizes.upper == BAND_OPEN_UPPER else sizes.upper
    options = Options(lower, upper, sizes.scale, sizes.softcap, sizes.dropout)
    options = options._replace(block_q=sizes.block_map_q, block_kv=sizes.block_map_kv)
    max_q = sizes.q_len if sizes.varlen_q else None
    max_kv = sizes.kv_len if sizes.varlen_kv or sizes.page_size else None
    options = options._replace(bottom_right=bool(sizes.bottom_right), max_q=max_q, max_kv=max_kv)
    options = options._replace(k_type=KV_NAMES.get(sizes.k_type), v_type=KV_NAMES.get(sizes.v_type))
    options = options._replace(out_type=OUT_NAMES.get(sizes.out_type), fast=FAST_NAMES.get(sizes.fast))

    def ours(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
        moved = [None if operand is None else operand.to(device) for operand in operands]
        out, lse = calls.run(tuple(moved), options, True, False)
        return out.cpu(), lse.cpu()

    inputs = reference.operands(sizes, SEED)
    comparisons = list(reference.compare_results(ours, inputs, has_gradients, **options._asdict()))
    worst = max(comparisons, key=lambda comparison: comparison.error / (comparison.allowed or 1.0))
    wrong = "; ".join(comparison.wrong for comparison in comparisons if comparison.wrong)
    row = {"kernels": kernels, "result": worst.name, "error": worst.error, "allowed": worst.allowed, "wrong": wrong}
    return row | _times(QUICK[line], device) if line in QUICK else row


def _times(line: str, device: str) -> Row:
    """The times of a problem, and on mps which kernel of PyTorch's they are compared with; or why it was not timed."""
    try:
        ours, theirs = speed.compare(line, device)
    except (RuntimeError, NotImplementedError) as error:
        return {"timed": line, "not_timed": f"{type(error).__name__}: {error}"}
    found: Row = {"timed": line, "ours_ms": 1e3 * ours, "torch_ms": 1e3 * theirs}
    return found | ({"torch_kernel": _torch_kernel(line)} if device == _GPU else {})


def _torch_kernel(line: str) -> str:
    """The kernel that PyTorch has on mps for a problem."""
    call = speed.Comparable.of(line, _GPU)
    kernel = torch_mps.kernel_of(call.query, call.key, call.value, call.mask, call.is_causal, True)
    return kernel.name if kernel else "holds the scores"


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


def machines(is_quick: bool = False) -> list[Machine]:
    """(name, device, environment) of all that runs here; if it is quick, without other instruction sets of the CPU than
    that which libmfa chooses."""
    found: list[Machine] = [(f"cpu {isa}", "cpu", {"MFA_ISA": isa}) for isa in library().instruction_sets()]
    if is_quick:
        found = [("cpu", "cpu", {})]
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
    metal: list[tuple[str, object]] = [("Metal", f"not checked: {missing}")]
    if not missing:
        tuned = len(thresholds.load())
        metal = [("Metal", apple.gpu_name()), ("GPU family", apple.gpu_family())]
        metal += [("thresholds of mps", f"{tuned}, measured by check --tune" if tuned else "none measured")]
    macos = f"{apple.macos_version()} ({apple.macos_build()})" if apple.macos_version() else ""
    return [
        ("libmfa", library().version),
        ("library", library().path.name),
        ("PyTorch", torch.__version__),
        ("Python", platform.python_version()),
        ("system", platform.platform()),
        *([("macOS", macos)] if macos else []),
        ("processor", f"{platform.machine()} {platform.processor()}".strip()),
        *metal,
        ("threads", torch.get_num_threads()),
        ("seed", SEED),
        ("date", datetime.datetime.now().astimezone().isoformat(timespec="seconds")),
    ]


def _state(row: Row) -> str:
    return "WRONG" if row.get("wrong") else "not supported" if "unsupported" in row else "right"


def report_text(rows: list[Row], checked: str) -> str:
    """The whole report. `checked` says which problems."""
    about = [("checked", checked), *_about()]
    lines = ["mps_flash_attn check", *(f"{what}: {which}" for what, which in about), ""]
    lines += [f"{row['machine']}: {row['problem']}: {row['wrong']}" for row in rows if row.get("wrong")] + [""]
    for row in rows:
        found = row.get("unsupported") or ""
        if "error" in row:
            found = f"{row['result']} error {row['error']:.3g} allowed {row['allowed']:.3g}"
        lines.append(" | ".join([_state(row), row["machine"], row["problem"], " ".join(row["kernels"]), found]))
    lines += ["", *(" | ".join(["timed", *filter(None, words)]) for words in _timed(rows))]
    return "\n".join(lines).rstrip() + "\n"


def _timed(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """(machine, problem, ours, PyTorch's, ratio, PyTorch's kernel) of each problem to be timed; or why it was not."""
    for row in rows:
        if "ours_ms" in row:
            times = f"ours {_milliseconds(row['ours_ms'])}", f"PyTorch {_milliseconds(row['torch_ms'])}"
            ratio = f"PyTorch / ours {row['torch_ms'] / row['ours_ms']:.2f}"
            yield row["machine"], row["timed"], *times, ratio, row.get("torch_kernel", "")
        elif "timed" in row:
            yield row["machine"], row["timed"], "not timed", row["not_timed"], "", ""


def _milliseconds(number: float) -> str:
    """Three digits, and no exponent where a slow machine takes more than a second."""
    return f"{number:.0f} ms" if number >= 100 else f"{number:.3g} ms"


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
    """Raises before the check, which may take minutes, if its report could not be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--report is {path}; it must be a file that can be written: {error.strerror}") from None


def run(text: str, path: Path, is_quick: bool = True) -> int:
    """Checks the quick set, or else every problem, as far as they contain `text`, and writes a report to `path`.
    Returns the exit status. ValueError, before anything is checked, if that file cannot be written."""
    _check_writable(path)
    work = [
        (machine, [line for line in (QUICK if is_quick else problems(machine[1])) if text in line])
        for machine in machines(is_quick)
    ]
    with display.progress(sum(len(lines) for _, lines in work)) as begin:
        rows = [row for machine, lines in work for row in _rows(machine, lines, begin)]
    header = ("machine", "dtype", "right", "wrong", "not supported", "largest error", "allowed", "at")
    display.table("forward and backward, beside attention in float64", list(_summary(rows)), header)
    timed = list(_timed(rows))
    if timed:
        display.table("times, beside PyTorch's own attention", timed)
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"WRONG {row['machine']}: {row['problem']}: {row['wrong']}")
    if unavailable_reason(_GPU):
        print(f"Metal was not checked: {unavailable_reason(_GPU)}")
    if is_quick:
        print("This was the quick set; check --all tries every kernel, which takes minutes")
    checked = f"{'the quick set' if is_quick else 'all'}{f', what contains {text!r}' if text else ''}"
    status, report = 1 if wrong or not rows else 0, f"the report is in {path.resolve()}"
    try:
        path.write_text(report_text(rows, checked), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        status, report = 1, f"the report could not be written: {error}"
    print(f"{len(rows) - len(wrong)} passed, {len(wrong)} failed; {report}")
    return status
