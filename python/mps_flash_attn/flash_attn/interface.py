"""The functions of flash_attn for dense batches and for packed sequences."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dropout
from ..attention import flash_attention
from ..varlen import flash_attention_varlen

__version__ = "2.8.3"  # whose interface this is

Attention = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """softmax(softmax_scale * q k^T) v: q (B, L, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv) in one dtype, H a multiple
    of Hkv; the result is (B, L, H, Dv).

    softmax_scale      None is 1/sqrt(D)
    causal             query i sees keys j <= i + S - L
    window_size        (left, right): keys i + S - L - left to i + S - L + right, -1 being no limit
    softcap            scores are softcap * tanh(score / softcap), if it is above 0
    alibi_slopes       (H,) or (B, H) in float32: -slope * |i + S - L - j| is added to the scores
    dropout_p          the probability of dropout; its seed comes from PyTorch's default generator of the device
    deterministic      has no effect: gradients are always the same in every run
    return_attn_probs  returns (out, softmax_lse, S_dmask), for tests: softmax_lse (B, H, L) in float32; S_dmask is
                       empty without dropout, else (B, H, L, S) in q's dtype, the softmax's result, negative where it
                       was dropped, for which all scores are computed again

    ValueError and TypeError as by flash_attention()."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    options: dict[str, Any] = {
        "is_causal": "bottom_right" if causal else False,
        "scale": softmax_scale,
        "enable_gqa": True,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    if not return_attn_probs:
        return flash_attention(query, key, value, dropout_p=dropout_p, **options).transpose(1, 2)
    seed = dropout.draw(q, 1) if dropout_p else None
    out, lse = flash_attention(query, key, value, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, **options)
    S_dmask = q.new_empty(0) if seed is None else _signed_weights(query, key, dropout_p, seed, options)
    return out.transpose(1, 2), lse, S_dmask


@torch.no_grad()
def _signed_weights(query: Tensor, key: Tensor, dropout_p: float, seed: Tensor, options: dict[str, Any]) -> Tensor:
    """softmax(query key^T), negative where it is dropped: the results for values that are unit vectors, 512 of them in
    a call, as many as it takes."""
    units = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    weights = torch.cat([flash_attention(query, key, some, **options) for some in units.split(512, -1)], -1)
    return torch.where(dropout.dropout_mask(weights.shape, dropout_p, seed), weights, -weights)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_func of q (B, L, H, D) and kv (B, S, 2, Hkv, D), which is keys and values in one tensor; its gradient
    is one, too."""
    k, v = kv.unbind(2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_func of qkv (B, L, 3, H, D), which is queries, keys and values in one tensor; its gradient is one,
    too."""
    q, k, v = qkv.unbind(2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attention:
    """flash_attn_func of packed sequences: q (total_q, H, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv); the result is
    (total_q, H, Dv). cu_seqlens_q and cu_seqlens_k, (B + 1,) in int32, say where sequences begin and end, max_seqlen_q
    and max_seqlen_k how long the longest are. The causal mask, windows and ALiBi are aligned to the last query and key
    of each sequence.

    block_table        (B, n) in int32: k and v are pages (pages, page, Hkv, D), and cu_seqlens_k gives the lengths. It
                       has no backward pass
    return_attn_probs  softmax_lse is (H, total_q), and S_dmask, with dropout, (B, H, max_seqlen_q, max_seqlen_k), 0
                       outside of a sequence"""
    options: dict[str, Any] = {
        "is_causal": "bottom_right" if causal else False,
        "scale": softmax_scale,
        "enable_gqa": True,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "block_table": block_table,
    }
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    attend: Any = partial(flash_attention_varlen, q, k, v, *lengths, dropout_p=dropout_p, **options)
    if not return_attn_probs:
        return attend()
    if dropout_p and block_table is not None:
        raise NotImplementedError(
            "return_attn_probs is True, with a block_table and dropout; S_dmask is made of packed keys alone"
        )
    seed = dropout.draw(q, 1) if dropout_p else None
    out, lse = attend(return_lse=True, dropout_seed=seed)
    if seed is None:
        return out, lse, q.new_empty(0)
    return out, lse, _signed_weights_of_packed(q, k, lengths, dropout_p, seed, options)


@torch.no_grad()
def _signed_weights_of_packed(
    q: Tensor, k: Tensor, lengths: tuple[Tensor, Tensor, int, int], dropout_p: float, seed: Tensor, options: Any
) -> Tensor:
    """As _signed_weights: each key has the unit vector of its place in its sequence as its value."""
    starts_q, starts_k, q_len, kv_len = lengths
    (of_query, row), (_, place) = (_places(one, len(t)) for one, t in ((starts_q, q), (starts_k, k)))
    units = (place[:, None] == torch.arange(kv_len, device=k.device)).to(k.dtype)[:, None].expand(-1, k.shape[1], -1)
    some = [flash_attention_varlen(q, k, part, *lengths, **options) for part in units.split(512, -1)]
    batch, heads = len(starts_q) - 1, q.shape[1]
    weights = q.new_zeros(batch, q_len, heads, kv_len)
    inside = (row >= 0) & (of_query < batch)
    weights[of_query[inside], row[inside]] = torch.cat(some, -1)[inside]
    weights = weights.transpose(1, 2)
    return torch.where(dropout.dropout_mask(weights.shape, dropout_p, seed), weights, -weights)


def _places(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(the sequence of each packed row, its place there); a negative place, or a sequence that there is not, for rows
    of none."""
    rows = torch.arange(total, device=starts.device)
    number = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
    return number, rows - starts[number.clamp(max=len(starts) - 1)]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_varlen_func of q (total_q, H, D) and kv (total_k, 2, Hkv, D), which is keys and values in one tensor;
    its gradient is one, too."""
    k, v = kv.unbind(1)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    arguments: Any = *lengths, *options
    return flash_attn_varlen_func(q, k, v, *arguments)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_varlen_func of qkv (total, 3, H, D), which is queries, keys and values in one tensor; its gradient is
    one, too."""
    q, k, v = qkv.unbind(1)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    arguments: Any = *lengths, *options
    return flash_attn_varlen_func(q, k, v, *arguments)
