"""Times flash_attention beside PyTorch's own scaled_dot_product_attention, for `python -m mps_flash_attn check`.

bench/ measures more carefully, in processes of their own and with the memory; this file is for a first impression on a
machine where only the package is installed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .attention import flash_attention
from .library import BAND_OPEN_LOWER, BAND_OPEN_UPPER, Scalars, library, scalars

ROUNDS = 9  # turns of each function
_LEAST_ROUNDS = 3
TURN_SECONDS = 0.01  # at least, so that waiting for a GPU counts little
_TOTAL_SECONDS = 1.0  # for slow functions there are fewer rounds
_MAX_REPEATS = 1000

Clock = Callable[[], float]
Function = Callable[[], object]


class Speed(NamedTuple):
    """Seconds a call, the median of several turns."""

    ours: float
    torch: float


def medians(functions: Sequence[Function], wait: Function, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds a call of each function, the median of its turns. They take turns, so that a machine that becomes slower
    slows all of them. `wait()` returns when what they began is done."""

    def turn(function: Function, repeats: int) -> float:
        begin = clock()
        for _ in range(repeats):
            function()
        wait()
        return (clock() - begin) / repeats

    repeats, total = [], 0.0
    for function in functions:
        turn(function, 1)  # compiles kernels, and allocates
        once = max(turn(function, 1), 1e-9)
        repeats.append(max(1, min(_MAX_REPEATS, math.ceil(TURN_SECONDS / once))))
        total += once * repeats[-1]
    rounds = max(_LEAST_ROUNDS, min(ROUNDS, int(_TOTAL_SECONDS / total)))
    taken = [list(map(turn, functions, repeats)) for _ in range(rounds)]
    return list(map(statistics.median, zip(*taken)))


def compare(line: str, device: str, clock: Clock = time.perf_counter) -> Speed:
    """The Speed of a problem, whose line begins with its pass; of backward with the forward pass before it.
    RuntimeError or NotImplementedError where one of the two cannot run it."""
    call = Comparable.of(line, device)
    functions = [lambda: call.run(call.ours), lambda: call.run(call.torch)]
    wait = torch.mps.synchronize if device == "mps" else lambda: None
    return Speed(*medians(functions, wait, clock))


class Comparable(NamedTuple):
    """A problem as arguments of scaled_dot_product_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    is_backward: bool

    @classmethod
    def of(cls, line: str, device: str) -> Comparable:
        """That of a line, with random operands on the device. ValueError if that function has not its features."""
        sizes = scalars(library().parse(line))
        if not _is_plain(sizes):
            raise ValueError(f'the problem is "{line}"; PyTorch has causal, bool masks and additive ones only')
        inputs = reference.operands(sizes, 1)
        # Contiguous, since before macOS 15 PyTorch's kernels for mps take no others.
        query, key, value = (tensor.contiguous().to(device) for tensor in inputs[:3])
        mask = None if inputs.attn_mask is None else inputs.attn_mask.to(device)
        is_backward = line.startswith("backward")
        for tensor in (query, key, value):
            tensor.requires_grad_(is_backward)
        return cls(query, key, value, mask, sizes.upper == 0, sizes.scale, is_backward)

    def run(self, attend: Callable[[], Tensor]) -> Any:
        """The result, or in backward the gradients."""
        if not self.is_backward:
            with torch.no_grad():
                return attend()
        out = attend()
        return torch.autograd.grad(out, (self.query, self.key, self.value), torch.ones_like(out))

    def ours(self) -> Tensor:
        """flash_attention of it."""
        options: dict[str, Any] = {"attn_mask": self.mask, "enable_gqa": True}
        return flash_attention(self.query, self.key, self.value, self.is_causal, self.scale, **options)

    def torch(self) -> Tensor:
        """scaled_dot_product_attention of it, PyTorch's own unless it is replaced."""
        key, value = self.key, self.value
        group = self.query.shape[1] // key.shape[1]
        if group > 1 and key.device.type == "mps" and torch.__version__ < "2.7":  # enable_gqa ends the process there
            key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
            group = 1
        options: dict[str, Any] = {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": group > 1}
        return F.scaled_dot_product_attention(self.query, key, value, self.mask, **options)


def _is_plain(sizes: Scalars) -> bool:
    band = sizes.lower == BAND_OPEN_LOWER and sizes.upper in (0, BAND_OPEN_UPPER)
    return band and not (sizes.softcap or sizes.alibi or sizes.sinks or sizes.dropout or sizes.block_map_q)
