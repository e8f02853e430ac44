"""Ulysses: rows are exchanged for heads, so that each rank computes all rows of some heads, and results for rows again.

Key heads are divided over the ranks, and the query heads of each go with it. Where there are fewer key heads than
ranks, the query heads are divided, and a key head goes to every rank that has some of its queries. Neither number has
to be a multiple of the ranks: the first ranks have one more, or the last have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import tensors
from ..problem import Inputs, Operands
from . import layout as layouts
from . import local_step
from .call import Call
from .layout import Layout, Span


def heads_of(heads: int, kv_heads: int, size: int) -> tuple[list[Span], list[Span]]:
    """The query heads and the key heads of each of `size` ranks."""
    group = heads // max(kv_heads, 1)
    if kv_heads >= size:
        of_keys = layouts.split(kv_heads, size)
        return [(first * group, end * group) for first, end in of_keys], of_keys
    of_queries = layouts.split(heads, size)
    return of_queries, [(first // group, -(-end // group)) if first < end else (0, 0) for first, end in of_queries]


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(out, lse) of this rank's rows, lse in float32 (float64 for float64), and what backward() needs."""
    query, key, value, _, sinks, *_ = inputs
    layout, rank = call.layout, call.layout.peers.rank
    of_queries, of_keys = heads_of(query.shape[1], key.shape[1], layout.peers.size)
    divisions = of_queries, of_keys, of_keys
    query, key, value = _to_heads(layout, (query, key, value), divisions, "heads of query, key and value")
    dtype = tensors.rows_dtype(query)
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    for heads, kv_heads, rows in _parts(of_queries[rank], of_keys[rank], inputs, call):
        part = Inputs(query[:, heads, rows], key[:, kv_heads, rows], value[:, kv_heads, rows])
        out[:, heads, rows], lse[:, heads, rows] = call.kernels.forward(part, call.options)
    if sinks is not None:
        sinks = sinks[:, slice(*of_queries[rank])]
        local_step.merge_sinks(out, lse, sinks)
    rounded = out.to(query.dtype)
    total = inputs.query.shape[1]
    (own_out,) = _to_rows(layout, (rounded,), (of_queries,), (total,), "heads of out")
    (own_lse,) = _to_rows(layout, (lse[..., None],), (of_queries,), (total,), "heads of lse")
    return own_out, own_lse[..., 0], (query, key, value, sinks, out if call.kernels.has_low else rounded, lse)


