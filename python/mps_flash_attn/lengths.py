"""Sequences of their own lengths: the tensors of integers that say which rows of query, key and value are whose.

Python checks their shapes, dtypes and devices. The numbers in them are libmfa's to check: on a GPU they are not read.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tensors
from .arguments import block_map_shape
from .options import Options

Scores = tuple[int, int, int, int]  # the shape of the scores: (batch, heads, q_len, kv_len)

_ROWS = "(batch,)"
_SHAPES = {"cu_seqlens_q": "(batch + 1,)", "cu_seqlens_k": "(batch + 1,)", "block_table": "(batch, pages)"}
_LARGEST = 2**62


def blocks_of(scores: Scores, size: tuple[int, int]) -> tuple[int, ...]:
    """(batch, heads, blocks of queries, blocks of keys)."""
    batch, heads, q_len, kv_len = scores
    return block_map_shape((batch, heads, q_len, 0), (0, 0, kv_len, 0), size)


class Lengths(NamedTuple):
    """Those of problem.Inputs, which describes them; None where there is none."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def is_cache(self) -> bool:
        """Whether key and value have a batch of their own, of entries or of pages."""
        return self.cache_batch_idx is not None or self.block_table is not None

    def entries(self, query: Tensor, key: Tensor) -> tuple[int, int, int]:
        """(batch, the first dimension of query, that of key and value), as they must be."""
        packed_q, packed_kv = self.cu_seqlens_q, self.cu_seqlens_k
        batch = query.shape[0] if packed_q is None else packed_q.shape[0] - 1
        of_key = key.shape[0] if self.is_cache else batch if packed_kv is None else 1
        return batch, batch if packed_q is None else 1, of_key

    def scores(self, query: Tensor, key: Tensor, max_q: int | None, max_kv: int | None) -> Scores:
        """The shape of the scores, with the lengths that a sequence has at most."""
        batch = query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1
        q_len = query.shape[2] if max_q is None else max_q
        kv_len = key.shape[2] if max_kv is None else max_kv
        return batch, query.shape[1], q_len, kv_len

    def of_sequences(self, scores: Scores) -> list[tuple[int, int]]:
        """(queries, keys) of each sequence; the most that it may have where a number cannot be read."""
        batch, _, q_len, kv_len = scores
        if not all(tensor is None or tensors.is_plain(tensor) for tensor in self):
            return [(q_len, kv_len)] * batch
        packed_q, packed_kv, used, padding, *_ = self
        queries = torch.full((batch,), q_len) if packed_q is None else packed_q.cpu().diff()
        keys = torch.full((batch,), kv_len) if packed_kv is None else packed_kv.cpu().diff()
        keys = (keys if used is None else used.cpu()) - (0 if padding is None else padding.cpu())
        return list(zip(queries.tolist(), keys.tolist()))


_NAMES = Lengths._fields  # PyTorch 2.6 compiles neither this nor _asdict()


def check_each(lengths: Lengths, query: Tensor) -> None:
    """Raises for a tensor of lengths that is wrong by itself."""
    for name, tensor in zip(_NAMES, lengths):
        if tensor is None:
            continue
        if tensor.dtype is not torch.int32:
            raise TypeError(f"{name} is {tensors.dtype_name(tensor)}; it must be int32: {name}.to(torch.int32) is")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; they must be on one device")
        if tensor.dim() != (2 if name == "block_table" else 1) or (name.startswith("cu") and not tensor.shape[0]):
            shape = _SHAPES.get(name, _ROWS)
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; it must be {shape}")


def check(lengths: Lengths, query: Tensor, key: Tensor, options: Options) -> None:
    """Raises for tensors of lengths that are wrong, or do not belong together."""
    check_each(lengths, query)
    packed_q, packed_kv, *others = lengths
    batch, _, _ = lengths.entries(query, key)
    for name, packed in (("query", packed_q), ("key", packed_kv)):
        shape = tuple(query.shape if name == "query" else key.shape)
        if packed is not None and shape[0] != 1:
            raise ValueError(f"{name} has the shape {shape}; packed sequences are (1, heads, total, head_dim)")
    if packed_kv is not None and packed_kv.shape[0] - 1 != batch:
        given = f"query has {batch}" if packed_q is None else f"cu_seqlens_q has {batch + 1} numbers"
        raise ValueError(
            f"{given} and cu_seqlens_k has {packed_kv.shape[0]} numbers; there must be a sequence of keys for each "
            f"of queries: {batch + 1} numbers"
        )
    for name, tensor in zip(Lengths._fields[2:], others):
        if tensor is not None and tensor.shape[0] != batch:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}; its first size must be the number of sequences, {batch}"
            )
    _check_most(lengths, key, options)


def _check_most(lengths: Lengths, key: Tensor, options: Options) -> None:
    """Raises if the largest lengths are missing, are given for nothing, or exceed a block table."""
    has_own = lengths.cu_seqlens_k is not None or lengths.block_table is not None
    for name, most, is_needed, of in (
        ("max_q", options.max_q, lengths.cu_seqlens_q is not None, "cu_seqlens_q"),
        ("max_kv", options.max_kv, has_own, "cu_seqlens_k or block_table"),
    ):
        if (most is not None) != is_needed:
            given = "given" if is_needed else "not given"
            raise ValueError(f"{name} is {most} and {of} {given}; they belong together")
    table = lengths.block_table
    if table is None:
        return
    page = key.shape[2]
    if page == 0:
        raise ValueError(f"key has the shape {tuple(key.shape)}; with a block_table a page must have a key or more")
    if options.max_kv is not None and table.shape[1] * page < options.max_kv:
        raise ValueError(
            f"block_table has {table.shape[1]} pages of {page} keys for a sequence; it must have as many as hold "
            f"{options.max_kv} keys"
        )


def numbers(lengths: Lengths, query: Tensor, key: Tensor, options: Options) -> tuple[int, ...]:
    """The members of mfa_problem from varlen_q to block_table_layout."""
    packed_q, packed_kv, used, padding, index, table = lengths
    return (
        *(int(tensor is not None) for tensor in (packed_q, packed_kv, used, padding, index)),
        int(options.bottom_right),
        0 if packed_q is None else query.shape[2],
        0 if packed_kv is None else key.shape[2],
        key.shape[0] if lengths.is_cache else 0,
        0 if table is None else key.shape[2],
        *(stride for tensor in lengths[:5] for stride in (0 if tensor is None else tensor.stride(0), 0, 0, 0)),
        *((0, 0, 0, 0) if table is None else (table.stride(0), 0, 0, table.stride(1))),
    )


def most(name: str, length: Any) -> int:
    """An argument that is the largest length of a sequence."""
    try:
        # A compiler has symbols for whole numbers, whose value operator.index() needs.
        is_whole = type(length) is int or isinstance(length, torch.SymInt)
        found: int = length if is_whole else operator.index(length)
    except (RuntimeError, TypeError, ValueError):
        found = -1
    if not 0 <= found <= _LARGEST:
        raise ValueError(f"{name} is {length!r}; it must be a whole number, 0 or more")
    return found
