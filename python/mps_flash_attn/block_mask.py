"""The block_mask of flash_attention: a bool for each block of queries and keys, or a BlockMask of flex_attention."""

from __future__ import annotations

import sys
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import score_mod as score_mods
from . import tensors
from .arguments import DEFAULT_BLOCK, BlockSize, block_size_pair, check_block_map
from .lengths import Scores, blocks_of

# Of a BlockMask's number of partial blocks, a tensor: (its version, whether there is any).
_has_partial: Any = WeakTensorKeyDictionary()
# Of its number of full blocks: (a reference to their indices, the versions of both with a band and lengths, whether the
# band contains all of them).
_has_within: Any = WeakTensorKeyDictionary()

Band = tuple[int | None, int | None]  # the bounds of j - i, None where there is none
NO_BAND: Band = (None, None)


class BlockMask(Protocol):
    """torch.nn.attention.flex_attention.BlockMask, whose module takes seconds to import."""

    seq_lengths: tuple[int, int]
    BLOCK_SIZE: tuple[int, int]
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    mask_mod: Any


def is_block_mask(block_mask: Any) -> bool:
    """Whether this is a BlockMask. Importing its module takes seconds; without it no BlockMask exists."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(block_mask, module.BlockMask)


def resolve(
    block_mask: Any, block_size: BlockSize | None, scores: Scores, attn_mask: Tensor | None, takes_band: bool
) -> tuple[Tensor | None, tuple[int, int], Tensor | None, Band]:
    """(which blocks are visible as (batch, heads, blocks of queries, blocks of keys), queries and keys of a block, the
    attn_mask with what mask_mod hides, a band outside of which it hides everything). Without a block_mask: (None,
    (0, 0), attn_mask, no band). `takes_band`: else mask_mod hides nothing by a band."""
    if block_mask is None:
        if block_size is not None:
            raise ValueError(f"block_size is {block_size!r} and block_mask None; block_size belongs to a block_mask")
        return None, (0, 0), attn_mask, NO_BAND
    lengths, band = scores[2:], NO_BAND
    if is_block_mask(block_mask):
        size = block_size_pair(block_mask.BLOCK_SIZE)
        if block_size is not None and block_size_pair(block_size) != size:
            raise ValueError(f"block_size is {block_size!r}; leave it out: that of the BlockMask is {size}")
        found = tuple(block_mask.seq_lengths)
        if found != lengths:
            raise ValueError(
                f"block_mask is a BlockMask for {found[0]} queries and {found[1]} keys; it must be for the lengths of "
                f"query and key, {lengths[0]} and {lengths[1]}"
            )
        visible, attn_mask, band = _of_block_mask(block_mask, size, scores, attn_mask, takes_band)
    else:
        size = DEFAULT_BLOCK if block_size is None else block_size_pair(block_size)
        if not isinstance(block_mask, torch.Tensor):
            kind = type(block_mask).__name__
            raise TypeError(f"block_mask is a {kind}; it must be a BlockMask of flex_attention or a bool tensor")
        visible = block_mask
    return _expanded(visible, blocks_of(scores, size), size), size, attn_mask, band


def elements(visible: Tensor, size: tuple[int, int], lengths: tuple[int, int]) -> Tensor:
    """The bool of each query and key, of blocks in the last two dimensions."""
    spread = visible.repeat_interleave(size[0], -2).repeat_interleave(size[1], -1)
    return spread[..., : lengths[0], : lengths[1]]


def _expanded(visible: Tensor, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """The blocks with a batch and heads, of stride 0 where these are broadcast."""
    check_block_map(visible.shape, shape, size)
    if visible.stride(-2) == visible.stride(-1) == 0:  # libmfa takes that for a layout that was forgotten
        visible = visible.contiguous()
    return visible.expand(shape)


def band_of(block_mask: Any, lengths: tuple[int, int]) -> tuple[int | None, int | None, bool]:
    """(lower, upper, is_exact): a BlockMask shows nothing outside of this band of j - i, and, if it is exact, all that
    is inside of it in a block that is not hidden."""
    if torch.compiler.is_compiling() or not tensors.is_plain(block_mask.kv_num_blocks):
        return *NO_BAND, False
    lower, upper, is_exact = score_mods.band_of(block_mask.mask_mod)
    is_empty = block_mask.full_kv_num_blocks is None
    if (lower, upper) != NO_BAND and not is_empty and not _is_within(block_mask, (lower, upper), lengths):
        return *NO_BAND, False
    return lower, upper, is_exact


def _is_within(block_mask: Any, band: Band, lengths: tuple[int, int]) -> bool:
    """Whether full blocks, for which mask_mod is not asked, are all inside of a band. It is found once for each tensor,
    since a GPU has to be waited for."""
    numbers, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    is_known = not numbers.is_inference() and not indices.is_inference()
    key = is_known and (numbers._version, indices._version, band, lengths)
    known = _has_within.get(numbers) if is_known else None
    if known is not None and known[0]() is indices and known[1] == key:
        return known[2]
    q_size, kv_size = block_mask.BLOCK_SIZE
    count = -(-lengths[1] // kv_size)
    full = _dense(numbers, indices, count)
    i = torch.arange(full.shape[-2], device=full.device)[:, None] * q_size
    j = torch.arange(count, device=full.device) * kv_size
    outside = torch.zeros_like(full)
    if band[0] is not None:
        outside |= j - (i + q_size).clamp(max=lengths[0]) + 1 < band[0]
    if band[1] is not None:
        outside |= (j + kv_size).clamp(max=lengths[1]) - 1 - i > band[1]
    found = not bool((full & outside).any())
    if is_known:
        _has_within[numbers] = weakref.ref(indices), key, found
    return found


def _of_block_mask(
    block_mask: Any,
    size: tuple[int, int],
    scores: Scores,
    attn_mask: Tensor | None,
    takes_band: bool,
) -> tuple[Tensor, Tensor | None, Band]:
    """(the visible blocks of a BlockMask, the attn_mask with what mask_mod hides in partial blocks, the band by which
    it hides in its place)."""
    lengths, shape = scores[2:], blocks_of(scores, size)
    keys = shape[3]
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices, keys)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, keys)
    visible = partial if full is None else partial | full
    check_block_map(visible.shape, shape, size)
    module = sys.modules["torch.nn.attention.flex_attention"]
    if block_mask.mask_mod is module.noop_mask or not _may_be_partial(block_mask.kv_num_blocks):
        return visible, attn_mask, NO_BAND
    if takes_band:
        lower, upper, is_exact = band_of(block_mask, lengths)
        if is_exact:
            return visible, attn_mask, (lower, upper)
    # mask_mod is asked for each batch entry and head, also where these share their blocks.
    batch, heads = (max(size_of, 1) for size_of in scores[:2])
    mask = module.create_mask(block_mask.mask_mod, batch, heads, *lengths, device=visible.device)
    for dimension in (0, 1):
        if mask.stride(dimension) == 0:  # vmap expands what does not depend on an index
            mask = mask.narrow(dimension, 0, 1)
    if full is not None:
        mask = mask | elements(full, size, lengths)
    if attn_mask is None:
        return visible, mask, NO_BAND
    if attn_mask.dtype is torch.bool:
        return visible, attn_mask & mask, NO_BAND
    return visible, attn_mask.masked_fill(~mask, -torch.inf), NO_BAND


def _dense(numbers: Tensor, indices: Tensor, keys: int) -> Tensor:
    """A bool for each block, from how many there are in each row and the indices of these, which come first."""
    is_used = torch.arange(indices.shape[-1], device=indices.device) < numbers[..., None]
    found = torch.zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool, device=indices.device)
    return found.scatter(-1, torch.where(is_used, indices, keys).long(), True)[..., :keys]


def _may_be_partial(numbers: Tensor) -> bool:
    """Whether a BlockMask has partial blocks. A tracer does not know. It is asked once for each tensor, since a GPU has
    to be waited for."""
    if torch.compiler.is_compiling() or not tensors.is_plain(numbers):
        return True
    if numbers.is_inference():
        return bool(numbers.any())
    known = _has_partial.get(numbers)
    if known is None or known[0] != numbers._version:
        known = _has_partial[numbers] = numbers._version, bool(numbers.any())
    return known[1]
