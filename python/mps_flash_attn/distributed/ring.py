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
from .layout import Layout, Pair, Schedule, Span, Step
from .transfer import Exchange


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(out, lse) of this rank's rows, lse in float32 (float64 for float64), and what backward() needs."""
    query, key, value, _, sinks, *_ = inputs
    dtype = tensors.rows_dtype(query)
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    spans, steps = _schedule(call)
    begun = [False] * len(spans)
    travel = _Travel((key, value), steps, call.layout)
    for step in steps:
        sources = travel.arrived(step)
        for pair in step.pairs:
            part, part_lse = call.kernels.forward(_of_pair(inputs, sources, pair), _options(call, pair))
            rows = slice(*pair.queries)
            if begun[pair.span]:
                local_step.merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
                continue
            begun[pair.span] = True
            if pair.queries != spans[pair.span]:
                _clear(out, lse, spans[pair.span])
            out[:, :, rows], lse[:, :, rows] = part, part_lse
    for span, has_keys in zip(spans, begun):
        if not has_keys:
            _clear(out, lse, span)
    if sinks is not None:
        local_step.merge_sinks(out, lse, sinks)
    rounded = out.to(query.dtype)
    return rounded, lse, (out if call.kernels.has_low else rounded, lse)


def _clear(out: Tensor, lse: Tensor, rows: Span) -> None:
    out[:, :, slice(*rows)] = 0
    lse[:, :, slice(*rows)] = -torch.inf


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
    steps = _schedule(call).steps
    travel = _Travel((key, value), steps, call.layout)
    home: tuple[Exchange, Step] | None = None
    for step in steps:
        sources = travel.arrived(step)
        if step is steps[0]:
            found = _own_rows(travelling, step.receives, call.layout)
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
            for into, part in zip(found[pair.source], (part for part in parts[1:3] if part is not None)):
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


def _schedule(call: Call) -> Schedule:
    """The Schedule of this rank."""
    layout, options = call.layout, call.options
    return layouts.schedule(layout.spans, layout.peers.rank, options.lower, options.upper, call.cuts)


# --- Pairs ---------------------------------------------------------------------------------------

Sources = list[list[Tensor]]  # of each span of Step.receives, the rows of each tensor that travels


def _of_pair(inputs: Inputs, sources: Sources, pair: Pair) -> Inputs:
    key, value = (one[:, :, slice(*pair.keys)] for one in sources[pair.source])
    mask = None if inputs.attn_mask is None else _of_mask(inputs.attn_mask, pair)
    return Inputs(inputs.query[:, :, slice(*pair.queries)], key, value, mask)


def _of_mask(mask: Tensor, pair: Pair) -> Tensor:
    """The part of a mask of four dimensions for a pair."""
    if mask.shape[2] != 1:
        mask = mask[:, :, slice(*pair.queries)]
    return mask if mask.shape[3] == 1 else mask[..., slice(*pair.columns)]


def _options(call: Call, pair: Pair) -> Options:
    return call.options._replace(lower=pair.lower, upper=pair.upper)


# --- What travels --------------------------------------------------------------------------------


class _Travel:
    """The keys and values of each step, those of the next step always being under way."""

    def __init__(self, own: Sequence[Tensor], steps: Sequence[Step], layout: Layout) -> None:
        self._own, self._steps, self._layout = own, iter(steps[1:]), layout
        self._next = self._start()

    def arrived(self, step: Step) -> Sources:
        """What the step uses. It must be called for each step in order."""
        own = self._own
        if step.receives_from == self._layout.peers.rank:
            return _own_rows(own, step.receives, self._layout)
        exchange = self._next
        self._next = self._start()
        assert exchange is not None
        (flat,) = exchange.wait().values()
        return _split_rows(flat, own, step.receives)

    def _start(self) -> Exchange | None:
        step = next(self._steps, None)
        if step is None:
            return None
        own, spans = self._own, self._layout.own
        rows = [layouts.rows_of(spans, span) for span in step.sends]
        parts = [one[:, :, slice(*places)].reshape(-1) for places in rows for one in own]
        flat = torch.cat(parts) if parts else own[0].new_empty(0)
        size = sum(layouts.count(step.receives) * _row_size(one) for one in own)
        return self._layout.peers.exchange({step.sends_to: flat}, {step.receives_from: size}, own[0], "keys and values")


def _own_rows(own: Sequence[Tensor], spans: layouts.Spans, layout: Layout) -> Sources:
    """Views of this rank's rows."""
    places = [slice(*layouts.rows_of(layout.own, span)) for span in spans]
    return [[one[:, :, rows] for one in own] for rows in places]


def _row_size(tensor: Tensor) -> int:
    batch, heads, _, columns = tensor.shape
    return batch * heads * columns


def _split_rows(flat: Tensor, like: Sequence[Tensor], spans: Iterable[Span]) -> Sources:
    """The tensors that a flat one consists of: for each span, rows of each of `like`."""
    found, begin = [], 0
    for start, stop in spans:
        of_span = []
        for one in like:
            size = (stop - start) * _row_size(one)
            shape = (*one.shape[:2], stop - start, one.shape[3])
            of_span.append(flat[begin : begin + size].view(shape))
            begin += size
        found.append(of_span)
    return found


def _flat_rows(like: Sequence[Tensor], spans: layouts.Spans, dtype: torch.dtype) -> tuple[Tensor, Sources]:
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
    found = _split_rows(flat, travelling, step.sends)
    for views, parts in zip(_own_rows(travelling, step.sends, layout), found):
        for into, part in zip(views, parts):
            into += part
