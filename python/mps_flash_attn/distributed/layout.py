"""Which rank holds which rows of a sequence, and which of them see each other: arithmetic only.

A rank holds *spans* (start, stop) of the whole sequence, one after the other in its tensors. Of two spans, a query i
and a key j see each other where lower <= j - i <= upper; counted from the beginnings of the spans, both bounds are
shifted by the distance of these. So causal masks, windows, packed documents and every division of the rows are one
case.
"""

from __future__ import annotations

import functools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transfer import Peers

Span = tuple[int, int]  # (start, stop)
Spans = tuple[Span, ...]
Bound = int | None  # of j - i; None: no bound


class Layout:
    """How the rows of one sequence are divided over the ranks of a process group: `spans[rank]` are the (start, stop)
    that a rank holds, in the order of its tensors. All ranks of the group must have made the same layout.

    contiguous   equal parts in the order of the ranks, the first ranks having one row more where `length` cannot be
                 divided, as torch.tensor_split does it. For windows: K and V travel to neighbours only.
    zigzag       2P such parts, of which rank r holds number r and number 2P - 1 - r: with a causal mask every rank has
                 the same work. A part may be empty.
    of_lengths   lengths[r] rows for rank r, in the order of the ranks; 0 is allowed.

    group        a ProcessGroup, a DeviceMesh with one dimension, or None for the default group, which must have been
                 initialised.
    """

    def __init__(self, spans: Iterable[Iterable[Span]], group: Any = None) -> None:
        """A layout of any spans, which together must be all rows, each once. ValueError if they are not."""
        self.spans: tuple[Spans, ...] = tuple(map(_spans, spans))
        self.peers = Peers(group)
        if len(self.spans) != self.peers.size:
            raise ValueError(f"spans are of {len(self.spans)} ranks; the group has {self.peers.size}")
        every = sorted(span for of_rank in self.spans for span in of_rank)
        self.length: int = every[-1][1] if every else 0
        if [start for start, _ in every] != [0, *(stop for _, stop in every)][: len(every)]:
            raise ValueError(f"spans are {self.spans}; together they must be all rows of the sequence, each once")

    @classmethod
    def contiguous(cls, length: int, group: Any = None) -> Layout:
        peers = Peers(group)
        return cls(([part] for part in split(_length(length), peers.size)), group)

    @classmethod
    def zigzag(cls, length: int, group: Any = None) -> Layout:
        peers = Peers(group)
        parts = split(_length(length), 2 * peers.size)
        return cls(([parts[rank], parts[-1 - rank]] for rank in range(peers.size)), group)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], group: Any = None) -> Layout:
        ends = (0, *accumulate(map(_length, lengths)))
        return cls(([span] for span in pairwise(ends)), group)

    @property
    def own(self) -> Spans:
        """The spans of this rank."""
        return self.spans[self.peers.rank]

    @property
    def rows(self) -> int:
        """The number of rows of this rank."""
        return count(self.own)

    def shard(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's rows of a tensor that has all rows in dimension `dim`, as a new tensor. Differentiable; each rank
        then has the gradient of its own rows, and zeros elsewhere."""
        if _rows(tensor, dim) != self.length:
            raise ValueError(
                f"the tensor has {tensor.shape[dim]} rows in dimension {dim}; the layout has {self.length}"
            )
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.own]
        return torch.cat(parts or [tensor.narrow(dim, 0, 0)], dim)

    def unshard(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensor with all rows in dimension `dim`, on every rank, from each rank's own. All ranks must call it. It
        passes no gradient on: ValueError for a tensor that requires one while gradients are recorded."""
        values: dict[str, Any] = {}
        failure = None
        try:
            if _rows(tensor, dim) != self.rows:
                raise ValueError(
                    f"the tensor has {tensor.shape[dim]} rows in dimension {dim}; rank {self.peers.rank} of the layout "
                    f"has {self.rows}"
                )
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise ValueError(
                    "the tensor requires a gradient, which unshard does not pass on; give it tensor.detach()"
                )
            own = tensor.detach().movedim(dim, 0)
            values = {"layout": self.spans, "shape of a row": tuple(own.shape[1:]), "dtype": own.dtype}
        except Exception as error:  # the other ranks have to learn of it first
            failure = error
        self.peers.agree("Layout.unshard", values, failure)
        shape, flat = own.shape[1:], own.reshape(-1)
        ranks = [rank for rank in range(self.peers.size) if rank != self.peers.rank]
        sizes = {rank: count(self.spans[rank]) * math.prod(shape) for rank in ranks}
        found = self.peers.exchange(dict.fromkeys(ranks, flat), sizes, flat, "rows").wait()
        found[self.peers.rank] = flat
        whole = own.new_empty(self.length, *shape)
        for rank, spans in enumerate(self.spans):
            place_rows(whole, found[rank].view(count(spans), *shape), spans, 0)
        return whole.movedim(0, dim)

    def positions(self, device: Any = None) -> Tensor:
        """The places in the sequence of this rank's rows, (rows,) int64, as RoPE needs them."""
        spans = [torch.arange(start, stop, device=device) for start, stop in self.own]
        return torch.cat(spans) if spans else torch.arange(0, device=device)

    def __repr__(self) -> str:
        return f"Layout({self.spans}, rank {self.peers.rank})"


def _spans(of_rank: Any) -> Spans:
    """The spans of a rank, without empty ones."""
    try:
        found = tuple((operator.index(start), operator.index(stop)) for start, stop in of_rank)
    except (TypeError, ValueError):
        found = ((0, -1),)
    if any(start > stop for start, stop in found):
        raise ValueError(f"the spans of a rank are {of_rank!r}; they must be pairs (start, stop) of whole numbers")
    return tuple(span for span in found if span[0] < span[1])


def _rows(tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim is {dim}; the tensor has {tensor.dim()} dimensions")
    return tensor.shape[dim]


def _length(length: Any) -> int:
    try:
        found = operator.index(length)
    except TypeError:
        found = -1
    if found < 0:
        raise ValueError(f"a length is {length!r}; it must be a whole number, 0 or more")
    return found


def split(length: int, parts: int) -> list[Span]:
    """`length` rows in `parts` spans, of which the first have one more where it cannot be divided."""
    each, more = divmod(length, parts)
    starts = [each * part + min(part, more) for part in range(parts + 1)]
    return list(pairwise(starts))


def count(spans: Iterable[Span]) -> int:
    """The rows of spans."""
    return sum(stop - start for start, stop in spans)


def place_rows(whole: Tensor, rows: Tensor, spans: Spans, dim: int) -> None:
    """Writes the rows of a rank to their places in a tensor that has all rows."""
    begin = 0
    for start, stop in spans:
        whole.narrow(dim, start, stop - start).copy_(rows.narrow(dim, begin, stop - start))
        begin += stop - start


# --- Pairs of spans ------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Queries of this rank and keys of one rank that see each other."""

    queries: Span  # rows of this rank's tensors
    keys: Span  # rows of what came from the other rank, all of Step.receives; its own are rows of this rank's tensors
    columns: Span | None  # the same keys as places in the whole sequence; None where they are of several spans
    lower: Bound  # of j - i, both counted from 0 in the pair
    upper: Bound


class Step(NamedTuple):
    """What a rank does with the keys of one other rank, or of its own. Spans are of the whole sequence."""

    receives_from: int
    receives: Spans  # the keys that come from there
    pairs: tuple[Pair, ...]
    sends_to: int
    sends: Spans  # the keys that go there


def visible(queries: Span, keys: Span, lower: Bound, upper: Bound) -> tuple[Span, Span] | None:
    """The queries that see one of the keys, and the keys that one of the queries sees; None if none does. In what is
    left the first query and the last see a key, and the first key and the last are seen."""
    (first, end), (first_key, end_key) = queries, keys
    if lower is not None:
        first_key, end = max(first_key, queries[0] + lower), min(end, keys[1] - lower)
    if upper is not None:
        end_key, first = min(end_key, queries[1] + upper), max(first, keys[0] - upper)
    return ((first, end), (first_key, end_key)) if first < end and first_key < end_key else None


@functools.lru_cache(maxsize=256)
def schedule(
    spans: tuple[Spans, ...], rank: int, lower: Bound, upper: Bound, cuts: tuple[int, ...] = (), joins: bool = False
) -> tuple[Step, ...]:
    """The steps of a rank, of which the first is that of its own keys. `cuts`: the places where a document begins. In
    step s a rank uses the keys of the rank s before it; keys that it does not see do not travel. `joins`: pairs that
    together are one pair of other spans become that, since a kernel is faster on it; not with a mask, whose columns
    would not lie together."""
    size, own, steps = len(spans), Places(spans[rank]), []
    documents = tuple(divide(of_rank, cuts) for of_rank in spans)
    for step in range(size):
        source, target = (rank - step) % size, (rank + step) % size
        receives, seen = _seen(documents[rank], documents[source], spans[source], lower, upper)
        sends, _ = _seen(documents[target], documents[rank], spans[rank], lower, upper)
        held = own if step == 0 else Places(receives)
        pairs = []
        for places, columns in seen:
            shift = places[0] - columns[0]
            bounds = (None if bound is None else bound + shift for bound in (lower, upper))
            pairs.append(Pair(own.rows(places), held.rows(columns), columns, *bounds))
        if joins and step == 0 and not cuts and lower is None and _is_band(spans[rank], upper):
            rows = 0, count(spans[rank])
            pairs = [Pair(rows, rows, None, None, upper)] if rows[1] else []
        elif joins:
            pairs = _join(_join(list(map(_simplest, pairs)), "queries", "keys"), "keys", "queries")
        steps.append(Step(source, receives, tuple(pairs), target, sends))
    return tuple(steps)


def _is_band(spans: Spans, upper: Bound) -> bool:
    """Whether `upper` means the same of rows as of places, for queries and keys that are both these spans."""
    return upper is None or (upper == 0 and list(spans) == sorted(spans))


def _simplest(pair: Pair) -> Pair:
    """The pair without bounds that hide nothing."""
    queries, keys = pair.queries[1] - pair.queries[0], pair.keys[1] - pair.keys[0]
    lower = None if pair.lower is None or pair.lower <= 1 - queries else pair.lower
    upper = None if pair.upper is None or pair.upper >= keys - 1 else pair.upper
    return pair._replace(lower=lower, upper=upper)


def _join(pairs: list[Pair], same: str, adjacent: str) -> list[Pair]:
    """Pairs of which none hides anything and that have the `same` rows become one where their `adjacent` rows are."""
    found: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (getattr(pair, same), getattr(pair, adjacent))):
        last = found[-1] if found else pair
        (start, stop), (next_start, next_stop) = getattr(last, adjacent), getattr(pair, adjacent)
        is_whole = last[3:] == pair[3:] == (None, None)
        if is_whole and getattr(last, same) == getattr(pair, same) and stop == next_start:
            joined: dict[str, Any] = {adjacent: (start, next_stop), "columns": None}
            found[-1] = last._replace(**joined)
        else:
            found.append(pair)
    return found


def divide(spans: Spans, cuts: tuple[int, ...]) -> tuple[tuple[int, Span], ...]:
    """(document, span) of the parts that the cuts leave."""
    found = []
    for start, stop in spans:
        inside = cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)]
        for part in pairwise((start, *inside, stop)):
            found.append((bisect_right(cuts, part[0]), part))
    return tuple(found)


