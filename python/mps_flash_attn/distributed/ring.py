"""Ring attention: queries stay where they are, and keys and values travel.

In step s a rank has the keys and values of the rank s before it, directly from there, while those of step s + 1 are
under way. In backward they travel again, and the gradients of the keys travel home in float32, where they are added in
the order of the steps: results depend on nothing but the layout, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import tensors
from ..options import Options
from ..problem import Inputs, Operands
from . import layout as layouts
from . import local_step
from .call import Call
from .layout import Layout, Pair, Span, Step
from .transfer import Exchange


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(out, lse) of this rank's rows, lse in float32 (float64 for float64), and what backward() needs."""
    query, key, value, _, sinks, *_ = inputs
    dtype = tensors.rows_dtype(query)
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    steps = _schedule(inputs, call)
    empty = _Rows(query.shape[2])
    travel = _Travel((key, value), steps, call.layout)
    for step in steps:
        sources = travel.arrived(step)
        for pair in step.pairs:
            part, part_lse = call.kernels.forward(_of_pair(inputs, sources, pair), _options(call, pair))
            rows = slice(*pair.queries)
            if empty.contain(pair.queries):
                out[:, :, rows], lse[:, :, rows] = part, part_lse
            else:
                _clear(out, lse, empty.within(pair.queries))
                local_step.merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
            empty.remove(pair.queries)
    _clear(out, lse, empty.spans)
    if sinks is not None:
        local_step.merge_sinks(out, lse, sinks)
    rounded = out.to(query.dtype)
    return rounded, lse, (out if call.kernels.has_low else rounded, lse)


def _clear(out: Tensor, lse: Tensor, spans: Iterable[Span]) -> None:
    for rows in spans:
        out[:, :, slice(*rows)] = 0
        lse[:, :, slice(*rows)] = -torch.inf


class _Rows:
    """Rows of out and lse that are not written yet."""

    def __init__(self, count: int) -> None:
        self.spans = [(0, count)]

    def within(self, rows: Span) -> list[Span]:
        parts = ((max(start, rows[0]), min(stop, rows[1])) for start, stop in self.spans)
        return [part for part in parts if part[0] < part[1]]

    def contain(self, rows: Span) -> bool:
        return self.within(rows) == [rows]

    def remove(self, rows: Span) -> None:
        parts = [
            part for start, stop in self.spans for part in ((start, min(stop, rows[0])), (max(start, rows[1]), stop))
        ]
        self.spans = [part for part in parts if part[0] < part[1]]


