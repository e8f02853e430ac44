"""Runs one forward or backward pass on libmfa: plain tensors in, new tensors out, nothing of autograd.

A pass is prepared, its operands checked and its problem packed, and then run. One of a kind that was met before (same
shapes, strides, dtypes and options) finds itself prepared.
"""

from typing import NamedTuple

from . import tensors
from .library import BASES, BUFFERS, DEVICE_CPU, STREAM_TORCH, library
from .problem import check, check_saved, pack_backward, pack_forward

# By names of our own: each step on the way to one costs in every call.
_storage, _offset, _address, _empty_on_cpu = tensors.storage, tensors.offset, tensors.address, tensors.empty_on_cpu

_OWN_WORKSPACE = (0, 0, 0)  # of libmfa's context

_prepared = {}  # kind of pass: how it is prepared
_MAX_PREPARED = 1024  # a growing sequence is a new kind each time: then all is forgotten, and begins anew


class Forward(NamedTuple):
    """A forward pass, prepared."""

    problem: bytes
    device: int
    extents: tuple  # tensors.extent of query, key, value and mask
    itemsize: int
    out: tuple  # shape, strides and dtype
    rows: tuple  # those of log-sum-exp
    low: tuple  # those of out_low; None where out is not rounded


class Backward(NamedTuple):
    """A backward pass, prepared."""

    problem: bytes
    device: int
    extents: tuple  # tensors.extent of query, key, value, mask, out, lse, d_out and d_lse
    itemsize: int
    wanted: tuple  # which of dQ, dK, dV, dbias
    gradients: tuple  # shape, strides and dtype of each; None where it is not wanted


def forward(query, key, value, mask, lower, upper, scale, softcap, with_lse=True, allocate=tensors.like):
    """(out, lse), or (out, None). The memory of out is as `allocate` gives it."""
    prepared = prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate)
    return run_forward(prepared, query, key, value, mask, with_lse)


def forward_for_backward(query, key, value, mask, lower, upper, scale, softcap, allocate=tensors.like):
    """(out, lse), or in f16 and bf16 (out, lse, out_low), where out_low is what rounding took off out."""
    prepared = prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate)
    return run_forward(prepared, query, key, value, mask, True, True)


def prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate=tensors.like):
    kind = (
        *(query.shape, query.stride(), query.dtype, query.device),
        *(key.shape, key.stride(), key.dtype, key.device),
        *(value.shape, value.stride(), value.dtype, value.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        *(lower, upper, scale, softcap, allocate),
    )
    cached = _prepared.get(kind)
    if cached is not None:
        return cached
    check(query, key, value, mask)
    out, rows = allocate(query, value.shape[3]), tensors.empty_rows(query)
    problem = pack_forward(query, key, value, mask, lower, upper, scale, softcap, out)
    extents = tuple(map(tensors.extent, (query, key, value, mask)))
    layouts = tensors.empty_layout(out), tensors.empty_layout(rows), None
    if tensors.has_low(query):
        layouts = *layouts[:2], layouts[0]
    return _keep(kind, Forward(problem, tensors.device(query), extents, query.itemsize, *layouts))


def run_forward(prepared, query, key, value, mask, with_lse, with_low=False):
    problem, device, (q_extent, k_extent, v_extent, mask_extent), size, out_layout, rows_layout, low_layout = prepared
    if (  # written out: the shortest way
        _storage(query).nbytes() - _offset(query) * size < q_extent
        or _storage(key).nbytes() - _offset(key) * size < k_extent
        or _storage(value).nbytes() - _offset(value) * size < v_extent
        or (mask is not None and _storage(mask).nbytes() - _offset(mask) * mask.itemsize < mask_extent)
    ):
        tensors.refuse_short_storage(query=query, key=key, value=value, attn_mask=mask)
    if device == DEVICE_CPU:
        out = _empty_on_cpu(*out_layout)
        lse = _empty_on_cpu(*rows_layout) if with_lse else None
    else:
        out = tensors.empty(query, out_layout)
        lse = tensors.empty(query, rows_layout) if with_lse else None
    if low_layout is None or not with_low:
        _run(problem, device, query, key, value, mask, out, lse)
        return out, lse
    out_low = _empty_on_cpu(*low_layout) if device == DEVICE_CPU else tensors.empty(query, low_layout)
    _run(problem, device, query, key, value, mask, out, lse, o_low=out_low)
    return out, lse, out_low


def backward(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted, out_low=None):
    """(dQ, dK, dV, dbias), each None if not wanted. out_low: as forward_for_backward gave it, or None."""
    d_out, d_lse = tensors.incoming(d_out, out), tensors.resolved(d_lse)
    if out_low is not None:
        check_saved(query, value, out, lse, d_out, d_lse, out_low)
        if out_low.stride() != out.stride():  # hooks for saved tensors may have moved either
            out_low = out.new_empty_strided(out.shape, out.stride()).copy_(out_low)
    operands = query, key, value, mask, out, lse, d_out, d_lse
    return run_backward(prepare_backward(*operands, lower, upper, scale, softcap, wanted), *operands, out_low)


def prepare_backward(query, key, value, mask, out, lse, d_out, d_lse, lower, upper, scale, softcap, wanted):
    kind = (
        *(query.shape, query.stride(), query.dtype, query.device),
        *(key.shape, key.stride(), key.dtype, key.device),
        *(value.shape, value.stride(), value.dtype, value.device),
        *(out.shape, out.stride(), out.dtype, out.device),
        *(lse.shape, lse.stride(), lse.dtype, lse.device),
        *(d_out.shape, d_out.stride(), d_out.dtype, d_out.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        None if d_lse is None else (d_lse.shape, d_lse.stride(), d_lse.dtype, d_lse.device),
        *(lower, upper, scale, softcap, *wanted),
    )
    cached = _prepared.get(kind)
    if cached is not None:
        return cached
    check(query, key, value, mask)
    check_saved(query, value, out, lse, d_out, d_lse)
    options = lower, upper, scale, softcap
    gradients = tuple(map(tensors.gradient, (query, key, value, mask), wanted))
    problem = pack_backward(query, key, value, mask, *options, out, lse, d_out, d_lse, *gradients)
    extents = tuple(map(tensors.extent, (query, key, value, mask, out, lse, d_out, d_lse)))
    layouts = tuple(map(tensors.empty_layout, gradients))
    return _keep(kind, Backward(problem, tensors.device(query), extents, query.itemsize, tuple(wanted), layouts))


def run_backward(prepared, query, key, value, mask, out, lse, d_out, d_lse, out_low=None):
    problem, device, extents, size, _, layouts = prepared
    q_extent, k_extent, v_extent, mask_extent, out_extent, lse_extent, d_out_extent, d_lse_extent = extents
    if (
        _storage(query).nbytes() - _offset(query) * size < q_extent
        or _storage(key).nbytes() - _offset(key) * size < k_extent
        or _storage(value).nbytes() - _offset(value) * size < v_extent
        or _storage(out).nbytes() - _offset(out) * size < out_extent
        or _storage(d_out).nbytes() - _offset(d_out) * size < d_out_extent
        or _storage(lse).nbytes() - _offset(lse) * lse.itemsize < lse_extent
        or (mask is not None and _storage(mask).nbytes() - _offset(mask) * mask.itemsize < mask_extent)
        or (d_lse is not None and _storage(d_lse).nbytes() - _offset(d_lse) * d_lse.itemsize < d_lse_extent)
        or (out_low is not None and _storage(out_low).nbytes() - _offset(out_low) * size < out_extent)
    ):
        saved = {"query": query, "key": key, "value": value, "attn_mask": mask, "out": out, "lse": lse}
        tensors.refuse_short_storage(**saved, d_out=d_out, d_lse=d_lse, out_low=out_low)
    if device == DEVICE_CPU:
        gradients = [layout and _empty_on_cpu(*layout) for layout in layouts]
    else:
        gradients = [tensors.empty(query, layout) for layout in layouts]
    _run(problem, device, query, key, value, mask, out, lse, d_out, d_lse, *gradients, out_low)
    return tuple(gradients)


def _keep(kind, prepared):
    if len(_prepared) >= _MAX_PREPARED:
        _prepared.clear()
    _prepared[kind] = prepared
    return prepared


def _run(
    problem, device, q, k, v, mask, o, lse, d_o=None, dlse=None, dq=None, dk=None, dv=None, dbias=None, o_low=None
):
    """The operands in the order of mfa_buffers, None where there is none."""
    if device == DEVICE_CPU:
        buffers = BASES.pack(
            BUFFERS.size,
            _address(q),
            _address(k),
            _address(v),
            0 if mask is None else _address(mask),
            _address(o),
            0 if lse is None else _address(lse),
            0 if d_o is None else _address(d_o),
            0 if dlse is None else _address(dlse),
            0 if dq is None else _address(dq),
            0 if dk is None else _address(dk),
            0 if dv is None else _address(dv),
            0 if dbias is None else _address(dbias),
            0 if o_low is None else _address(o_low),
        )
        library().attention(problem, buffers)
    else:
        operands = q, k, v, mask, o, lse, d_o, dlse, dq, dk, dv, dbias
        places = [number for operand in operands for number in tensors.place_on_metal(operand)]
        low = tensors.place_on_metal(o_low)
        library().attention(problem, BUFFERS.pack(BUFFERS.size, *places, *_OWN_WORKSPACE, *low), STREAM_TORCH)