def _seen(
    queries: Sequence[tuple[int, Span]],
    keys: Sequence[tuple[int, Span]],
    key_spans: Spans,
    lower: Bound,
    upper: Bound,
) -> tuple[Spans, list[tuple[Span, Span]]]:
    """(the keys that are needed, of each of key_spans at most one span; the queries and keys that see each other), all
    as places in the sequence."""
    of_document: dict[int, list[Span]] = {}
    for document, query_span in queries:
        of_document.setdefault(document, []).append(query_span)
    found = []
    needed: dict[Span, Span] = {}
    spans = iter(key_spans)
    whole = (0, 0)
    for document, key_span in keys:  # which are the key_spans, divided
        while not whole[0] <= key_span[0] < whole[1]:
            whole = next(spans)
        for query_span in of_document.get(document, ()):
            seen = visible(query_span, key_span, lower, upper)
            if seen is not None:
                found.append(seen)
                start, stop = needed.get(whole, seen[1])
                needed[whole] = min(start, seen[1][0]), max(stop, seen[1][1])
    return tuple(needed.values()), found


class Places:
    """Where the places of spans are in the tensors of the rank that holds these."""

    def __init__(self, spans: Spans) -> None:
        begins = accumulate((stop - start for start, stop in spans), initial=0)
        self._found = sorted(zip(spans, begins))
        self._starts = [start for (start, _), _ in self._found]

    def rows(self, places: Span) -> Span:
        """The rows of places that lie in one of the spans."""
        (start, stop), begin = self._found[bisect_right(self._starts, places[0]) - 1]
        assert start <= places[0] and places[1] <= stop
        return begin + places[0] - start, begin + places[1] - start