def backward(
    inputs: Inputs, saved: Sequence[Tensor], d_out: Tensor, d_lse: Tensor | None, call: Call
) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, dbias, dsinks), each None if not wanted, in the dtypes of their tensors."""
    query, key, value, _, sinks, *_ = inputs
    out, lse = saved
    dtype = tensors.rows_dtype(query)
    if d_lse is not None:
        d_lse = d_lse.masked_fill(lse == -torch.inf, 0)  # lse is a constant there
    dq, dk, dv, dbias = (
        torch.zeros(one.shape, dtype=dtype, device=one.device) if one is not None and is_wanted else None
        for one, is_wanted in zip(inputs[:4], call.wanted)
    )
    travelling = [one for one in (dk, dv) if one is not None]
    steps = _schedule(inputs, call)
    travel = _Travel((key, value), steps, call.layout)
    home: tuple[Exchange, Step] | None = None
    for step in steps:
        sources = travel.arrived(step)
        if step is steps[0]:
            found: Sequence[Tensor] = travelling
        else:
            flat, found = _flat_rows(travelling, step.receives, dtype)
        for pair in step.pairs:
            rows = slice(*pair.queries)
            of_pair = Operands(
                _of_pair(inputs, sources, pair),
                out[:, :, rows],
                lse[:, :, rows],
                d_out[:, :, rows],
                None if d_lse is None else d_lse[:, :, rows],
            )
            parts = call.kernels.backward(of_pair, _options(call, pair), call.wanted[:4])
            if dq is not None:
                dq[:, :, rows] += parts[0]
            for into, part in zip(found, (part for part in parts[1:3] if part is not None)):
                into[:, :, slice(*pair.keys)] += part
            if dbias is not None:
                _of_mask(dbias, pair).add_(parts[3])
        if home is not None:
            _add_rows(travelling, home, call.layout)
            home = None
        if travelling and step is not steps[0]:
            home = _send_home(travelling, flat, step, call.layout), step
    if home is not None:
        _add_rows(travelling, home, call.layout)
    dsinks = None
    if sinks is not None and call.wanted[4]:
        dsinks = local_step.sinks_gradient(sinks, out, lse, d_out, d_lse)
    wide = dq, dk, dv, dbias
    return *(one if one is None or of is None else one.to(of.dtype) for one, of in zip(wide, inputs)), dsinks


def _schedule(inputs: Inputs, call: Call) -> tuple[Step, ...]:
    """The steps of this rank."""
    layout, options = call.layout, call.options
    bounds = options.lower, options.upper
    return layouts.schedule(layout.spans, layout.peers.rank, *bounds, call.cuts, joins=inputs.attn_mask is None)


# --- Pairs ---------------------------------------------------------------------------------------


def _of_pair(inputs: Inputs, sources: Sequence[Tensor], pair: Pair) -> Inputs:
    key, value = (one[:, :, slice(*pair.keys)] for one in sources)
    mask = None if inputs.attn_mask is None else _of_mask(inputs.attn_mask, pair)
    return Inputs(inputs.query[:, :, slice(*pair.queries)], key, value, mask)


def _of_mask(mask: Tensor, pair: Pair) -> Tensor:
    """The part of a mask of four dimensions for a pair."""
    if mask.shape[2] != 1:
        mask = mask[:, :, slice(*pair.queries)]
    if mask.shape[3] == 1:
        return mask
    assert pair.columns is not None
    return mask[..., slice(*pair.columns)]


def _options(call: Call, pair: Pair) -> Options:
    return call.options._replace(lower=pair.lower, upper=pair.upper)


# --- What travels --------------------------------------------------------------------------------


class _Travel:
    """The keys and values of each step, those of the next step always being under way."""

    def __init__(self, own: Sequence[Tensor], steps: Sequence[Step], layout: Layout) -> None:
        self._own, self._steps, self._layout = own, iter(steps[1:]), layout
        self._next = self._start()

    def arrived(self, step: Step) -> Sequence[Tensor]:
        """Keys and values that the step uses. It must be called for each step in order."""
        own = self._own
        if step.receives_from == self._layout.peers.rank:
            return own
        exchange = self._next
        self._next = self._start()
        assert exchange is not None
        (flat,) = exchange.wait().values()
        return _split_rows(flat, own, step.receives)

    def _start(self) -> Exchange | None:
        step = next(self._steps, None)
        if step is None:
            return None
        own = self._own
        flat = own[0].new_empty(layouts.count(step.sends) * sum(map(_row_size, own)))
        for one, rows in zip(own, _split_rows(flat, own, step.sends)):
            for sent, held in _places(step.sends, self._layout):
                rows[:, :, sent] = one[:, :, held]
        size = sum(layouts.count(step.receives) * _row_size(one) for one in own)
        return self._layout.peers.exchange({step.sends_to: flat}, {step.receives_from: size}, own[0], "keys and values")


def _places(spans: layouts.Spans, layout: Layout) -> list[tuple[slice, slice]]:
    """Of each span, its rows in a tensor that has those of all `spans`, and in one of this rank's."""
    together, own = layouts.Places(spans), layouts.Places(layout.own)
    return [(slice(*together.rows(span)), slice(*own.rows(span))) for span in spans]


def _row_size(tensor: Tensor) -> int:
    batch, heads, _, columns = tensor.shape
    return batch * heads * columns


def _split_rows(flat: Tensor, like: Sequence[Tensor], spans: layouts.Spans) -> list[Tensor]:
    """The tensors that a flat one consists of: the rows of all spans of each of `like`."""
    rows, found, begin = layouts.count(spans), [], 0
    for one in like:
        size = rows * _row_size(one)
        found.append(flat[begin : begin + size].view(*one.shape[:2], rows, one.shape[3]))
        begin += size
    return found


def _flat_rows(like: Sequence[Tensor], spans: layouts.Spans, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A flat tensor of zeros, and the tensors that it consists of."""
    size = layouts.count(spans) * sum(map(_row_size, like))
    flat = like[0].new_zeros(size, dtype=dtype) if like else torch.empty(0)
    return flat, _split_rows(flat, like, spans)


def _send_home(travelling: Sequence[Tensor], flat: Tensor, step: Step, layout: Layout) -> Exchange:
    """Starts to send the gradients of a step's keys to the rank that holds these."""
    size = layouts.count(step.sends) * sum(map(_row_size, travelling))
    return layout.peers.exchange(
        {step.receives_from: flat}, {step.sends_to: size}, flat, "gradients of keys and values"
    )


def _add_rows(travelling: Sequence[Tensor], home: tuple[Exchange, Step], layout: Layout) -> None:
    """Adds the gradients that have come home from one rank."""
    exchange, step = home
    (flat,) = exchange.wait().values()
    for into, rows in zip(travelling, _split_rows(flat, travelling, step.sends)):
        for sent, held in _places(step.sends, layout):
            into[:, :, held] += rows[:, :, sent]
