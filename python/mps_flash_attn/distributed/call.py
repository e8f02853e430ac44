"""What defines a call of context_parallel_attention beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

from ..options import Options
from .layout import Layout
from .local_step import Kernels


class Call(NamedTuple):
    layout: Layout
    options: Options
    cuts: tuple[int, ...]  # where documents begin, but for the first
    kernels: Kernels
    wanted: tuple[bool, ...]  # which of dQ, dK, dV, dbias, dsinks; of the first three alike on all ranks
    method: str
    with_lse: bool  # whether the caller gets lse, so that it may have a gradient
