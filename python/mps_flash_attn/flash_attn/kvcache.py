"""flash_attn_with_kvcache: new keys and values are appended to a cache, in place, and attention reads that."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import caches, codes, tensors
from ..codes import Fast, KvType
from ..lengths import Lengths
from ..varlen import attend, flash_attention_kvcache
from .rotary import check_table, rotate

_NAMES = caches.Names("cache_seqlens", "cache_leftpad")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, L, H, D) with caches k_cache (Bc, S, Hkv, D) and v_cache (Bc, S, Hkv, Dv), or their pages
    (pages, page, Hkv, D); the result is (B, L, H, Dv). It has no backward pass: NotImplementedError if a gradient is
    required.

    k, v             (B, N, Hkv, D) and (B, N, Hkv, Dv): written to the caches first, at cache_seqlens, in place
    rotary_cos       (positions, R), with rotary_sin and k: rotates k by its places in the cache, and q by those from
    rotary_sin       cache_seqlens on if `causal` or with a window, else all of it by cache_seqlens
    rotary_interleaved  rotates columns 2 n and 2 n + 1, else n and n + R
    cache_seqlens    how many keys of each sequence the cache holds, without k: a number or (B,) in int32
    cache_batch_idx  (B,) in int32: the entry of the cache of each sequence
    cache_leftpad    (B,) in int32: the first rows of each sequence are padding, which cache_seqlens counts, too
    block_table      (B, n) in int32: the pages of each sequence, of any size
    num_splits       has no effect
    return_softmax_lse  returns (out, softmax_lse), which is (B, H, L)

    k_scale, v_scale    the caches are codes with these scales, (Bc, S, Hkv, groups) or (pages, page, Hkv, groups), as
    k_type, v_type      in flash_attention_kvcache(); k and v, in q's dtype, become codes as in append_kv()
    fast                "int8": products may be of int8, as there

    The other arguments are those of flash_attn_func. Wrong arguments are a ValueError or TypeError before anything is
    written, on the CPU also positions and pages that do not exist; on mps, and in compiled code, numbers in tensors are
    not read for that."""
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
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        return_softmax_lse,
        k_scale=k_scale,
        v_scale=v_scale,
        k_type=k_type,
        v_type=v_type,
        fast=fast,
    )


def attend_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    return_softmax_lse: bool,
    *,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache of flash-attn 2 and 3."""
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    of_rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    caches.refuse_gradients("flash_attn_with_kvcache", **given, **of_rotary, sinks=sinks)
    batch = q.shape[0]
    lengths = cache_seqlens
    if isinstance(lengths, Integral):
        lengths = torch.full((batch,), int(lengths), dtype=torch.int32, device=q.device)
    if lengths is not None and not isinstance(lengths, Tensor):
        raise TypeError(f"cache_seqlens is {lengths!r}; it must be a number, or a tensor of int32")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4: (batch, length, heads, head_dim)")
    kinds = codes.kind_of("k_type", k_type, "k_cache", k_cache), codes.kind_of("v_type", v_type, "v_cache", v_cache)
    k_scale = codes.expanded("k_scale", k_scale, "k_cache", k_cache)
    v_scale = codes.expanded("v_scale", v_scale, "v_cache", v_cache)
    _check(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, lengths, kinds)
    caches.check_places(_NAMES, q, lengths, cache_batch_idx, cache_leftpad, block_table)
    _check_caches(q, k_cache, v_cache, cache_batch_idx is None and block_table is None)
    entries = batch if cache_batch_idx is None and block_table is None else len(k_cache)
    key, value = (one[:entries].transpose(1, 2) for one in (k_cache, v_cache))
    k_scale, v_scale = (None if one is None else one[:entries].transpose(1, 2) for one in (k_scale, v_scale))
    new = 0 if k is None else k.shape[1]
    caches.check_numbers(_NAMES, key, new, lengths, cache_batch_idx, cache_leftpad, block_table)
    write = None
    if k is not None and v is not None and lengths is not None:
        places = caches.Places.of(key, new, lengths, cache_batch_idx, block_table)
        if rotary_cos is not None and rotary_sin is not None:
            capacity = key.shape[2] * (1 if block_table is None else block_table.shape[1])
            if rotary_cos.shape[0] < capacity:
                raise ValueError(
                    f"rotary_cos has {rotary_cos.shape[0]} positions; it must have as many as the cache has keys, "
                    f"{capacity}"
                )
            follows = causal or tuple(window_size) != (-1, -1)
            ahead = torch.arange(q.shape[1], device=q.device) if follows else q.new_zeros(q.shape[1], dtype=torch.int64)
            q = rotate(q, rotary_cos, rotary_sin, lengths[:, None] + ahead, rotary_interleaved)
            rows = lengths[:, None] + torch.arange(new, device=q.device)
            k = rotate(k, rotary_cos, rotary_sin, rows, rotary_interleaved)
        writers = [
            caches.Cache.of(f"{name}_cache", cache, kind, scale).writer(name, one.transpose(1, 2), places)
            for name, cache, kind, scale, one in (("k", key, kinds[0], k_scale, k), ("v", value, kinds[1], v_scale, v))
        ]

        def write() -> None:
            for one in writers:
                one()

        lengths = lengths + new
    options = {
        "is_causal": "bottom_right" if causal else False,
        "scale": softmax_scale,
        "attn_mask": None,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "enable_gqa": True,
        "return_lse": return_softmax_lse,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "dropout_p": 0,
        "dropout_seed": None,
        "block_mask": None,
        "block_size": None,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "k_type": kinds[0],
        "v_type": kinds[1],
        "fast": fast,
    }
    of_rows = Lengths(None, None, lengths, cache_leftpad, cache_batch_idx, block_table)
    positional = q.transpose(1, 2), key, value
    found = attend(flash_attention_kvcache, positional, options, of_rows, write=write)
    if isinstance(found, tuple):
        return found[0].transpose(1, 2), found[1]
    return found.transpose(1, 2)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor | None,
    kinds: codes.Kinds,
) -> None:
    """Raises for arguments that do not belong together."""
    if (k is None) != (v is None) or (cos is None) != (sin is None):
        raise ValueError("k and v, and rotary_cos and rotary_sin, must be given together")
    if cos is not None and k is None:
        raise ValueError("rotary_cos is given and k None; only new keys are rotated, those of the cache have been")
    if cos is not None and sin is not None:
        check_table(cos, sin, q.shape[3])
    if k is None or v is None:
        return
    if lengths is None:
        raise ValueError("k is given and cache_seqlens None; it must say where k is to be written")
    for name, tensor, cache, kind in (("k", k, k_cache, kinds[0]), ("v", v, v_cache, kinds[1])):
        shape = (q.shape[0], k.shape[1], cache.shape[2], codes.columns(cache, kind))
        if tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor.dtype != q.dtype or (kind is None and cache.dtype != q.dtype):
            raise TypeError(
                f"q is {tensors.dtype_name(q)}, {name} {tensors.dtype_name(tensor)} and {name}_cache "
                f"{tensors.dtype_name(cache)}; they must have one dtype"
            )


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, by_number: bool) -> None:
    """The same of the caches; `by_number`: sequence b has entry b."""
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache has the shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; they must agree in all "
            "sizes but the last"
        )
    if by_number and k_cache.shape[0] < q.shape[0]:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} entries and q {q.shape[0]}; without cache_batch_idx or block_table there "
            "must be one for each"
        )
    if q.shape[2] % max(k_cache.shape[2], 1):
        raise ValueError(f"q has {q.shape[2]} heads; it must be a multiple of the {k_cache.shape[2]} heads of k_cache")
