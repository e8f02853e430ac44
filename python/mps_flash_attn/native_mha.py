"""nn.MultiheadAttention and nn.TransformerEncoderLayer, where they do not come by scaled_dot_product_attention.

In evaluation, without gradients, they take a way of their own, an operator that projects, attends and projects again,
and holds all scores meanwhile. After replace_sdpa() its self-attention goes through scaled_dot_product_attention, if
that is ours to run. TransformerEncoder with padding makes nested tensors first: those stay PyTorch's. Dispatch modes
see the operator, and, as without us, nothing of what is in it.

Where a query may see no key the operator gives NaN; scaled_dot_product_attention, and so this, gives zeros.
"""

import warnings

import torch
import torch.nn.functional as F

from . import tensors
from .stats import count, disabled, flash_is_enabled, small

_NAME = "_native_multi_head_attention"
_KEY = "CPU"
_MASK_SHAPES = {  # mask_type: what its mask, in which True hides, covers
    0: lambda batch, heads, length: (1, 1, length, length),
    1: lambda batch, heads, length: (batch, 1, 1, length),
    2: lambda batch, heads, length: (batch, heads, length, length),
}


def kernel():
    """The one in force, for PyTorch from get_kernel on."""
    return torch.library.get_kernel(f"aten::{_NAME}", _KEY)


def register(registration, is_in_force):
    """Adds the override to the others, which leads to the original while it is not in force. A PyTorch without
    get_kernel has no way to the original: then it is let be."""
    if not hasattr(torch.library, "get_kernel"):
        return
    original = kernel()

    def attention(
        query,
        key,
        value,
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        mask=None,
        need_weights=True,
        average_attn_weights=True,
        mask_type=None,
    ):
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        if is_in_force():
            reason = fallback_reason(query, key, value, num_head, weights, mask, need_weights, mask_type)
            if reason is None:
                return _attend(query, num_head, *weights, mask, mask_type), None
            count(reason)
        options = (mask, need_weights, average_attn_weights, mask_type)
        keys = torch._C._dispatch_keys(query)
        return original.call_boxed(keys, query, key, value, embed_dim, num_head, *weights, *options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is a kernel already is why we are here
        registration.impl(_NAME, attention, _KEY)


def fallback_reason(query, key, value, heads, weights, mask, need_weights, mask_type):
    """Why the operator keeps this call; None if it goes through scaled_dot_product_attention."""
    if query is not key or key is not value or need_weights:
        return "nn.MultiheadAttention: not self-attention, or its weights are wanted"
    given = (query, *weights) if mask is None else (query, *weights, mask)
    if not all(map(tensors.is_plain, given)):
        return "nn.MultiheadAttention: not plain tensors"
    if query.dtype not in tensors.DTYPES or query.dim() != 3 or query.shape[2] % heads:
        return "nn.MultiheadAttention: shapes or dtypes"
    if mask is not None and mask_type not in _MASK_SHAPES:
        return "nn.MultiheadAttention: its mask"
    if not (flash_is_enabled() or torch._C._get_math_sdp_enabled()):
        return "nn.MultiheadAttention: PyTorch has no backend for scaled_dot_product_attention"
    batch, length, width = query.shape
    return disabled() or small(2 * batch * length * length * width, query)


def _attend(query, heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type):
    batch, length, width = query.shape
    projected = F.linear(query, qkv_weight, qkv_bias).view(batch, length, 3, heads, width // heads)
    visible = None if mask is None else ~mask.to(torch.bool).view(_MASK_SHAPES[mask_type](batch, heads, length))
    out = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4), visible)
    return F.linear(out.transpose(1, 2).reshape(batch, length, width), proj_weight, proj_bias)
