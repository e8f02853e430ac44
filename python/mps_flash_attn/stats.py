"""What came by after replace_sdpa(), and which calls are to be taken over: those that PyTorch's settings allow a kernel
like ours to run, from the size on from which that is worth it."""

from collections import Counter

import torch

from .after_fork import new_lock

# The least work, in multiply-adds of the forward pass (B * H * L * S * (E + Ev)), that is worth taking over from
# PyTorch: below it the call costs more than the kernel saves, in the forward pass or with backward. As measured by
# bench/overhead.py --thresholds, on the CPU; on MPS all calls are taken over. May be set: 0 takes over all,
# float("inf") leaves a dtype to PyTorch altogether.
sdpa_thresholds = {torch.float32: 1 << 19, torch.float16: 1 << 13, torch.bfloat16: 1 << 17, torch.float64: 1 << 17}

REPLACED, SMALL = "replaced", "small"
DISABLED = "flash attention is disabled"
WAITED = "waited for PyTorch's stream: "  # counted beside what it led to
_lock = new_lock(globals(), "_lock")
_outcomes = Counter()
flash_is_enabled, _efficient_is_enabled = torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled


def disabled():
    """Why no call is to be taken over while PyTorch's settings are as they are; None if they allow it. Ours is none of
    PyTorch's kernels: it is allowed where one is that holds no scores. cuDNN's does not count: it stays allowed where
    all others are switched off to have the unfused path."""
    return None if flash_is_enabled() or _efficient_is_enabled() else DISABLED


def small(work, tensor):
    """Why a call of so many multiply-adds is left to PyTorch; None if we take it, or if its lengths may yet change."""
    if tensor.device.type != "cpu" or not isinstance(work, int):
        return None
    return SMALL if work < sdpa_thresholds[tensor.dtype] else None


def count(outcome):
    if torch.compiler.is_dynamo_compiling():  # a graph counts nothing
        return
    with _lock:
        _outcomes[outcome] += 1


def sdpa_stats(reset=False):
    """How many calls came by since the start (or since the last reset): under "replaced" those that ran on libmfa, and
    under each reason those that PyTorch's own operator was given. A call in compiled code comes by when it is traced,
    not when it runs."""
    with _lock:
        outcomes = dict(_outcomes)
        if reset:
            _outcomes.clear()
    return outcomes
