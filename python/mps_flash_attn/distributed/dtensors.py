"""Attention of DTensors: the rules of the operators torch.ops.mfa, and of a replaced scaled_dot_product_attention.

Sharded along heads and batch, each rank computes its part from its own shards. DTensors that are sharded along the
sequence are taken by a replaced scaled_dot_product_attention, which runs context_parallel_attention; the operators
refuse them. What decides between these is the same on all ranks, so that none waits for another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import codes, context_parallel_state, problem, tensors
from ..operators import attention_backward, attention_forward, dropout_mask, quantize_kv, registration, split_backward
from ..options import Options
from ..problem import LENGTHS, SCALES, Inputs, InputsTuple, Operands
from ..sdpa import dispatch, shapes
from ..stats import REPLACED, count
from .attention import context_parallel_attention
from .layout import Layout
from .sharding import HEADS, ROWS, Operand, Sharding, as_dtensor, divides_rows, gradient_of, local, whole
from .transfer import Peers, without_modes
from .uncompiled import uncompiled

_BATCH = -4
_INPUTS = Inputs._fields
# How many of the last dimensions of the scores an input has not, if any.
_MISSING = {"sinks": 2, "alibi_slopes": 2, "dropout_seed": 3}


# --- scaled_dot_product_attention ----------------------------------------------------------------


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """scaled_dot_product_attention of DTensors."""
    operands = query, key, value, attn_mask
    if isinstance(query, DTensor) and divides_rows(query):
        return attend_over_sequence(operands, dropout_p, is_causal, scale, enable_gqa)
    given = _all_dtensors(_INPUTS, operands)
    sharding = _shard_sdpa(given, dropout_p, is_causal, enable_gqa)
    q, k, v, mask = _shards(sharding, given)
    batch, heads = _batch_and_heads((q.shape, k.shape, v.shape), enable_gqa)
    shape = (*batch, *heads, q.shape[ROWS], v.shape[-1])
    if 0 in shape:
        out = _without_elements(shape, q, k, v, mask)
    else:
        out = dispatch.attend(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _result(out, sharding, given)


def _without_elements(shape: Sequence[int], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A result without elements, whose operands have gradients of zeros, for which other ranks may wait. PyTorch's
    kernels, which run such calls of plain tensors, give some none, and others unusual strides, at which autograd
    replicates a DTensor by messages that other ranks do not expect. Without heads those of 2.9 end the process. Raises
    where PyTorch raises on the other ranks."""
    mask_dtypes = (torch.bool, torch.float32, query.dtype)
    if not query.dtype.is_floating_point or {key.dtype, value.dtype} != {query.dtype}:
        raise RuntimeError(
            f"query, key and value have the dtypes {query.dtype}, {key.dtype} and {value.dtype}; they must have one "
            "floating-point dtype"
        )
    if mask is not None and mask.dtype not in mask_dtypes:
        raise RuntimeError(f"attn_mask has the dtype {mask.dtype}; it must be bool, float32 or that of query")
    out = query.new_zeros(shape)
    for one in (query, key, value, mask):
        if one is not None and one.requires_grad:
            one.register_hook(lambda gradient: gradient.new_zeros(gradient.shape))
            out = out + 0 * one.sum()
    return out


def _shard_sdpa(
    given: tuple[Any, ...], dropout_p: float, is_causal: bool, enable_gqa: bool, *, checks_mask: bool = True
) -> Sharding:
    """How the call is sharded. Raises for what DTensors cannot have."""
    query, key, value, mask = given
    if dropout_p:
        raise NotImplementedError(
            f"dropout_p is {dropout_p}; for DTensors it must be 0, since each rank would draw by itself which "
            "weights it drops"
        )
    mask_shape = mask.shape if mask is not None and checks_mask else None
    batch, heads = _sizes(query.shape, key.shape, value.shape, mask_shape, is_causal, enable_gqa)
    return Sharding(query, key, value, (*batch, *heads))


