"""What came by after replace_sdpa(), and from which size on a call is worth taking over."""

from collections import Counter

import torch

from .after_fork import new_lock

# The least work, in multiply-adds of the forward pass (B * H * L * S * (E + Ev)), that is worth taking over from
# PyTorch: below it the call costs more than the kernel saves, in the forward pass or with backward. As measured by
# bench/overhead.py --thresholds, on the CPU; on MPS all calls are taken over. May be set: 0 takes over all,
# float("inf") leaves a dtype to PyTorch altogether.
sdpa_thresholds = {torch.float32: 1 << 19, torch.float16: 1 << 13, torch.bfloat16: 1 << 17, torch.float64: 1 << 17}

REPLACED, SMALL = "replaced", "small"
WAITED = "waited for PyTorch's stream: "  # counted beside what it led to
_lock = new_lock(globals(), "_lock")
_outcomes = Counter()


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