def backward(
    inputs: Inputs, saved: Sequence[Tensor | None], d_out: Tensor, d_lse: Tensor | None, call: Call
) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, dbias, dsinks), each None if not wanted, in the dtypes of their tensors."""
    query, key, value, sinks, out, lse = saved
    assert query is not None and key is not None and value is not None and out is not None and lse is not None
    layout, rank, wanted = call.layout, call.layout.peers.rank, call.wanted
    of_queries, of_keys = heads_of(inputs.query.shape[1], inputs.key.shape[1], layout.peers.size)
    (d_out,) = _to_heads(layout, (d_out,), (of_queries,), "heads of the gradient of out")
    of_lse = None
    if call.with_lse and call.kernels.has_lse_gradient:  # a rank has none where its own part of the loss has no lse
        own_lse = inputs.query.new_zeros(inputs.query.shape[:3], dtype=lse.dtype) if d_lse is None else d_lse
        (columns,) = _to_heads(layout, (own_lse[..., None],), (of_queries,), "heads of lse")
        of_lse = columns[..., 0]
    divisions = of_queries, of_keys, of_keys
    chosen = [place for place in range(3) if wanted[place]]
    found = {place: torch.zeros_like((query, key, value)[place], dtype=lse.dtype) for place in chosen}
    for heads, kv_heads, rows in _parts(of_queries[rank], of_keys[rank], inputs, call):
        if not chosen:  # sinks alone want a gradient
            break
        part = Inputs(query[:, heads, rows], key[:, kv_heads, rows], value[:, kv_heads, rows])
        of_part = None if of_lse is None else of_lse[:, heads, rows]
        results = out[:, heads, rows], lse[:, heads, rows], d_out[:, heads, rows], of_part
        gradients = call.kernels.backward(Operands(part, *results), call.options, (*wanted[:3], False))
        for place, into in found.items():
            into[:, kv_heads if place else heads, rows] = gradients[place]
    totals = inputs.query.shape[1], inputs.key.shape[1], inputs.key.shape[1]
    own = _to_rows(
        layout,
        list(found.values()),
        [divisions[place] for place in chosen],
        [totals[place] for place in chosen],
        "heads of gradients",
    )
    results_of: dict[int, Tensor] = {place: one.to(query.dtype) for place, one in zip(chosen, own)}
    dsinks = None
    if inputs.sinks is not None and sinks is not None and wanted[4]:
        dsinks = torch.zeros_like(inputs.sinks)
        dsinks[:, slice(*of_queries[rank])] = local_step.sinks_gradient(sinks, out, lse, d_out, of_lse)
    return (*map(results_of.get, range(3)), None, dsinks)


def _parts(queries: Span, keys: Span, inputs: Inputs, call: Call) -> Iterator[tuple[slice, slice, slice]]:
    """(query heads, key heads, rows) of each call of a kernel, counted in the heads of this rank: documents, and if the
    query heads of a key head are not all here, one call for each key head."""
    group = inputs.query.shape[1] // max(inputs.key.shape[1], 1)
    heads = [((0, queries[1] - queries[0]), (0, keys[1] - keys[0]))] if queries[0] < queries[1] else []
    if queries != (keys[0] * group, keys[1] * group) and heads:
        bounds = [(max(one * group, queries[0]), min((one + 1) * group, queries[1])) for one in range(*keys)]
        heads = [
            ((first - queries[0], end - queries[0]), (place, place + 1)) for place, (first, end) in enumerate(bounds)
        ]
    for of_queries, of_keys in heads:
        for _, rows in layouts.divide(((0, call.layout.length),), call.cuts):
            yield slice(*of_queries), slice(*of_keys), slice(*rows)


# --- Exchange ------------------------------------------------------------------------------------


def _to_heads(layout: Layout, own: Sequence[Tensor], divisions: Sequence[Sequence[Span]], content: str) -> list[Tensor]:
    """All rows of this rank's heads, in the order of the sequence, of tensors (B, heads, rows, columns) that have this
    rank's rows of all heads. `divisions`: of each tensor, the heads of each rank."""
    peers = layout.peers
    sends, sizes = {}, {}
    for rank in range(peers.size):
        parts = [one[:, slice(*heads[rank])].reshape(-1) for one, heads in zip(own, divisions)]
        sends[rank] = torch.cat(parts)
        rows = layouts.count(layout.spans[rank])
        sizes[rank] = sum(rows * _row_size(one, heads[peers.rank]) for one, heads in zip(own, divisions))
    found = _exchange(layout, sends, sizes, content)
    whole = []
    for one, heads in zip(own, divisions):
        first, end = heads[peers.rank]
        whole.append(one.new_empty(one.shape[0], end - first, layout.length, one.shape[3]))
    for rank, flat in found.items():
        rows, begin = layouts.count(layout.spans[rank]), 0
        for into in whole:
            size = rows * _row_size(into, (0, into.shape[1]))
            part = flat[begin : begin + size].view(*into.shape[:2], rows, into.shape[3])
            layouts.place_rows(into, part, layout.spans[rank], 2)
            begin += size
    return whole


def _to_rows(
    layout: Layout, own: Sequence[Tensor], divisions: Sequence[Sequence[Span]], totals: Sequence[int], content: str
) -> list[Tensor]:
    """The reverse: this rank's rows of all heads, of which `totals` are the numbers. Where several ranks have a part of
    one head, these are added, in the order of the ranks."""
    if not own:
        return []
    peers = layout.peers
    sends, sizes = {}, {}
    for rank in range(peers.size):
        rows = [one[:, :, start:stop] for one in own for start, stop in layout.spans[rank]]
        sends[rank] = torch.cat([part.reshape(-1) for part in rows]) if rows else own[0].new_empty(0)
        sizes[rank] = sum(layout.rows * _row_size(one, heads[rank]) for one, heads in zip(own, divisions))
    found = _exchange(layout, sends, sizes, content)
    whole = [one.new_zeros(one.shape[0], total, layout.rows, one.shape[3]) for one, total in zip(own, totals)]
    for rank, flat in sorted(found.items()):
        begin = 0
        for into, heads in zip(whole, divisions):
            first, end = heads[rank]
            for start, stop in map(layouts.Places(layout.own).rows, layout.own):
                size = (stop - start) * _row_size(into, heads[rank])
                part = flat[begin : begin + size].view(into.shape[0], end - first, stop - start, into.shape[3])
                into[:, first:end, start:stop] += part
                begin += size
    return whole


def _exchange(layout: Layout, sends: dict[int, Tensor], sizes: dict[int, int], content: str) -> dict[int, Tensor]:
    """What each rank has for this one, as a flat tensor; its own, too."""
    own = sends.pop(layout.peers.rank)
    del sizes[layout.peers.rank]
    found = layout.peers.exchange(sends, sizes, own, content).wait()
    return found | {layout.peers.rank: own}


def _row_size(tensor: Tensor, heads: Span) -> int:
    """The elements of a row with these heads."""
    return tensor.shape[0] * (heads[1] - heads[0]) * tensor.shape[3]