def _sizes(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    mask: Sequence[int] | None,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[Sequence[int], Sequence[int]]:
    """The sizes of the batch and of the heads of the result. Raises for shapes that do not fit, by the rules of
    plain tensors; each rank would see its part of them only."""
    given = (query, key, value)
    # Tensors without elements and long heads are PyTorch's to run, and fit or do not fit as others.
    fitting = [(*(max(size, 1) for size in one[:-1]), min(max(one[-1], 1), shapes.HEAD_DIM_MAX)) for one in given]
    of_mask = None if mask is None else tuple(max(size, 1) for size in mask)
    reason = shapes.check_support(fitting[0], fitting[1], fitting[2], of_mask, is_causal, enable_gqa).reason
    batch, heads = _batch_and_heads(given, enable_gqa)
    if reason is not None or batch is None or heads is None:
        named = ", ".join(f"{name} {tuple(one)}" for name, one in zip(_INPUTS, (*given, mask)) if one is not None)
        raise ValueError(f"scaled_dot_product_attention does not take these DTensors ({reason or 'shapes'}): {named}")
    return batch, heads


def _batch_and_heads(given: Sequence[Sequence[int]], enable_gqa: bool) -> tuple[Any, Any]:
    """The sizes before the rows of a result, of the shapes of query, key and value; None where these do not fit."""
    batch = shapes.broadcast(*(one[:HEADS] for one in given))
    heads = shapes.broadcast(*(one[HEADS:ROWS] for one in (given[:1] if enable_gqa else given)))
    return batch, heads


def _result(out: Tensor, sharding: Sharding, given: tuple[Any, ...]) -> DTensor:
    """The DTensor of which this is the shard."""
    query, _, value, _ = given
    shape = (*sharding.sizes, query.shape[ROWS], value.shape[-1])
    return as_dtensor(out, sharding.mesh, sharding.of_result(len(shape)).placements, shape)


def _shards(sharding: Sharding, given: Iterable[Any]) -> Any:
    """This rank's shards of the operands, None for None."""
    return [None if one is None else local(one, sharding.of(one)) for one in given]


# --- A sharded sequence --------------------------------------------------------------------------


@uncompiled
def attend_over_sequence(
    given: tuple[Any, ...], dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool
) -> DTensor:
    """The result by context_parallel_attention, for a query that is sharded along the sequence on all ranks. An error
    on one rank is one on all that share the sequence."""
    query, *_ = given
    rows = query.to_local().detach()
    if not tensors.is_plain(rows):
        raise NotImplementedError(
            "query is sharded along the sequence in compiled code, where no messages can be exchanged; call attention "
            "in a function with torch.compiler.disable, or without fullgraph=True"
        )
    failure = sharding = None
    is_balanced = context_parallel_state.is_balanced()
    try:
        given = _all_dtensors(_INPUTS, given)
        sharding = _shard_sdpa(given, dropout_p, is_causal, enable_gqa, checks_mask=False)
        _check_sequence(sharding, given, is_causal, enable_gqa, is_balanced)
    except Exception as error:  # the other ranks have to learn of it first
        failure = error
    group = query.device_mesh.get_group(query.placements.index(Shard(query.dim() + ROWS)))
    layout = _layout(group, rows.shape[ROWS], failure, is_balanced)
    assert sharding is not None  # _layout raises any failure
    q, k, v, mask = _shards(sharding, given)
    count(REPLACED)
    out = context_parallel_attention(q, k, v, layout, is_causal, scale, mask, enable_gqa=enable_gqa)
    return _result(out, sharding, given)


def _check_sequence(
    sharding: Sharding, given: tuple[Any, ...], is_causal: bool, enable_gqa: bool, is_balanced: bool
) -> None:
    query, key, value, mask = given
    if sharding.dimensions.count(ROWS) > 1:
        raise ValueError(
            f"query has the placements {query.placements}; the sequence may be sharded on one dimension of the mesh"
        )
    alike = {(one.dim(), *one.shape[:HEADS], one.shape[ROWS]) for one in (query, key, value)}
    heads = {one.shape[HEADS:ROWS] for one in (key, value)} | (set() if enable_gqa else {query.shape[HEADS:ROWS]})
    if query.dim() != 4 or len(alike) > 1 or len(heads) > 1:
        named = ", ".join(f"{name} {tuple(one.shape)}" for name, one in zip(_INPUTS, (query, key, value)))
        raise ValueError(
            f"the shapes are {named}; sharded along the sequence they must have four dimensions, one batch, one length "
            "and one number of heads, but with enable_gqa query may have more"
        )
    if mask is not None and is_causal:
        raise ValueError("attn_mask is given and is_causal is True; only one of both may be")
    if mask is not None and is_balanced:
        place = sharding.dimensions.index(ROWS)
        if mask.placements[place] != Shard(mask.dim() + ROWS):
            raise ValueError(
                f"attn_mask has the placements {mask.placements}; with PyTorch's load balancing of context_parallel it "
                "must be sharded along its rows, as query is"
            )


def _layout(group: Any, rows: int, failure: Exception | None, is_balanced: bool) -> Layout:
    """The layout of a sequence of which this rank has `rows`. The shape of a DTensor does not say it: from_local takes
    all shards for equal. Raises on all ranks if there is a failure on one."""
    peers = Peers(group)
    own = torch.tensor([rows if failure is None else -1])
    others = [rank for rank in range(peers.size) if rank != peers.rank]
    with without_modes():
        found = peers.exchange(dict.fromkeys(others, own), dict.fromkeys(others, 1), own, "rows").wait()
    found[peers.rank] = own
    if failure is not None:
        raise failure
    lengths = [int(found[rank]) for rank in range(peers.size)]
    if min(lengths) < 0:
        raise ValueError(
            f"scaled_dot_product_attention raised an error on rank {lengths.index(-1)} of the group, where its "
            f"sentence is; so it is not run on rank {peers.rank} either"
        )
    if not is_balanced:
        return Layout.of_lengths(lengths, group)
    if len(set(lengths)) > 1 or rows % 2:
        raise ValueError(
            f"the ranks have {lengths} rows; with PyTorch's load balancing of context_parallel all must have the same "
            "even number"
        )
    return Layout.zigzag(sum(lengths), group)


# --- The operators -------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[DTensor, DTensor]:
    options = Options(*arguments[len(_INPUTS) :])
    inputs, sharding = _shard(arguments[: len(_INPUTS)], options)
    out, lse = attention_forward(*itertools.starmap(local, _placed(inputs, sharding)), *options)
    shape = (*inputs[0].shape[:-1], codes.columns(inputs[2], options.v_type))
    of_out, of_lse = sharding.of_result(4), sharding.of_result(3, 1)
    out = as_dtensor(out, sharding.mesh, of_out.placements, shape)
    return out, as_dtensor(lse, sharding.mesh, of_lse.placements, shape[:-1])


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    (given, *of_result, _), options, wanted = split_backward(arguments)
    inputs, sharding = _shard(given, options)
    of_result = _all_dtensors(Operands._fields[1:], of_result, sharding.mesh)
    of_out, of_lse = sharding.of_result(4), sharding.of_result(3, 1)
    out, lse, d_out, d_lse = map(local, of_result, (of_out, of_lse, of_out, of_lse))
    placed = list(_placed(inputs, sharding))
    gradients = attention_backward(d_out, d_lse, *itertools.starmap(local, placed), out, lse, *options, wanted)
    return tuple(
        gradient_of(*place, gradient) if is_wanted else _replicated(gradient, sharding.mesh)
        for place, gradient, is_wanted in zip(placed, gradients, wanted)
    )


def _shard(given: InputsTuple, options: Options) -> tuple[InputsTuple, Sharding]:
    """The Inputs, all of them DTensors, and how the call is sharded."""
    inputs = _all_dtensors(_INPUTS, given)
    problem.check(inputs, options)
    query, key, value, *_ = inputs
    sharding = Sharding(query, key, value, query.shape[:ROWS])
    if ROWS in sharding.dimensions:
        raise ValueError(
            f"query, key and value are sharded along the sequence, with the placements {query.placements}; for that "
            "use mps_flash_attn.distributed.context_parallel_attention, or scaled_dot_product_attention after "
            "replace_sdpa()"
        )
    if options.dropout and any(one is not None for one in sharding.dimensions):
        raise ValueError(
            f"dropout_p is {options.dropout} and query has the placements {query.placements}; with dropout it must be "
            "replicated, since the weights that are dropped depend on the numbers of the head and of the batch entry"
        )
    lengths = [name for name, one in zip(_INPUTS[LENGTHS:SCALES], inputs[LENGTHS:SCALES]) if one is not None]
    if lengths and _BATCH in sharding.dimensions:
        raise ValueError(
            f"query is sharded along the batch and {lengths[0]} is given; with that it must be sharded along its "
            "heads, or replicated"
        )
    return inputs, sharding


def _placed(inputs: InputsTuple, sharding: Sharding) -> Iterator[tuple[Any, Operand]]:
    """Each of the Inputs with how it is sharded."""
    replicated = whole([Replicate()] * sharding.mesh.ndim)
    for name, tensor in zip(_INPUTS, inputs):
        is_whole = tensor is None or name in _INPUTS[LENGTHS:SCALES]
        yield tensor, replicated if is_whole else sharding.of(tensor, _MISSING.get(name, 0))


def _dropout_mask(seed: DTensor, *others: Any) -> DTensor:
    replicated = [Replicate()] * seed.device_mesh.ndim
    mask = dropout_mask(local(seed, whole(replicated)), *others)
    return as_dtensor(mask, seed.device_mesh, replicated, mask.shape)


def _quantize_kv(numbers: DTensor, *others: Any) -> tuple[DTensor, ...]:
    """Each row has its codes and scales: the numbers may be sharded along all dimensions but the last."""
    columns = numbers.dim() - 1
    placements = [one if type(one) is Shard and one.dim < columns else Replicate() for one in numbers.placements]
    results = quantize_kv(local(numbers, whole(placements)), *others)
    mesh, rows = numbers.device_mesh, numbers.shape[:columns]
    return tuple(as_dtensor(one, mesh, placements, (*rows, *one.shape[columns:])) for one in results)


def _register(library: torch.library.Library, name: str, compute: Callable[..., Any]) -> None:
    """Makes `compute` what an operator does with DTensors below autograd."""

    def rule(_: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        with torch.no_grad():
            return compute(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(name, DTensor, rule, lib=library)


_register(registration, "mfa::attention_forward", _forward)
_register(registration, "mfa::attention_backward", _backward)
_register(registration, "mfa::dropout_mask", _dropout_mask)
_register(registration, "mfa::quantize_kv", _quantize_kv)
# Under inference_mode PyTorch calls the rule of a class before the kernels that replace its own.
_of_aten = torch.library.Library("aten", "FRAGMENT")
_register(_of_aten, "aten::scaled_dot_product_attention", dispatch.attention)


# --- Operands ------------------------------------------------------------------------------------


def _all_dtensors(names: Iterable[str], operands: Iterable[Any], mesh: Any = None) -> Any:
    """The tensors as DTensors on one mesh. Raises for plain tensors, as PyTorch does, except within
    torch.distributed.tensor.experimental.implicit_replication(), where those are replicated."""
    operands = list(operands)
    if mesh is None:
        mesh = next(one.device_mesh for one in operands if isinstance(one, DTensor))
    return tuple(None if one is None else _as_dtensor(name, one, mesh) for name, one in zip(names, operands))


def _as_dtensor(name: str, tensor: Any, mesh: Any) -> DTensor:
    if isinstance(tensor, DTensor):
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{name} is on {tensor.device_mesh} and another operand on {mesh}; they must be on one mesh"
            )
        return tensor
    if not DTensor._op_dispatcher._allow_implicit_replication:
        raise TypeError(
            f"{name} is a plain tensor beside DTensors; it must be one, too, as "
            "distribute_tensor(..., mesh, [Replicate()]) makes it"
        )
    return _replicated(tensor, mesh)


def _replicated(tensor: Tensor, mesh: Any) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
