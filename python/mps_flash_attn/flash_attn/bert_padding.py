"""flash_attn.bert_padding: from padded batches to packed sequences and back, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002 # its name there
    """The rows of `input` that `indices` names."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(rows, indices, cu_seqlens, max_seqlen, seqused) of a padded batch (B, L, ...).

    attention_mask   (B, L), bool or of 0 and 1: 1 is a token, 0 is padding
    unused_mask      the same, 1 for rows that have a place among the packed rows, but do not count
    rows             (total, ...): those that either mask names, differentiable
    indices          where each of them was, of B * L rows
    cu_seqlens       (B + 1,) in int32: where sequences begin and end
    max_seqlen       the rows of the longest, for which the GPU is waited for
    seqused          (B,) in int32: how many rows of each sequence the attention_mask names
    """
    has_place = attention_mask != 0 if unused_mask is None else (attention_mask != 0) | (unused_mask != 0)
    lengths = has_place.sum(-1, dtype=torch.int32)
    indices = has_place.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, max_seqlen, attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch (batch, seqlen, ...) of packed rows (total, ...), 0 where `indices`, that of unpad_input(), has
    no row."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
