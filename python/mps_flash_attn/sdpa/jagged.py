"""scaled_dot_product_attention of nested tensors with the jagged layout: (B, H, j, D), whose sequences are of their own
lengths j.

Their class does not call the operator, but a function of PyTorch's in Python. Without a GPU of NVIDIA's that makes
nested tensors of another layout, holds all scores, and knows no causal mask. After replace_sdpa() these calls go to
flash_attention_varlen, which reads the rows where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import tensors
from ..library import Unsupported
from ..stats import REPLACED, count
from ..varlen import flash_attention_varlen
from . import dispatch
from .checkpointing import handles, top_hooks
from .compiler_cache import tag_compiler_cache

try:  # not public in PyTorch
    from torch.nested._internal import ops
    from torch.nested._internal.nested_tensor import nested_view_from_values_offsets
except ImportError:
    ops = None  # type: ignore[assignment] # a module otherwise

_NAME = "jagged_scaled_dot_product_attention"
_original: Any = getattr(ops, _NAME, None)


def register() -> None:
    """Puts attention() in the place of PyTorch's function."""
    global _original
    found = getattr(ops, _NAME, None)
    if found is not None and found is not attention:
        _original = found
        setattr(ops, _NAME, attention)


def unregister() -> None:
    """Restores PyTorch's function, unless something else has taken the place of ours."""
    if getattr(ops, _NAME, None) is attention:
        setattr(ops, _NAME, _original)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The function that PyTorch calls."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    hooks = top_hooks(True)
    if (hooks is not None or not handles) and not dispatch.is_replaced_for(hooks, query, key, value):
        return _original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if tensors.is_jagged(query) and query.dim() > 3 and query._ragged_idx == 1:  # PyTorch calls SDPA of what is inside
        return _original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    reason = fallback_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
    if reason is None:
        try:
            return _attend(query, key, value, dropout_p, is_causal, scale)
        except Unsupported as error:
            reason = str(error)
    count(reason)
    return _original(query, key, value, attn_mask, dropout_p, is_causal, **options)


def fallback_reason(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why PyTorch runs the call; None if libmfa does. PyTorch also raises the errors for wrong arguments."""
    operands = query, key, value
    if not all(map(tensors.is_jagged, operands)):
        return "nested tensors together with others"
    if attn_mask is not None:
        return "nested tensors: attn_mask"
    if any(one.dim() != 4 or one._ragged_idx != 2 for one in operands):
        return "nested tensors: not (B, H, j, D)"
    if query._lengths is not None:
        return "nested tensors: gaps between the queries"
    (batch, heads, _, head_dim), (_, kv_heads, _, key_dim) = query._size, key._size
    if any(one._size[0] != batch for one in operands) or head_dim != key_dim or value._size[1] != kv_heads:
        return "nested tensors: shapes"
    if heads != kv_heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        return "nested tensors: head counts"
    if 0 in (batch, heads, head_dim, value._size[3]):
        return "nested tensors: empty tensors"
    if not _have_same_lengths(key, value):
        return "nested tensors: lengths of key and value"
    values, kind = _kind(operands)
    if kind is not dispatch.TRACED and not all(map(tensors.is_aligned, values)):
        return "memory that is not aligned to its elements"
    return dispatch.fallback_reason(values, kind, dropout_p, scale)


def packed(query: Any, key: Any, value: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """(the first arguments of flash_attention_varlen, seqused_k): rows, which are views, where their sequences begin,
    and how many of its keys a sequence uses where there are gaps after them."""
    starts_q, longest, used = query._offsets.to(torch.int32), query._get_max_seqlen(), None
    starts_k = starts_q if key._size[2] == query._size[2] else key._offsets.to(torch.int32)
    rows = tuple(one.values().transpose(0, 1) for one in (query, key, value))
    if key._lengths is None:
        longest_k = key._get_max_seqlen()
    else:
        used, longest_k = key._lengths.to(torch.int32), rows[1].shape[0]  # with the gap no sequence has more rows
    return (*rows, starts_q, starts_k, longest, longest_k), used


def _attend(query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, scale: float | None) -> Any:
    is_traced = _kind((query, key, value))[1] is dispatch.TRACED
    if is_traced:
        tag_compiler_cache()
    options: Any = {"is_causal": is_causal, "scale": scale, "enable_gqa": True, "dropout_p": dropout_p}
    arguments, used = packed(query, key, value)
    out = flash_attention_varlen(*arguments, seqused_k=used, **options)
    count("traced into a compiled graph" if is_traced else REPLACED)
    extremes = {"min_seqlen": query._maybe_min_seqlen, "max_seqlen": query._maybe_max_seqlen}
    return nested_view_from_values_offsets(out, query._offsets, **extremes).transpose(1, 2)


def _kind(operands: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], str]:
    """dispatch.kind_of() the tensors inside."""
    return dispatch.kind_of(tuple(one._values for one in operands))


def _have_same_lengths(key: Any, value: Any) -> bool:
    """Without waiting for a GPU: there they must have the same tensors of offsets and lengths. The size j stands for
    one of them."""
    if key._lengths is None and value._lengths is None:
        return key._size[2] == value._size[2] or _are_equal(key._offsets, value._offsets)
    return _are_equal(key._lengths, value._lengths) and _are_equal(key._offsets, value._offsets)


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first is second:
        return first is second
    return all(map(tensors.is_plain, (first, second))) and first.device.type == "cpu" and torch.equal(first, second)
