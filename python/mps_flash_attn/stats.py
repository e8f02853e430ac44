"""Counts the calls of the replaced scaled_dot_product_attention, and holds two of its criteria: PyTorch's settings, and
the least size that is worth replacing."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from .after_fork import new_lock

# The least work, in multiply-adds of the forward pass (B * H * L * S * (E + Ev)), for which libmfa replaces PyTorch:
# for less, the call costs more than the kernel saves, in the forward pass or with backward. The values were measured on
# the CPU by bench/overhead.py --thresholds; MPS has others (sdpa/torch_mps.py). Users may set them: 0 replaces all
# calls of a dtype, float("inf") none.
sdpa_thresholds: dict[torch.dtype, float] = {
    torch.float32: 1 << 19,
    torch.float16: 1 << 13,
    torch.bfloat16: 1 << 17,
    torch.float64: 1 << 17,
}

REPLACED, SMALL = "replaced", "small"
DISABLED = "flash attention is disabled"
TORCH_KERNEL = "PyTorch's own kernel"  # on MPS
WAITED = "waited for PyTorch's stream: "  # counted in addition to the outcome
_lock = new_lock(globals(), "_lock")
_outcomes: Counter[str] = Counter()
flash_is_enabled, _efficient_is_enabled = torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled


def disabled_reason() -> str | None:
    """Why PyTorch's settings allow no replacement; None if they allow it. libmfa is none of PyTorch's backends: it is
    allowed where a backend is that does not hold the scores. cuDNN is ignored, since it stays allowed where users
    disable all other backends to get the unfused one."""
    return None if flash_is_enabled() or _efficient_is_enabled() else DISABLED


def small_reason(work: int, tensor: Tensor) -> str | None:
    """SMALL if PyTorch runs a call of `work` multiply-adds on the CPU, because it is too small; else None. Symbolic
    lengths are never too small."""
    if tensor.device.type != "cpu" or not isinstance(work, int):
        return None
    return SMALL if work < sdpa_thresholds[tensor.dtype] else None


def count(outcome: str) -> None:
    """Counts a call."""
    if torch.compiler.is_dynamo_compiling():  # a compiled graph does not count
        return
    with _lock:
        _outcomes[outcome] += 1


def sdpa_stats(reset: bool = False) -> dict[str, int]:
    """The number of calls by outcome since the start, or since the last reset: "replaced" for those that ran on libmfa,
    and the reason for those that PyTorch's own operator ran. A call in compiled code is counted when it is traced, not
    when it runs. `reset` sets all to zero, after they were read. The dictionary is a copy."""
    with _lock:
        outcomes = dict(_outcomes)
        if reset:
            _outcomes.clear()
    return outcomes
