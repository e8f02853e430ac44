"""python -m mps_flash_attn check --tune: from which work on libmfa is faster on mps than PyTorch's own kernels.

replace_sdpa() runs a call on libmfa if its work reaches the threshold of its kind (thresholds.py). A threshold is the
least measured work from which on libmfa was faster at every size measured. The problems have as many heads in key and
value as in query; grouped heads go by the same thresholds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from . import apple, display, speed, thresholds
from .library import Unsupported
from .thresholds import FEW, Key, Thresholds
from .torch_host import unavailable_reason

HEADS = 8
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_HEAD_DIMS = (32, 64, 72, 80, 96, 128, 256)  # those of PyTorch's kernels
# (queries, keys): of decode steps, and of prompts. Causal calls of few queries see those first keys only: no model
# makes them.
_LENGTHS = ((1, 256), (1, 1024), (1, 4096), (1, 16384), (FEW, 4096), (64, 64), (256, 256), (1024, 1024), (4096, 4096))

Measure = Callable[[str, str], speed.Speed]  # (line, device), as speed.compare
Point = tuple[int, bool]  # (work, whether libmfa was faster)


def problems() -> list[tuple[Key, int, str]]:
    """(kind, work, line) of all that is measured."""
    found = []
    for (name, dtype), head_dim, is_causal in itertools.product(_DTYPES.items(), _HEAD_DIMS, (False, True)):
        for q_len, kv_len in _LENGTHS:
            few = q_len <= FEW
            if not (few and is_causal):
                line = f"forward {name} b1 h{HEADS} q{q_len} kv{kv_len} d{head_dim}{' causal' if is_causal else ''}"
                work = HEADS * q_len * kv_len * 2 * head_dim  # as in sdpa_thresholds
                found.append((Key(dtype, head_dim, few, is_causal), work, line))
    return found


def threshold(points: list[Point]) -> float:
    """The least work from which on libmfa was faster at each point; inf if it was not at that of the most work."""
    least = math.inf
    for work, is_faster in sorted(points, key=lambda point: (-point[0], point[1])):
        if not is_faster:
            break
        least = work
    return least


def measure_all(measure: Measure, device: str) -> tuple[Thresholds, list[dict[str, Any]], list[tuple[str, str]]]:
    """(the thresholds, the times they come from, the lines that one of the two did not run, with the error). A kind
    without a single time has no threshold."""
    points: dict[Key, list[Point]] = {}
    measured, failed = [], []
    lines = problems()
    with display.progress(len(lines)) as begin:
        for kind, work, line in lines:
            begin(line)
            try:
                ours, theirs = measure(line, device)
            except (RuntimeError, NotImplementedError) as error:
                failed.append((line, f"{type(error).__name__}: {error}"))
                continue
            points.setdefault(kind, []).append((work, ours < theirs))
            measured.append({"problem": line, "ours_ms": 1e3 * ours, "torch_ms": 1e3 * theirs})
    return {kind: threshold(found) for kind, found in points.items()}, measured, failed


def run(measure: Measure = speed.compare, device: str = "mps") -> int:
    """Measures, writes the file of this machine and prints the thresholds; returns the exit status. Unsupported where
    there is no Metal device, since on the CPU sdpa_thresholds are in force."""
    missing = unavailable_reason(device)
    if missing:
        raise Unsupported(
            f"check --tune measures thresholds of mps, and libmfa does not run there: {missing}; those of the CPU are "
            "sdpa_thresholds, which it does not measure"
        )
    thresholds.writable_path()  # raises before minutes of measuring
    found, measured, failed = measure_all(measure, device)
    rows = [
        (str(kind.dtype).removeprefix("torch."), kind.head_dim, _calls(kind), "none" if math.isinf(work) else int(work))
        for kind, work in found.items()
    ]
    title = f"the least work, B * H * L * S * (E + Ev), that libmfa runs on {apple.gpu_name()}"
    display.table(title, rows, ("dtype", "head dim", "calls", "work"))
    if failed:
        display.table("not measured", failed)
    print(f"{thresholds.save(found, measured)} has the thresholds; replace_sdpa() reads them from now on")
    return 0


def _calls(kind: Key) -> str:
    if kind.few:
        return f"up to {FEW} queries"
    return "causal" if kind.is_causal else "not causal"
