"""Continuous batching of transformers, generate_batch(), whose keys and values are in pages.

Its manager accepts a few names of attention only, and makes a mask of all queries and keys where the name is not of
a flash-attn. The manager's check of the name, a method, is extended for ours, for which it then makes no mask.

In full attention the keys and values of a step are written into their pages, and attention reads the pages where they
are. transformers says by an index which row holds each key; its rows within a page follow one another, so a page is
read off its first row. Sliding layers keep their keys in a ring; these are gathered by transformers, and are no more
than the window and the new ones of each sequence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..varlen import flash_attention_varlen

_names: set[str] = set()  # the names under which our function is registered
_SWITCH = "switch_to_cb_friendly_attn"


def allow_continuous_batching(name: str) -> None:
    """Makes generate_batch() accept attn_implementation=`name`, where transformers has one that checks the name."""
    manager = _manager()
    original = getattr(manager, _SWITCH, None)
    if original is None:
        return
    _names.add(name)
    if hasattr(original, "of_transformers"):
        return

    @functools.wraps(original)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        return None if model.config._attn_implementation in _names else original(self, model, *arguments, **options)

    switch_to_cb_friendly_attn.of_transformers = original  # type: ignore[attr-defined] # an attribute of our own
    setattr(manager, _SWITCH, switch_to_cb_friendly_attn)


def forbid_continuous_batching(name: str) -> None:
    """Undoes allow_continuous_batching()."""
    _names.discard(name)
    manager = _manager()
    original = getattr(getattr(manager, _SWITCH, None), "of_transformers", None)
    if original is not None and not _names:
        setattr(manager, _SWITCH, original)


def _manager() -> Any:
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:
        return None
    return ContinuousBatchingManager


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    sliding_window: int | None,
    given: dict[str, Any],
    **options: Any,
) -> Tensor:
    """Writes the new keys and values (1, Hkv, T, E) into the cache and returns the attention of query (1, H, T, E) to
    those of its sequences, (1, T, H, Ev). `given`: what transformers passes beside the cache. `options`: those of
    flash_attention_varlen."""
    if not hasattr(cache, "layer_to_allocator"):
        raise ValueError(
            f"cache is a {type(cache).__name__}; it must be the cache of continuous batching, of a transformers that "
            'has allocators of pages; choose attn_implementation="eager"'
        )
    if given.get("block_table") is not None:
        raise ValueError(
            "block_table is given, by transformers' fast path of decoding for flash-attn; max_blocks_per_request of "
            "the ContinuousBatchingConfig must be 0"
        )
    layer: Any = module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    starts_q, longest_q = given["cu_seq_lens_q"], given["max_length_q"]
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, 0)
    rows = query.squeeze(0).transpose(0, 1)
    written, read = given["write_index"][allocator.index], given["read_index"][allocator.index]
    if not read.numel() or not allocator.supports_block_table:
        seen = {name: given[name] for name in ("cu_seq_lens_k", "max_length_k", "read_index", "write_index")}
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=seen)
        key, value = key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1)
        starts_k, longest_k = seen["cu_seq_lens_k"], seen["max_length_k"]
        table = None
    else:
        new = key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1)
        allocator.update(*new, layer, read[:0], written)
        key, value = allocator.get_cache_for_block_table(layer)
        starts_k, longest_k = given["cu_seq_lens_k"][allocator.layer_type], given["max_length_k"][allocator.layer_type]
        table = _block_table(read, starts_k, longest_k, key.shape[1])
    starts_k = starts_k.to(torch.int32)
    out = flash_attention_varlen(
        rows, key, value, starts_q, starts_k, longest_q, longest_k, "bottom_right", block_table=table, **options
    )
    return out.unsqueeze(0)


def _block_table(read: Tensor, starts: Tensor, longest: int, page: int) -> Tensor:
    """The pages of each sequence, whose keys are the rows read[starts[b]], ... of all pages."""
    first = starts[:-1, None] + torch.arange(0, longest, page, device=read.device)
    rows = read[first.clamp_(max=read.numel() - 1)]
    return rows.div_(page, rounding_mode="floor").to(torch.int32)
