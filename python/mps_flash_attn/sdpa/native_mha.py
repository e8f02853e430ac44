"""nn.MultiheadAttention and nn.TransformerEncoderLayer in evaluation, which do not call scaled_dot_product_attention.

Without gradients they call one operator that projects, attends and projects again, and holds all scores meanwhile.
After replace_sdpa() its self-attention goes through scaled_dot_product_attention, if libmfa runs the call.
TransformerEncoder with padding makes nested tensors first, which PyTorch keeps. Dispatch modes see this operator and
nothing of what runs in it, as in PyTorch itself.

For a query that may see no key, PyTorch's operator returns NaN; scaled_dot_product_attention, and so this, zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import context_parallel_state, tensors
from ..stats import count, disabled_reason, flash_is_enabled, small_reason
from .checkpointing import handles

_NAME = "_native_multi_head_attention"
_KEY = "CPU"
_INSTEAD = "turn it off by torch.backends.mha.set_fastpath_enabled(False)"
# mask_type: the shape of its mask, in which True hides.
_MASK_SHAPES: dict[int | None, Callable[[int, int, int], tuple[int, ...]]] = {
    0: lambda batch, heads, length: (1, 1, length, length),
    1: lambda batch, heads, length: (batch, 1, 1, length),
    2: lambda batch, heads, length: (batch, heads, length, length),
}


def kernels() -> dict[tuple[str, str], Callable[..., Any]]:
    """The override, as Overrides takes it, which calls the original while SDPA is not replaced. Without get_kernel the
    original cannot be called, so there is none."""
    if not hasattr(torch.library, "get_kernel"):
        return {}
    original: Any = torch.library.get_kernel(f"aten::{_NAME}", _KEY)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        num_head: int,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        mask_type: int | None = None,
    ) -> Any:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        if handles:
            context_parallel_state.refuse_local(
                "the fast path of nn.MultiheadAttention",
                "turn it off by torch.backends.mha.set_fastpath_enabled(False)",
            )
            reason = fallback_reason(query, key, value, num_head, weights, mask, need_weights, mask_type)
            if reason is None:
                return _attend(query, num_head, *weights, mask, mask_type), None
            count(reason)
        options = (mask, need_weights, average_attn_weights, mask_type)
        keys = torch._C._dispatch_keys(query)
        return original.call_boxed(keys, query, key, value, embed_dim, num_head, *weights, *options)

    return {(_NAME, _KEY): attention}


def fallback_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    weights: tuple[Tensor, ...],
    mask: Tensor | None,
    need_weights: bool,
    mask_type: int | None,
) -> str | None:
    """Why PyTorch's operator runs the call; None if it goes through scaled_dot_product_attention."""
    if query is not key or key is not value or need_weights:
        return "nn.MultiheadAttention: not self-attention, or its weights are wanted"
    args = (query, *weights) if mask is None else (query, *weights, mask)
    if not all(map(tensors.is_plain, args)):
        return "nn.MultiheadAttention: not plain tensors"
    if query.dtype not in tensors.DTYPES or query.dim() != 3 or query.shape[2] % heads:
        return "nn.MultiheadAttention: shapes or dtypes"
    if mask is not None and mask_type not in _MASK_SHAPES:
        return "nn.MultiheadAttention: its mask"
    if not (flash_is_enabled() or torch._C._get_math_sdp_enabled()):
        return "nn.MultiheadAttention: PyTorch has no backend for scaled_dot_product_attention"
    batch, length, width = query.shape
    return disabled_reason() or small_reason(2 * batch * length * length * width, query)


def _attend(
    query: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    batch, length, width = query.shape
    projected = F.linear(query, qkv_weight, qkv_bias).view(batch, length, 3, heads, width // heads)
    visible = None if mask is None else ~mask.to(torch.bool).view(_MASK_SHAPES[mask_type](batch, heads, length))
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, visible)
    return F.linear(out.transpose(1, 2).reshape(batch, length, width), proj_weight, proj_bias)
