"""The options of attention: all that defines the result beside the tensors, as one immutable object."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """Passed as a whole through every layer. Its fields are read where a problem is packed (problem.py), in the
    reference (reference.py), in the schemas of the operators (operators.py), which list them in this order, and where
    PyTorch's operator gets them (sdpa/gradients.py)."""

    lower: int | None = None  # the smallest j - i that takes part; None: no bound
    upper: int | None = None  # the largest
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    softcap: float = 0.0  # 0: none
    dropout: float = 0.0  # the probability; its seed is one of the Inputs
    block_q: int = 0  # queries of a block of the block_mask; 0: none
    block_kv: int = 0  # keys
