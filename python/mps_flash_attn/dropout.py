"""Dropout: the seed of a call, and the mask that a seed gives.

A seed is a number in a tensor on the operands' device, so that a GPU is not waited for. It is drawn by PyTorch's
default generator of that device: manual_seed, checkpoints, compilers and vmap treat it like all random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, problem, transforms
from .operators import dropout_mask as mask_operator

_SCALARS = torch.Size(()), torch.Size((1,))  # the shapes of a seed


def dropout_mask(shape: Sequence[int], dropout_p: float, dropout_seed: Tensor | int) -> Tensor:
    """Which weights flash_attention(..., dropout_p=dropout_p, dropout_seed=dropout_seed) keeps: a bool tensor of the
    shape (B, H, L, S), True where softmax's result is multiplied by 1 / (1 - dropout_p), and False where it is dropped.
    It is on the device of the seed; for a number, on the CPU. It is computed on the CPU, B * H * L * S bytes."""
    sizes = tuple(shape)
    if len(sizes) != 4:
        raise ValueError(f"shape is {sizes}; it must have 4 sizes: (batch, heads, L, S)")
    batch, *others = sizes
    seed = _as_tensor(dropout_seed, torch.device("cpu"))
    problem.check_seed(seed, seed, *_SCALARS)
    return mask_operator(_of_batch(seed, batch), *others, arguments.probability(dropout_p))


def seed_of(given: Tensor | int | None, dropout: float, query: Tensor, batch: int) -> Tensor | None:
    """The seeds of a call as (batch,), drawn if none is given; None without dropout."""
    seed = None
    if given is not None:
        seed = _as_tensor(given, query.device)
        problem.check_seed(seed, query, *_SCALARS)
    if not dropout:
        return None
    return draw(query, batch) if seed is None else _of_batch(seed, batch)


def draw(query: Tensor, batch: int) -> Tensor:
    """A new seed, as (batch,). On mps integers are drawn from ranges of 31 bits, so it is made of two."""
    words = torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=query.device)
    if transforms.vmaps_view_as_dtype or not transforms.are_active():
        seed = words.view(torch.int64)
    else:
        low, high = words.to(torch.int64)
        seed = (high << 32) | low  # the same number
    return _of_batch(seed, batch)


def _as_tensor(seed: Any, device: torch.device) -> Tensor:
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.tensor([arguments.seed_number(seed)], dtype=torch.int64, device=device)


def _of_batch(seed: Tensor, batch: int) -> Tensor:
    return seed.reshape(1).expand(batch)
