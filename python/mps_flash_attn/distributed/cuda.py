"""One pair of queries and keys on CUDA, by PyTorch's own operators: flash attention, whose windows are the bands; or
cuDNN's attention, which has no windows, where PyTorch's own switches (sdpa_kernel, torch.backends.cuda) leave that and
not flash attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import tensors
from ..library import Unsupported
from ..options import Options
from ..problem import Inputs, InputsTuple, Operands
from .local_step import Kernels

_aten = torch.ops.aten
_MAX_HEAD_DIM = 256


def choose(inputs: InputsTuple, options: Options) -> Kernels:
    """What computes pairs of such inputs; Unsupported where nothing does."""
    query, key, value, mask, *_ = inputs
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        given = ", ".join(map(tensors.dtype_name, (query, key, value)))
        raise Unsupported(f"query, key and value are {given}; on CUDA all must be float16, or all bfloat16")
    if mask is not None:
        raise Unsupported("attn_mask is given; on CUDA there are is_causal, window_size and documents, but no masks")
    if options.softcap:
        raise Unsupported(f"softcap is {options.softcap}; on CUDA it must be 0")
    head_dim, columns = query.shape[3], value.shape[3]
    if head_dim != columns or head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        raise Unsupported(
            f"the head_dim of query and key is {head_dim} and that of value {columns}; on CUDA both must be the same "
            f"multiple of 8, up to {_MAX_HEAD_DIM}"
        )
    if torch.backends.cuda.flash_sdp_enabled():
        return _FLASH
    if not torch.backends.cuda.cudnn_sdp_enabled():
        raise Unsupported("neither flash attention nor cuDNN's is enabled (torch.nn.attention.sdpa_kernel)")
    if options.lower is not None or options.upper not in (None, 0):
        raise Unsupported("cuDNN's attention has no windows here; enable flash attention (SDPBackend.FLASH_ATTENTION)")
    return _CUDNN


def windows(q_len: int, kv_len: int, lower: int | None, upper: int | None) -> tuple[int, int]:
    """The band of a pair as flash-attn's (window_size_left, window_size_right), which count from the last query and
    key; -1: no limit. The pair is as layout.visible() leaves it, so that neither is negative."""
    diagonal = kv_len - q_len
    left = -1 if lower is None or lower <= 1 - q_len else diagonal - lower
    right = -1 if upper is None or upper >= kv_len - 1 else upper - diagonal
    return left, right


def _band(inputs: Inputs, options: Options) -> tuple[int, int, bool]:
    """(left, right, is_causal)."""
    left, right = windows(inputs.query.shape[2], inputs.key.shape[2], options.lower, options.upper)
    return left, right, (left, right) == (-1, 0)


def _flash_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    query, key, value = (one.transpose(1, 2) for one in inputs[:3])
    left, right, is_causal = _band(inputs, options)
    lengths = None, None, query.shape[1], key.shape[1]
    window = {"window_size_left": left, "window_size_right": right}
    out, lse, *_ = _aten._flash_attention_forward(
        query, key, value, *lengths, 0.0, is_causal, False, scale=options.scale, **window
    )
    return out.transpose(1, 2), lse


def _flash_backward(operands: Operands, options: Options, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    inputs, out, lse, d_out, _, _ = operands
    query, key, value = (one.transpose(1, 2) for one in inputs[:3])
    d_out, out = (one.to(query.dtype).transpose(1, 2) for one in (d_out, out))
    left, right, is_causal = _band(inputs, options)
    lengths = None, None, query.shape[1], key.shape[1]
    window = {"window_size_left": left, "window_size_right": right}
    seed = query.new_empty(2, dtype=torch.uint64)  # of dropout, of which there is none
    gradients = _aten._flash_attention_backward(
        *(d_out, query, key, value, out, lse.contiguous(), *lengths, 0.0, is_causal, seed, seed),
        scale=options.scale,
        **window,
    )
    return (*(one.transpose(1, 2) if is_wanted else None for one, is_wanted in zip(gradients, wanted)), None)


def _cudnn_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    query, key, value = inputs[:3]
    *_, is_causal = _band(inputs, options)
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=options.scale
    )
    return out, lse.reshape(query.shape[:3])


def _cudnn_backward(operands: Operands, options: Options, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    inputs, out, lse, d_out, _, _ = operands
    query, key, value = inputs[:3]
    *_, is_causal = _band(inputs, options)
    lengths = None, None, query.shape[2], key.shape[2]
    seed = query.new_empty((), dtype=torch.int64)  # of dropout, of which there is none
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        *(d_out.to(query.dtype), query, key, value, out.to(query.dtype), lse.contiguous()[..., None]),
        *(seed, seed, None, *lengths, 0.0, is_causal),
        scale=options.scale,
    )
    return (*(one if is_wanted else None for one, is_wanted in zip(gradients, wanted)), None)


_FLASH = Kernels(_flash_forward, _flash_backward, has_low=False, has_lse_gradient=False)
_CUDNN = Kernels(_cudnn_forward, _cudnn_backward, has_low=False, has_lse_gradient=False)
