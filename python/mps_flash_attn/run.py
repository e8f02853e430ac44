"""Runs one forward or backward pass on libmfa: plain tensors in, new tensors out, without autograd.

A pass is prepared first, its operands checked and its problem packed, and then run. Prepared passes are cached by the
shapes, strides, dtypes and devices of their tensors and by their options (dispatch_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import codes, dispatch_cache, tensors
from .library import BASES, BUFFERS, DEVICE_CPU, MORE_BASES, STREAM_TORCH
from .options import Options
from .problem import (
    LENGTHS,
    Inputs,
    InputsTuple,
    OperandsTuple,
    check,
    check_saved,
    pack_backward,
    pack_forward,
)
from .tensors import EmptyLayout
from .torch_host import library

Allocate = Callable[[Tensor, int], Tensor]

# Global names: each attribute lookup costs time in every call.
_storage, _offset, _address, _empty_on_cpu = tensors.storage, tensors.offset, tensors.address, tensors.empty_on_cpu
_cached, _pack_bases, _BUFFERS_SIZE = dispatch_cache.get, BASES.pack, BUFFERS.size

_OWN_WORKSPACE = (0, 0, 0)  # that of libmfa's context
_BEFORE_WORKSPACE = 2 * 12  # numbers of mfa_buffers, two a buffer
_NO_TENSORS = (None,) * 6  # a forward pass has no d_out, d_lse, dQ, dK, dV and dbias, and no dsinks
_NO_ADDRESSES = (0,) * 6


class Forward(NamedTuple):
    """A prepared forward pass."""

    problem: bytes
    device: int
    extents: tuple[int, ...]  # tensors.extent of the Inputs up to LENGTHS
    itemsizes: tuple[int, int, int]  # of query, key and value
    others: tuple[int, ...] | None  # the extents from LENGTHS on; None if all of these are
    out: EmptyLayout
    rows: EmptyLayout  # of log-sum-exp
    low: EmptyLayout | None  # of out_low; None where out is not rounded


class Backward(NamedTuple):
    """A prepared backward pass."""

    problem: bytes
    device: int
    extents: tuple[int, ...]  # tensors.extent of the Inputs up to LENGTHS, out, lse, d_out and d_lse
    itemsizes: tuple[int, int]  # of query and what has its dtype, and of out
    others: tuple[int, ...] | None  # as in Forward
    wanted: tuple[bool, ...]  # which of dQ, dK, dV, dbias, dsinks
    gradients: tuple[EmptyLayout | None, ...]  # None where it is not wanted


def forward(
    inputs: InputsTuple, options: Options, with_lse: bool = True, allocate: Allocate = tensors.like
) -> tuple[Any, ...]:
    """(out, lse), or (out, None). `allocate(query, columns)` makes the memory of out."""
    return run_forward(prepare_forward(inputs, options, allocate), inputs, with_lse)


def forward_for_backward(inputs: InputsTuple, options: Options, allocate: Allocate = tensors.like) -> tuple[Any, ...]:
    """(out, lse), or where out is f16 or bf16 (out, lse, out_low), where out_low is what out lost by rounding."""
    return run_forward(prepare_forward(inputs, options, allocate), inputs, True, True)


def prepare_forward(inputs: InputsTuple, options: Options, allocate: Allocate = tensors.like) -> Forward:
    """The Forward of these Inputs. Raises as problem.check() does."""
    query, key, value, mask, sinks, slopes, seed, blocks, *others = inputs
    key_of_pass = (
        *(query.shape, query.stride(), query.dtype, query.device),
        *(key.shape, key.stride(), key.dtype, key.device),
        *(value.shape, value.stride(), value.dtype, value.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
        None if slopes is None else (slopes.shape, slopes.stride(), slopes.dtype, slopes.device),
        None if seed is None else (seed.shape, seed.stride(), seed.dtype, seed.device),
        None if blocks is None else (blocks.shape, blocks.stride(), blocks.dtype, blocks.device),
        *map(_signature, others),
        *(options, allocate),
    )
    cached = _cached(key_of_pass)
    if cached is not None:
        return cached
    check(inputs, options)
    if mask is not None:
        tensors.refuse_short_storage(attn_mask=mask)  # expand() in pack_forward() would not name the mask
    out = tensors.of_out_type(allocate(query, codes.columns(value, options.v_type)), options.out_type)
    rows = tensors.empty_rows(query)
    problem = pack_forward(inputs, options, out)
    extents = tuple(map(tensors.extent, inputs[:LENGTHS]))
    itemsizes = query.itemsize, key.itemsize, value.itemsize
    out_layout = tensors.empty_layout(out)
    layouts = out_layout, tensors.empty_layout(rows), out_layout if tensors.has_low(out) else None
    prepared = Forward(problem, tensors.device(query), extents, itemsizes, _other_extents(inputs), *layouts)
    return dispatch_cache.put(key_of_pass, prepared)


def run_forward(prepared: Forward, inputs: InputsTuple, with_lse: bool, with_low: bool = False) -> tuple[Any, ...]:
    """(out, lse), lse being None without `with_lse`; with `with_low`, where out is rounded, (out, lse, out_low)."""
    query, key, value, mask, sinks, slopes, seed, blocks = inputs[:LENGTHS]
    problem, device, extents, (q_size, k_size, v_size), of_others, out_layout, rows_layout, low_layout = prepared
    q_extent, k_extent, v_extent, mask_extent, *others = extents
    sinks_extent, slopes_extent, seed_extent, blocks_extent = others
    if (  # written out for speed
        _storage(query).nbytes() - _offset(query) * q_size < q_extent
        or _storage(key).nbytes() - _offset(key) * k_size < k_extent
        or _storage(value).nbytes() - _offset(value) * v_size < v_extent
        or (mask is not None and _storage(mask).nbytes() - _offset(mask) * mask.itemsize < mask_extent)
        or (sinks is not None and _storage(sinks).nbytes() - _offset(sinks) * 4 < sinks_extent)
        or (slopes is not None and _storage(slopes).nbytes() - _offset(slopes) * 4 < slopes_extent)
        or (seed is not None and _storage(seed).nbytes() - _offset(seed) * 8 < seed_extent)
        or (blocks is not None and _storage(blocks).nbytes() - _offset(blocks) < blocks_extent)
        or (of_others is not None and _are_short(inputs[LENGTHS:], of_others))
    ):
        tensors.refuse_short_storage(**Inputs._make(inputs)._asdict())
    out_low = None
    if device == DEVICE_CPU:
        out = _empty_on_cpu(*out_layout)
        lse = _empty_on_cpu(*rows_layout) if with_lse else None
        if with_low and low_layout is not None:
            out_low = _empty_on_cpu(*low_layout)
        buffers = _pack_bases(
            _BUFFERS_SIZE,
            _address(query),
            _address(key),
            _address(value),
            0 if mask is None else _address(mask),
            _address(out),
            0 if lse is None else _address(lse),
            *_NO_ADDRESSES,
            0 if out_low is None else _address(out_low),
            0 if slopes is None else _address(slopes),
            0 if sinks is None else _address(sinks),
            0,
            0 if seed is None else _address(seed),
            0 if blocks is None else _address(blocks),
        )
        if of_others is not None:
            buffers = _with_others(buffers, inputs[LENGTHS:])
        library().attention(problem, buffers)
    else:
        out = tensors.empty(query, out_layout)
        lse = tensors.empty(query, rows_layout) if with_lse else None
        if with_low:
            out_low = tensors.empty(query, low_layout)
        more = out_low, slopes, sinks, None, seed, blocks, *inputs[LENGTHS:]
        _launch_on_metal(problem, (*inputs[:4], out, lse, *_NO_TENSORS, *more))
    return (out, lse) if out_low is None else (out, lse, out_low)


def backward(operands: OperandsTuple, options: Options, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, dbias, dsinks), each None if not `wanted`. `operands`: problem.Operands, where d_out may be None
    for zeros."""
    inputs, out, lse, d_out, d_lse, out_low = operands
    d_out, d_lse = tensors.incoming(d_out, out, inputs[0].dtype), tensors.resolved(d_lse)
    operands = inputs, out, lse, d_out, d_lse, out_low
    if out_low is not None:
        check_saved(operands, options)
        if out_low.stride() != out.stride():  # hooks for saved tensors may have moved either
            operands = *operands[:5], out.new_empty_strided(out.shape, out.stride()).copy_(out_low)
    return run_backward(prepare_backward(operands, options, wanted), operands)


