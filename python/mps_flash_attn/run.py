"""Runs one forward or backward pass on libmfa: plain tensors in, new tensors out, nothing of autograd.

A pass is prepared, its operands checked and its problem packed, and then run. One of a kind that was met before (same
shapes, strides, dtypes and options) finds itself prepared.
"""

from typing import NamedTuple

import torch

from . import tensors
from .library import BASES, BUFFERS, DEVICE_CPU, STREAM_TORCH, library
from .problem import check, check_saved, pack_backward, pack_forward

_OWN_WORKSPACE = (0, 0, 0)  # of libmfa's context

_known = {}  # kind of pass: how it is prepared
_KNOWN_MOST = 1024  # a growing sequence is a new kind each time: then all is forgotten, and begins anew


class Forward(NamedTuple):
    """A forward pass, prepared."""

    problem: bytes
    device: int
    out: tuple  # shape and strides
    rows: tuple  # those of log-sum-exp
    rows_dtype: torch.dtype


class Backward(NamedTuple):
    """A backward pass, prepared."""

    problem: bytes
    device: int
    wanted: tuple  # which of dQ, dK, dV, dbias


def forward(query, key, value, mask, lower, upper, scale, softcap, with_lse=True, allocate=tensors.like):
    """(out, lse), or (out, None). The memory of out is as `allocate` gives it."""
    prepared = prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate)
    return run_forward(prepared, query, key, value, mask, with_lse)


def prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate=tensors.like):
    kind = (
        *(query.shape, query.stride(), query.dtype, query.device),
        *(key.shape, key.stride(), key.dtype, key.device),
        *(value.shape, value.stride(), value.dtype, value.device),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
        *(lower, upper, scale, softcap, allocate),
    )
    known = _known.get(kind)
    if known is not None:
        return known
    check(query, key, value, mask)
    out, rows = allocate(query, value.shape[3]), tensors.empty_rows(query)
    problem = pack_forward(query, key, value, mask, lower, upper, scale, softcap, out)
    layouts = (out.shape, out.stride()), (rows.shape, rows.stride())
    return _keep(kind, Forward(problem, tensors.device(query), *layouts, rows.dtype))


def run_forward(prepared, query, key, value, mask, with_lse):
    problem, device, out_layout, rows_layout, rows_dtype = prepared
    out = query.new_empty_strided(*out_layout)
    lse = query.new_empty_strided(*rows_layout, dtype=rows_dtype) if with_lse else None
    _run(problem, device, query, key, value, mask, out, lse)
    return out, lse


def backward(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted):
    """(dQ, dK, dV, dbias), each None if not wanted."""
    d_out, d_lse = tensors.incoming(d_out, out), tensors.resolved(d_lse)
    operands = query, key, value, mask, out, lse, d_out, d_lse
    return run_backward(prepare_backward(*operands, lower, upper, scale, softcap, wanted), *operands)


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
    known = _known.get(kind)
    if known is not None:
        return known
    check(query, key, value, mask)
    check_saved(query, value, out, lse, d_out, d_lse)
    options = lower, upper, scale, softcap
    gradients = map(tensors.gradient, (query, key, value, mask), wanted)
    problem = pack_backward(query, key, value, mask, *options, out, lse, d_out, d_lse, *gradients)
    return _keep(kind, Backward(problem, tensors.device(query), tuple(wanted)))


def run_backward(prepared, query, key, value, mask, out, lse, d_out, d_lse):
    problem, device, (wants_dq, wants_dk, wants_dv, wants_dbias) = prepared
    dq = torch.empty_like(query) if wants_dq else None
    dk = torch.empty_like(key) if wants_dk else None
    dv = torch.empty_like(value) if wants_dv else None
    dbias = torch.empty_like(mask) if wants_dbias else None
    _run(problem, device, query, key, value, mask, out, lse, d_out, d_lse, dq, dk, dv, dbias)
    return dq, dk, dv, dbias


def _keep(kind, prepared):
    if len(_known) >= _KNOWN_MOST:
        _known.clear()
    _known[kind] = prepared
    return prepared


def _run(problem, device, q, k, v, mask, o, lse, d_o=None, dlse=None, dq=None, dk=None, dv=None, dbias=None):
    """The operands in the order of mfa_buffers, None where there is none."""
    if device == DEVICE_CPU:
        address = tensors.address
        buffers = BASES.pack(  # written out: the shortest way
            BUFFERS.size,
            address(q),
            address(k),
            address(v),
            0 if mask is None else address(mask),
            address(o),
            0 if lse is None else address(lse),
            0 if d_o is None else address(d_o),
            0 if dlse is None else address(dlse),
            0 if dq is None else address(dq),
            0 if dk is None else address(dk),
            0 if dv is None else address(dv),
            0 if dbias is None else address(dbias),
        )
        library().attention(problem, buffers)
    else:
        operands = q, k, v, mask, o, lse, d_o, dlse, dq, dk, dv, dbias
        places = [number for operand in operands for number in tensors.place_on_metal(operand)]
        library().attention(problem, BUFFERS.pack(BUFFERS.size, *places, *_OWN_WORKSPACE), STREAM_TORCH)
