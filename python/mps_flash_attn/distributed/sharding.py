"""Along which dimensions DTensors shard a call of attention, and how each operand has to be sharded for that.

Heads and batch entries are independent of one another: if all operands are sharded alike along these, each rank
computes its part from its own shards. Dimensions are counted from the last, as those of the scores: HEADS, ROWS,
COLUMNS; what comes before HEADS is the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

HEADS, ROWS, COLUMNS = -3, -2, -1


class Operand(NamedTuple):
    """How an operand is sharded for a call."""

    placements: tuple[Placement, ...]
    grad_placements: tuple[Placement, ...]  # of the gradient that the shards yield
    heads: slice | Tensor | None = None  # which heads of its shard are used; None: all


class Sharding:
    """How one call of attention is sharded: `dimensions` has a dimension of the scores for each dimension of the mesh,
    None where all ranks compute the same."""

    def __init__(self, query: DTensor, key: DTensor, value: DTensor, sizes: Sequence[int]) -> None:
        """`sizes`: those of the batch and of the heads of the result. Raises ValueError for placements that no call
        can have."""
        self.mesh = query.device_mesh
        self.sizes = sizes
        self._rows = query.shape[ROWS]
        named = {"query": query, "key": key, "value": value}
        self.dimensions = tuple(self._dimension(named, place) for place in range(self.mesh.ndim))

    def of(self, tensor: DTensor, missing: int = 0) -> Operand:
        """How the operand is sharded. It has all dimensions of the scores but the last `missing`, or of those only the
        last ones; one of size 1 is broadcast. Key and value may have fewer heads than query."""
        placements: list[Placement] = []
        gradients: list[Placement] = []
        is_selected = False
        for dimension in self.dimensions:
            if dimension is None:
                placements.append(Replicate())
                gradients.append(Replicate())
                continue
            place = dimension + missing + tensor.dim()
            size = tensor.shape[place] if place >= 0 else 1
            if place < 0:
                is_divided = False
            elif dimension == ROWS:  # any other size: where from_local was given unequal shards, it is wrong
                is_divided = size != 1 or self._rows == 1
            else:
                is_divided = size == self.size(dimension) or (size > 1 and size % self.parts(dimension) == 0)
            placements.append(Shard(place) if is_divided else Replicate())
            gradients.append(Shard(place) if is_divided else Partial())
            is_selected |= not is_divided and size > 1
        heads = self._heads(tensor.shape[HEADS + missing]) if is_selected else None
        return Operand(tuple(placements), tuple(gradients), heads)

    def of_result(self, dimensions: int, missing: int = 0) -> Operand:
        """How a result with so many dimensions is sharded: all of the scores but the last `missing`."""
        places = (None if one is None else one + missing + dimensions for one in self.dimensions)
        return whole(Replicate() if place is None else Shard(place) for place in places)

    def size(self, dimension: int) -> int:
        """The size of a dimension of the result before ROWS."""
        return self.sizes[dimension - ROWS]

    def parts(self, dimension: int) -> int:
        """Into how many parts the mesh divides this dimension."""
        return math.prod(self.mesh.size(place) for place, one in enumerate(self.dimensions) if one == dimension)

    def _dimension(self, named: Mapping[str, DTensor], place: int) -> int | None:
        """The dimension of the scores along which a dimension of the mesh divides the call."""
        found = {name: _sharded(name, tensor, place) for name, tensor in named.items()}
        if ROWS in found.values():
            if set(found.values()) != {ROWS}:
                placements = ", ".join(f"{name} {tensor.placements[place]}" for name, tensor in named.items())
                raise ValueError(
                    f"on dimension {place} of the mesh the placements are {placements}; if one of query, key and value "
                    "is sharded along the sequence, all three must be"
                )
            return ROWS
        for name, dimension in found.items():  # one of size 1 is broadcast: all ranks need it
            if dimension is not None and (named[name].shape[dimension] != 1 or self.size(dimension) == 1):
                return dimension
        return None

    def _heads(self, kv_heads: int) -> slice | Tensor:
        """The heads of key or value that this rank's heads of the query use."""
        start, stop = 0, self.size(HEADS)
        group = stop // kv_heads
        for place, dimension in enumerate(self.dimensions):
            if dimension == HEADS:
                chunk = -(-(stop - start) // self.mesh.size(place))
                start = min(start + chunk * self.mesh.get_local_rank(place), stop)
                stop = min(start + chunk, stop)
        if start % group == stop % group == 0:
            return slice(start // group, stop // group)
        if start // group == (stop - 1) // group:
            return slice(start // group, start // group + 1)
        return torch.arange(start, stop) // group


def divides_rows(query: DTensor) -> bool:
    """Whether a dimension of the mesh shards the sequence of the query."""
    return any(_sharded("query", query, place) == ROWS for place in range(query.device_mesh.ndim))


def _sharded(name: str, tensor: DTensor, place: int) -> int | None:
    """The dimension of the scores along which a dimension of the mesh shards a tensor. None for Replicate and Partial,
    and for columns, which no rank can do without; these are redistributed."""
    placement = tensor.placements[place]
    if type(placement) is Shard:
        dimension = placement.dim - tensor.dim()
        return None if dimension == COLUMNS else dimension
    if not isinstance(placement, (Replicate, Partial)):
        raise ValueError(
            f"{name} has the placement {placement}; it must be Shard, Replicate or Partial of torch.distributed.tensor"
        )
    return None


def whole(placements: Iterable[Placement]) -> Operand:
    """An operand of which each rank uses its whole shard."""
    placements = tuple(placements)
    return Operand(placements, placements)


def local(tensor: Any, operand: Operand) -> Any:
    """This rank's shard of an operand, redistributed if need be, with the heads that are used. None stays None."""
    if tensor is None:
        return None
    if tensor.placements != operand.placements:
        if not torch.is_grad_enabled():  # PyTorch 2.9 would detach the result in place, which DTensors cannot
            tensor = tensor.detach()
        tensor = tensor.redistribute(placements=operand.placements)
    shard = tensor.to_local(grad_placements=operand.grad_placements)
    if hasattr(shard, "trigger_wait"):  # an AsyncCollectiveTensor, of a redistribution that is under way
        shard = torch.ops._c10d_functional.wait_tensor(shard)
    heads = operand.heads
    if heads is None:
        return shard
    if isinstance(heads, slice):
        return shard.narrow(HEADS, heads.start, heads.stop - heads.start)
    return shard.index_select(HEADS, heads.to(shard.device))


def gradient_of(tensor: DTensor, operand: Operand, gradient: Tensor) -> DTensor:
    """The gradient of an operand from that of what local() returned."""
    heads = operand.heads
    if heads is not None:
        used = gradient
        shape = list(used.shape)
        shape[HEADS] = tensor.shape[HEADS]
        gradient = used.new_zeros(shape)
        if isinstance(heads, slice):
            gradient.narrow(HEADS, heads.start, heads.stop - heads.start).copy_(used)
        else:
            gradient.index_add_(gradient.dim() + HEADS, heads.to(used.device), used)
    return as_dtensor(gradient, tensor.device_mesh, operand.grad_placements, tensor.shape)


def as_dtensor(shard: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """The DTensor of this shape whose shard this is. Its strides have the order of the shard's."""
    order = list(range(shard.dim()))
    if not shard.is_contiguous():
        order.sort(key=shard.stride, reverse=True)
    strides, step = [0] * len(order), 1
    for place in reversed(order):
        strides[place], step = step, step * max(shape[place], 1)
    whole_shape = torch.Size(shape)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=whole_shape, stride=tuple(strides))
