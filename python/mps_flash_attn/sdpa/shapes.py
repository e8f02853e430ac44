"""The shapes that scaled_dot_product_attention takes: 2 dimensions or more, leading ones broadcast, heads grouped.

This file checks them, and converts tensors to the (batch, head, row, column) that libmfa reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch_cache

Shape = Sequence[int]

HEAD_DIM_MAX = 512
LENGTHS = "lengths of key and value"  # PyTorch's fused kernel would read past the end of the shorter one
# What PyTorch's fused kernel takes, too: grouped heads with enable_gqa; one head of K and V for all of Q without it;
# tensors without a batch.
_FUSES_GROUPED_HEADS = torch.__version__ >= "2.9"
_FUSES_SHARED_HEAD = torch.__version__ >= "2.14"
_FUSES_THREE_DIMENSIONS = torch.__version__ >= "2.14"


class Support(NamedTuple):
    """Whether a call with certain shapes is supported."""

    reason: str | None  # why PyTorch runs the call, which also raises the errors for wrong shapes; None if libmfa does
    fits: bool = False  # libmfa reads these shapes without conversion
    work: int = 0  # multiply-adds of the forward pass


def check_support(
    query: Shape, key: Shape, value: Shape, mask: Shape | None, is_causal: bool, enable_gqa: bool
) -> Support:
    """The Support of these shapes; `mask` is None if there is none."""
    if len(query) < 2 or len(key) < 2 or len(value) < 2 or query[-1] != key[-1]:
        return Support("shapes")
    if key[-2] != value[-2]:
        return Support(LENGTHS)
    if 0 in query or 0 in key or 0 in value:
        return Support("empty tensors")
    if query[-1] > HEAD_DIM_MAX or value[-1] > HEAD_DIM_MAX:
        return Support(f"head_dim above {HEAD_DIM_MAX}")
    if enable_gqa and (min(map(len, (query, key, value))) < 3 or query[-3] % key[-3] or query[-3] % value[-3]):
        return Support("head counts")
    k_lead, v_lead = ((*shape[:-3], 1) if enable_gqa else shape[:-2] for shape in (key, value))
    lead = broadcast(query[:-2], k_lead, v_lead)
    if lead is None:
        return Support("shapes")
    if mask is not None:
        if is_causal:
            return Support("attn_mask together with is_causal")
        scores = (*broadcast(query[:-2], k_lead), query[-2], key[-2])
        if not 2 <= len(mask) <= len(scores):
            return Support("attn_mask dimensions")
        if any(size != 1 and size != full for size, full in zip(reversed(mask), reversed(scores))):
            return Support("attn_mask shape")
    fits = len(query) == len(key) == len(value) == 4 and query[0] == key[0] and key[:2] == value[:2]
    return Support(
        None,
        fits and (enable_gqa or query[1] == key[1]),
        math.prod(lead) * query[-2] * key[-2] * (query[-1] + value[-1]),
    )


def check_support_cached(*arguments: Any) -> Support:
    """The same for shapes that are numbers, not symbols."""
    support = dispatch_cache.get(arguments)
    return dispatch_cache.put(arguments, check_support(*arguments)) if support is None else support


def broadcast(*shapes: Shape) -> Any:
    """The shape that all broadcast to; None if there is none."""
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for place, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if result[place] != 1 and result[place] != size:
                    return None
                result[place] = size
    return result


def four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """The four tensors as libmfa reads them, and the shape of the result of SDPA."""
    rank = max(query.dim(), key.dim(), value.dim())
    most = max(rank, 4)
    query, key, value = (_pad(tensor, most) for tensor in (query, key, value))
    lead = broadcast(*(tensor.shape[:-3] for tensor in (query, key, value)))
    if enable_gqa:
        heads = query.shape[-3]
        key, value = _same_groups(key, value)
    else:
        (heads,) = broadcast(*(tensor.shape[-3:-2] for tensor in (query, key, value)))
        query = query.expand(*query.shape[:-3], heads, -1, -1)
        if not key.shape[-3] == value.shape[-3] == 1:
            key, value = (tensor.expand(*tensor.shape[:-3], heads, -1, -1) for tensor in (key, value))
    shape = (*lead, heads, query.shape[-2], value.shape[-1])[-rank:]
    query, key, value = (tensor.expand(*lead, -1, -1, -1).flatten(0, -4) for tensor in (query, key, value))
    if mask is not None:
        mask = _pad(mask, most)
        if any(size != 1 for size in mask.shape[:-3]):
            mask = mask.expand(*lead, -1, -1, -1)
        mask = mask.flatten(0, -4)
    return query, key, value, mask, shape


def mapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dimensions: Sequence[int | None],
    size: int,
) -> tuple[Any, ...]:
    """The four tensors of one call in place of a vmap over `dimensions` of this size, None where a tensor is not
    mapped: the mapped dimension is put in front of the others."""
    operands: tuple[Any, ...] = (query, key, value, mask)
    ranks = [tensor.dim() - (place is not None) for tensor, place in zip(operands[:3], dimensions)]
    query, key, value, mask = (
        tensor if place is None else _in_front(tensor, place, max(ranks)) for tensor, place in zip(operands, dimensions)
    )
    if dimensions[0] is dimensions[1] is None and dimensions[3] is not None:  # the scores are mapped by the mask alone
        query = _pad(query, max(ranks)).expand(size, *(-1,) * max(ranks))
    return query, key, value, mask


def _in_front(tensor: Tensor, place: int, rank: int) -> Tensor:
    tensor = tensor.movedim(place, 0)
    index = slice(None), *(None,) * (rank + 1 - tensor.dim())
    return tensor[index]


def is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """Whether PyTorch's fused CPU kernel accepts such tensors. Its result has the layout of the query; that of the
    unfused path is contiguous."""
    if _FUSES_THREE_DIMENSIONS and query.dim() == key.dim() == value.dim() == 3:
        query, key, value = query[None], key[None], value[None]
        if mask is not None and mask.dim() == 3:
            mask = mask[None]
    if not query.dim() == key.dim() == value.dim() == 4 or query.shape[0] != key.shape[0]:
        return False
    if query.device.type != "cpu" or key.shape[:2] != value.shape[:2] or query.shape[3] != value.shape[3]:
        return False
    if query.shape[1] != key.shape[1] and not (
        _FUSES_GROUPED_HEADS if enable_gqa else _FUSES_SHARED_HEAD and key.shape[1] == 1
    ):
        return False
    if mask is not None and (mask.requires_grad or mask.dim() == 3):
        return False
    return query.stride(3) == key.stride(3) == value.stride(3) == 1


def _pad(tensor: Tensor, rank: int) -> Tensor:
    return tensor[(None,) * (rank - tensor.dim())]


def _same_groups(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Key and value with equally many heads. Query head h still uses head h // (query heads // heads) of each."""
    heads = math.lcm(key.shape[-3], value.shape[-3])
    return tuple(
        tensor if tensor.shape[-3] == heads else tensor.repeat_interleave(heads // tensor.shape[-3], -3)
        for tensor in (key, value)
    )
