"""The block_mask of flash_attention: a bool for each block of queries and keys, or a BlockMask of flex_attention."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import tensors
from .arguments import DEFAULT_BLOCK, BlockSize, block_size_pair, check_block_map
from .lengths import Scores, blocks_of

# Of a BlockMask's number of partial blocks, a tensor: (its version, whether there is any).
_has_partial: Any = WeakTensorKeyDictionary()


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
    block_mask: Any, block_size: BlockSize | None, scores: Scores, attn_mask: Tensor | None
) -> tuple[Tensor | None, tuple[int, int], Tensor | None]:
    """(which blocks are visible as (batch, heads, blocks of queries, blocks of keys), queries and keys of a block, the
    attn_mask with what mask_mod hides). Without a block_mask: (None, (0, 0), attn_mask)."""
    if block_mask is None:
        if block_size is not None:
            raise ValueError(f"block_size is {block_size!r} and block_mask None; block_size belongs to a block_mask")
        return None, (0, 0), attn_mask
    lengths = scores[2:]
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
        visible, attn_mask = _of_block_mask(block_mask, size, lengths, blocks_of(scores, size)[3], attn_mask)
    else:
        size = DEFAULT_BLOCK if block_size is None else block_size_pair(block_size)
        if not isinstance(block_mask, torch.Tensor):
            kind = type(block_mask).__name__
            raise TypeError(f"block_mask is a {kind}; it must be a BlockMask of flex_attention or a bool tensor")
        visible = block_mask
    return _expanded(visible, blocks_of(scores, size), size), size, attn_mask


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


def _of_block_mask(
    block_mask: Any, size: tuple[int, int], lengths: tuple[int, int], keys: int, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(the visible blocks of a BlockMask, the attn_mask with what mask_mod hides in partial blocks). `keys`: blocks."""
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices, keys)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, keys)
    visible = partial if full is None else partial | full
    module = sys.modules["torch.nn.attention.flex_attention"]
    if block_mask.mask_mod is module.noop_mask or not _may_be_partial(block_mask.kv_num_blocks):
        return visible, attn_mask
    batch, heads = (1, 1, *visible.shape[:-2])[-2:]
    mask = module.create_mask(block_mask.mask_mod, batch, heads, *lengths, device=visible.device)
    if full is not None:
        mask = mask | elements(full, size, lengths)
    if attn_mask is None:
        return visible, mask
    if attn_mask.dtype is torch.bool:
        return visible, attn_mask & mask
    return visible, attn_mask.masked_fill(~mask, -torch.inf)


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
