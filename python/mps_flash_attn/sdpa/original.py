"""PyTorch's own operators of attention, for the calls that libmfa does not run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import shapes

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


def original(*arguments: Any, **options: Any) -> Any:
    """PyTorch's own operator."""
    return OPERATOR.decompose(*arguments, **options)


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *arguments: Any, **options: Any
) -> Any:
    """PyTorch's unfused implementation."""
    return _math(query, key, value, mask, *arguments, **options)[0]


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    kept: Tensor,
    **options: Any,
) -> Tensor:
    """The same for the weights that are `kept`, of 4 dimensions."""
    _, weights = _math(query, key, value, mask, 0.0, is_causal, **options)
    weights = weights / (1 - dropout_p if dropout_p < 1 else 1) * kept
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *arguments: Any, **options: Any) -> Any:
    """(out, weights). PyTorch adds any mask, so a bool mask is converted first."""
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, *arguments, **options)


def original_for(reason: str) -> Callable[..., Any]:
    """The function of PyTorch for a call that falls back for this reason."""
    return math_attention if reason is shapes.LENGTHS else original
