"""flash_attn_with_kvcache: new keys and values are appended to a cache, in place, and attention reads that."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tensors
from ..varlen import flash_attention_kvcache
from .rotary import check_table, rotate


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

    The other arguments are those of flash_attn_func. Positions and pages that do not exist are a ValueError on the CPU,
    before anything is written; on mps numbers are not read by the CPU."""
    _check_gradients(q, k_cache, v_cache, k, v)
    batch = q.shape[0]
    lengths = cache_seqlens
    if isinstance(lengths, int):
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=q.device)
    _check(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, lengths)
    _check_places(q, k_cache, v_cache, lengths, cache_batch_idx, cache_leftpad, block_table)
    if cache_batch_idx is None and block_table is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    new = 0 if k is None else k.shape[1]
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_numbers(lengths, new, capacity, k_cache.shape[0], page, cache_batch_idx, cache_leftpad, block_table)
    if k is not None and v is not None and lengths is not None:
        places = lengths[:, None] + torch.arange(new, device=q.device)
        if rotary_cos is not None and rotary_sin is not None:
            if rotary_cos.shape[0] < capacity:
                raise ValueError(
                    f"rotary_cos has {rotary_cos.shape[0]} positions; it must have as many as the cache has keys, "
                    f"{capacity}"
                )
            follows = causal or tuple(window_size) != (-1, -1)
            ahead = torch.arange(q.shape[1], device=q.device) if follows else q.new_zeros(q.shape[1], dtype=torch.int64)
            q = rotate(q, rotary_cos, rotary_sin, lengths[:, None] + ahead, rotary_interleaved)
            k = rotate(k, rotary_cos, rotary_sin, places, rotary_interleaved)
        _write(k_cache, v_cache, k, v, places, cache_batch_idx, block_table)
        lengths = lengths + new
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k_cache, v_cache))
    found = flash_attention_kvcache(
        query,
        key,
        value,
        "bottom_right" if causal else False,
        softmax_scale,
        window_size=(window_size[0], window_size[1]),
        softcap=softcap,
        enable_gqa=True,
        return_lse=return_softmax_lse,
        alibi_slopes=alibi_slopes,
        seqused_k=lengths,
        leftpad_k=cache_leftpad,
        cache_batch_idx=cache_batch_idx,
        block_table=block_table,
    )
    if isinstance(found, tuple):
        return found[0].transpose(1, 2), found[1]
    return found.transpose(1, 2)


def _write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Writes the rows k and v to these places of the sequences."""
    if block_table is not None:
        page = k_cache.shape[1]
        entries, rows = block_table.gather(1, places // page).long(), places % page
    else:
        numbers = torch.arange(len(places), device=places.device) if cache_batch_idx is None else cache_batch_idx.long()
        entries, rows = numbers[:, None], places
    k_cache[entries, rows] = k
    v_cache[entries, rows] = v


def _check_gradients(*operands: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands):
        raise NotImplementedError(
            "flash_attn_with_kvcache has no backward pass, and a tensor requires a gradient; call it under "
            "torch.no_grad() or torch.inference_mode()"
        )


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Raises for what would be found when the cache has been written."""
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4: (batch, length, heads, head_dim)")
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
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        shape = (q.shape[0], k.shape[1], *cache.shape[2:])
        if tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if not tensor.dtype == cache.dtype == q.dtype:
            raise TypeError(
                f"q is {tensors.dtype_name(q)}, {name} {tensors.dtype_name(tensor)} and {name}_cache "
                f"{tensors.dtype_name(cache)}; they must have one dtype"
            )


def _check_places(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """The same of the tensors that say where keys are."""
    batch = q.shape[0]
    for name, tensor, also in (
        ("cache_seqlens", lengths, "a number, or "),
        ("cache_batch_idx", cache_batch_idx, ""),
        ("cache_leftpad", cache_leftpad, ""),
        ("block_table", block_table, ""),
    ):
        if tensor is None:
            continue
        is_table = tensor is block_table
        is_right = tensor.dim() == 1 + is_table and tensor.shape[0] == batch and tensor.dtype is torch.int32
        if not is_right or tensor.device != q.device:
            found = f"{tensors.dtype_name(tensor)} of the shape {tuple(tensor.shape)} on {tensor.device}"
            shape = f"({batch}, {'pages' if is_table else ''})"
            raise ValueError(f"{name} is {found}; it must be {also}int32 of the shape {shape} on {q.device}")
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx and block_table are given; the rows of block_table say where keys are")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache has the shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}; they must agree in all "
            "sizes but the last"
        )
    if cache_batch_idx is None and block_table is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} entries and q {batch}; without cache_batch_idx or block_table there must "
            "be one for each"
        )
    if q.shape[2] % max(k_cache.shape[2], 1):
        raise ValueError(f"q has {q.shape[2]} heads; it must be a multiple of the {k_cache.shape[2]} heads of k_cache")


def _check_numbers(
    lengths: Tensor | None,
    new: int,
    capacity: int,
    entries: int,
    page: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Raises for numbers in tensors, on the CPU, that are outside of the cache."""
    found = None if lengths is None else lengths.tolist()
    for b, length in enumerate(found or ()):
        if length < 0 or length + new > capacity:
            raise ValueError(
                f"cache_seqlens[{b}] is {length}, and {new} keys are appended; the sum must be within the {capacity} "
                "keys of the cache"
            )
    if cache_batch_idx is not None:
        for b, entry in enumerate(cache_batch_idx.tolist()):
            if not 0 <= entry < entries:
                raise ValueError(f"cache_batch_idx[{b}] is {entry}; the cache has the entries 0 to {entries - 1}")
    if cache_leftpad is not None:
        for b, padding in enumerate(cache_leftpad.tolist()):
            most = (capacity if found is None else found[b]) + new
            if not 0 <= padding <= most:
                raise ValueError(f"cache_leftpad[{b}] is {padding}; it must be 0 to {most}, the keys of its sequence")
    if block_table is None or page == 0 or not block_table.numel():
        return
    low, high = (int(n) for n in block_table.aminmax())
    if low < 0 or high >= entries:  # perhaps where no page is needed
        for b, pages in enumerate(block_table.tolist()):
            most = capacity if found is None else found[b] + new
            for n, number in enumerate(pages[: -(-most // page)]):
                if not 0 <= number < entries:
                    raise ValueError(f"block_table[{b}][{n}] is {number}; there are {entries} pages, from 0 on")