def prepare_backward(operands: OperandsTuple, options: Options, wanted: Sequence[bool]) -> Backward:
    """The Backward of these Operands. Raises as problem.check() and problem.check_saved() do."""
    inputs, out, lse, d_out, d_lse, _ = operands
    query, key, value, mask, sinks, slopes, seed, blocks, *others = inputs
    key_of_pass = (
        *(query.shape, query.stride(), query.dtype, query.device),
        *(key.shape, key.stride(), key.dtype, key.device),
        *(value.shape, value.stride(), value.dtype, value.device),
        *(out.shape, out.stride(), out.dtype, out.device),
        *(lse.shape, lse.stride(), lse.dtype, lse.device),
        *(d_out.shape, d_out.stride(), d_out.dtype, d_out.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        None if d_lse is None else (d_lse.shape, d_lse.stride(), d_lse.dtype, d_lse.device),
        None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
        None if slopes is None else (slopes.shape, slopes.stride(), slopes.dtype, slopes.device),
        None if seed is None else (seed.shape, seed.stride(), seed.dtype, seed.device),
        None if blocks is None else (blocks.shape, blocks.stride(), blocks.dtype, blocks.device),
        *map(_signature, others),
        *(options, *wanted),
    )
    cached = _cached(key_of_pass)
    if cached is not None:
        return cached
    check(inputs, options)
    check_saved(operands, options)
    if mask is not None:
        tensors.refuse_short_storage(attn_mask=mask)
    gradients = tensors.gradients(inputs, wanted, options.out_type)
    problem = pack_backward(operands, options, gradients)
    extents = tuple(map(tensors.extent, (*inputs[:LENGTHS], out, lse, d_out, d_lse)))
    layouts = tuple([tensors.empty_layout(gradient) for gradient in gradients])
    itemsizes, of_others = (query.itemsize, out.itemsize), _other_extents(inputs)
    prepared = Backward(problem, tensors.device(query), extents, itemsizes, of_others, tuple(wanted), layouts)
    return dispatch_cache.put(key_of_pass, prepared)


def run_backward(prepared: Backward, operands: OperandsTuple) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, dbias, dsinks), each None if the prepared pass does not want it."""
    problem, device, extents, (size, out_size), of_others, _, layouts = prepared
    inputs, out, lse, d_out, d_lse, out_low = operands
    query, key, value, mask, sinks, slopes, seed, blocks = inputs[:LENGTHS]
    q_extent, k_extent, v_extent, mask_extent, *others = extents
    sinks_extent, slopes_extent, seed_extent, blocks_extent, *others = others
    out_extent, lse_extent, d_out_extent, d_lse_extent = others
    if (
        _storage(query).nbytes() - _offset(query) * size < q_extent
        or _storage(key).nbytes() - _offset(key) * size < k_extent
        or _storage(value).nbytes() - _offset(value) * size < v_extent
        or _storage(out).nbytes() - _offset(out) * out_size < out_extent
        or _storage(d_out).nbytes() - _offset(d_out) * size < d_out_extent
        or _storage(lse).nbytes() - _offset(lse) * lse.itemsize < lse_extent
        or (mask is not None and _storage(mask).nbytes() - _offset(mask) * mask.itemsize < mask_extent)
        or (d_lse is not None and _storage(d_lse).nbytes() - _offset(d_lse) * d_lse.itemsize < d_lse_extent)
        or (out_low is not None and _storage(out_low).nbytes() - _offset(out_low) * out_size < out_extent)
        or (sinks is not None and _storage(sinks).nbytes() - _offset(sinks) * 4 < sinks_extent)
        or (slopes is not None and _storage(slopes).nbytes() - _offset(slopes) * 4 < slopes_extent)
        or (seed is not None and _storage(seed).nbytes() - _offset(seed) * 8 < seed_extent)
        or (blocks is not None and _storage(blocks).nbytes() - _offset(blocks) < blocks_extent)
        or (of_others is not None and _are_short(inputs[LENGTHS:], of_others))
    ):
        given = Inputs._make(inputs)._asdict()
        tensors.refuse_short_storage(**given, out=out, lse=lse, d_out=d_out, d_lse=d_lse, out_low=out_low)
    if device == DEVICE_CPU:
        dq, dk, dv, dbias, dsinks = gradients = [layout and _empty_on_cpu(*layout) for layout in layouts]
        buffers = _pack_bases(
            _BUFFERS_SIZE,
            _address(query),
            _address(key),
            _address(value),
            0 if mask is None else _address(mask),
            _address(out),
            _address(lse),
            _address(d_out),
            0 if d_lse is None else _address(d_lse),
            0 if dq is None else _address(dq),
            0 if dk is None else _address(dk),
            0 if dv is None else _address(dv),
            0 if dbias is None else _address(dbias),
            0 if out_low is None else _address(out_low),
            0 if slopes is None else _address(slopes),
            0 if sinks is None else _address(sinks),
            0 if dsinks is None else _address(dsinks),
            0 if seed is None else _address(seed),
            0 if blocks is None else _address(blocks),
        )
        if of_others is not None:
            buffers = _with_others(buffers, inputs[LENGTHS:])
        library().attention(problem, buffers)
    else:
        *gradients, dsinks = [tensors.empty(query, layout) for layout in layouts]
        more = out_low, slopes, sinks, dsinks, seed, blocks, *inputs[LENGTHS:]
        _launch_on_metal(problem, (*inputs[:4], out, lse, d_out, d_lse, *gradients, *more))
        gradients.append(dsinks)
    return tuple(gradients)


def _signature(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _other_extents(inputs: InputsTuple) -> tuple[int, ...] | None:
    """tensors.extent of the Inputs from LENGTHS on; None if all of these are."""
    others = inputs[LENGTHS:]
    return None if all(tensor is None for tensor in others) else tuple(map(tensors.extent, others))


def _are_short(others: Iterable[Tensor | None], extents: Iterable[int]) -> bool:
    """Whether one of these tensors, whose elements have 32 bits, has elements beyond its storage."""
    return any(
        tensor is not None and _storage(tensor).nbytes() - _offset(tensor) * 4 < extent
        for tensor, extent in zip(others, extents)
    )


def _with_others(buffers: bytes, others: Iterable[Tensor | None]) -> bytes:
    """mfa_buffers with the addresses of the Inputs from LENGTHS on, too."""
    addresses = (0 if tensor is None else _address(tensor) for tensor in others)
    return buffers[: -MORE_BASES.size] + MORE_BASES.pack(*addresses)


def _launch_on_metal(problem: bytes, buffers: Iterable[Tensor | None]) -> None:
    """Calls libmfa. `buffers`: a tensor for each of those of mfa_buffers, in its order and without the workspace; None
    where there is none."""
    numbers = [number for buffer in buffers for number in tensors.place_on_metal(buffer)]
    first, more = numbers[:_BEFORE_WORKSPACE], numbers[_BEFORE_WORKSPACE:]
    library().attention(problem, BUFFERS.pack(_BUFFERS_SIZE, *first, *_OWN_WORKSPACE, *more), STREAM_TORCH)
