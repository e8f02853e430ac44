"""The functions of flash-attn 3, of its module flash_attn_interface: other arguments, in another order, than those of
flash-attn 2.

    from mps_flash_attn.flash_attn.fa3 import flash_attn_func

Tensors, the alignment of causal masks and windows, and gradients are those of mps_flash_attn.flash_attn. There is no
dropout and no ALiBi. Beside flash-attn's own arguments there are attention sinks, by both of their names: `s_aux` of
vLLM's fork, and `learnable_sink` of flash-attn 4. Arguments that schedule a GPU's work have no effect: num_splits,
pack_gqa, deterministic, sm_margin and scheduler_metadata. What libmfa does not compute is refused, with a sentence: qv,
attention_chunk, and descale factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import flash_attention
from ..caches import refuse_gradients
from ..library import Unsupported
from ..varlen import flash_attention_varlen
from .kvcache import attend_with_cache

Attention = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Attention:
    """softmax(softmax_scale * q k^T) v: q (B, L, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv) in one dtype, H a multiple
    of Hkv; the result is (B, L, H, Dv).

    softmax_scale      None is 1/sqrt(D)
    causal             query i sees keys j <= i + S - L
    window_size        (left, right): keys i + S - L - left to i + S - L + right, -1 being no limit
    softcap            scores are softcap * tanh(score / softcap), if it is above 0
    return_attn_probs  returns (out, softmax_lse), which is (B, H, L) in float32, and differentiable
    s_aux              (H,): attention sinks, the logit of each query head; with a gradient
    learnable_sink     the same

    ValueError and TypeError as by flash_attention(); Unsupported for qv, attention_chunk and the descale factors."""
    _refuse(qv, attention_chunk, q_descale, k_descale, v_descale)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    options = _options(softmax_scale, causal, window_size, softcap, s_aux, learnable_sink)
    if not return_attn_probs:
        return flash_attention(query, key, value, **options).transpose(1, 2)
    out, lse = flash_attention(query, key, value, return_lse=True, **options)
    return out.transpose(1, 2), lse


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Attention:
    """flash_attn_func of qkv (B, L, 3, H, D), which is queries, keys and values in one tensor; or (B, L, H + 2 Hkv, D)
    with num_heads_q, the number H of query heads, which come first. Its gradient is one tensor, too."""
    if num_heads_q is None:
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"qkv has the shape {tuple(qkv.shape)}; without num_heads_q it must be (batch, length, 3, heads, "
                "head_dim)"
            )
        q, k, v = qkv.unbind(2)
    else:
        rest = qkv.shape[2] - num_heads_q if qkv.dim() == 4 else 0
        if rest <= 0 or rest % 2:
            raise ValueError(
                f"qkv has the shape {tuple(qkv.shape)} and num_heads_q is {num_heads_q}; it must be (batch, length, "
                "num_heads_q + 2 * kv_heads, head_dim)"
            )
        q, k, v = qkv.split([num_heads_q, rest // 2, rest // 2], 2)
    _refuse(None, attention_chunk, q_descale, k_descale, v_descale)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size=window_size,
        softcap=softcap,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Attention:
    """flash_attn_func of packed sequences: q (total_q, H, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv); the result is
    (total_q, H, Dv). cu_seqlens_q and cu_seqlens_k, (B + 1,) in int32, say where sequences begin and end, max_seqlen_q
    and max_seqlen_k how long the longest are. The causal mask and windows are aligned to the last query and key of each
    sequence.

    seqused_q          (B,) in int32: only the first seqused_q[b] queries of a sequence count. The results of the others
                       are 0, and so are their gradients.
    seqused_k          (B,) in int32: only the first seqused_k[b] keys count
    return_attn_probs  softmax_lse is (H, total_q)"""
    _refuse(qv, attention_chunk, q_descale, k_descale, v_descale)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_k
    if seqused_q is not None:
        lengths = _with_unused_queries(*lengths, seqused_q)
    options = _options(softmax_scale, causal, window_size, softcap, s_aux, learnable_sink)
    return flash_attention_varlen(
        q,
        k,
        v,
        *lengths[:2],
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=lengths[2],
        return_lse=return_attn_probs,
        **options,
    )


def _with_unused_queries(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, seqused_q: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(cu_seqlens_q, cu_seqlens_k, seqused_k) with two sequences for each: one of the queries that count, and one of
    the others, which has no keys."""
    batch = len(cu_seqlens_q) - 1
    if seqused_q.shape != (batch,) or seqused_q.dtype != torch.int32 or seqused_q.device != cu_seqlens_q.device:
        raise ValueError(
            f"seqused_q is {str(seqused_q.dtype).removeprefix('torch.')} of the shape {tuple(seqused_q.shape)} on "
            f"{seqused_q.device}; it must be int32 of the shape ({batch},) on {cu_seqlens_q.device}"
        )
    if seqused_q.device.type == "cpu" and not torch.compiler.is_compiling():
        for b, (used, length) in enumerate(zip(seqused_q.tolist(), cu_seqlens_q.diff().tolist())):
            if not 0 <= used <= length:
                raise ValueError(f"seqused_q[{b}] is {used}; it must be 0 to {length}, the queries of its sequence")
    ends = torch.stack([cu_seqlens_q[:-1] + seqused_q, cu_seqlens_q[1:]], 1).flatten()
    starts_q = torch.cat([cu_seqlens_q[:1], ends])
    starts_k = torch.cat([cu_seqlens_k[:1], cu_seqlens_k[1:].repeat_interleave(2)])
    if seqused_k is not None:
        seqused_k = torch.stack([seqused_k, torch.zeros_like(seqused_k)], 1).flatten()
    return starts_q, starts_k, seqused_k


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Attention:
    """mps_flash_attn.flash_attn.flash_attn_with_kvcache, whose block_table is called page_table, with sinks, and for
    packed queries, too.

    cu_seqlens_q      (B + 1,) in int32: q is (total_q, H, D), and its sequences begin and end there. The result is
                      (total_q, H, Dv) and softmax_lse (H, total_q); max_seqlen_q is then required, and nothing may be
                      appended (k, v).
    cu_seqlens_k_new  is refused, as is rotary_seqlens: new keys are dense, and rotated from cache_seqlens on"""
    _refuse(qv, attention_chunk, q_descale, k_descale, v_descale)
    for name, tensor in (("cu_seqlens_k_new", cu_seqlens_k_new), ("rotary_seqlens", rotary_seqlens)):
        if tensor is not None:
            raise Unsupported(f"{name} is given; new keys must be dense, and are rotated from cache_seqlens on")
    sinks = _sinks(s_aux, learnable_sink)
    if cu_seqlens_q is None:
        return attend_with_cache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            page_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
            rotary_interleaved,
            None,
            return_softmax_lse,
            sinks=sinks,
        )
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        raise Unsupported("cu_seqlens_q is given with k, v or rotary tables; only dense batches can be appended")
    if max_seqlen_q is None:
        raise ValueError("cu_seqlens_q is given and max_seqlen_q None; it must be the length of the longest sequence")
    refuse_gradients("flash_attn_with_kvcache", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    batch, page = len(cu_seqlens_q) - 1, k_cache.shape[1]
    table = page_table
    if table is None:  # each entry of the cache is a page
        entries = (
            torch.arange(batch, dtype=torch.int32, device=q.device) if cache_batch_idx is None else cache_batch_idx
        )
        table = entries[:, None]
    elif cache_batch_idx is not None:
        raise ValueError("cache_batch_idx and page_table are given; the rows of page_table say where keys are")
    capacity = page * table.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        used = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), used, dtype=torch.int32, device=q.device)
    options = _options(softmax_scale, causal, window_size, softcap, sinks, None)
    return flash_attention_varlen(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        None,
        max_seqlen_q,
        capacity,
        seqused_k=cache_seqlens,
        leftpad_k=cache_leftpad,
        block_table=table,
        return_lse=return_softmax_lse,
        **options,
    )


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    s_aux: Tensor | None,
    learnable_sink: Tensor | None,
) -> dict[str, Any]:
    """The arguments of flash_attention."""
    return {
        "is_causal": "bottom_right" if causal else False,
        "scale": softmax_scale,
        "enable_gqa": True,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "sinks": _sinks(s_aux, learnable_sink),
    }


def _sinks(s_aux: Tensor | None, learnable_sink: Tensor | None) -> Tensor | None:
    if s_aux is not None and learnable_sink is not None:
        raise ValueError("s_aux and learnable_sink are given; they are two names of the attention sinks")
    return learnable_sink if s_aux is None else s_aux


def _refuse(
    qv: Tensor | None,
    attention_chunk: int,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> None:
    """Raises for what libmfa does not compute."""
    if qv is not None:
        raise Unsupported("qv is given; libmfa adds no second product to the scores: concatenate qv to q and v to k")
    if attention_chunk:
        raise Unsupported(f"attention_chunk is {attention_chunk!r}; it must be 0, and window_size is supported")
    for name, tensor in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if tensor is not None:
            raise Unsupported(f"{name} is given; tensors must be in a dtype of flash_attention, which needs no factors")
