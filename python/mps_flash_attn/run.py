"""Runs one forward or backward pass on libmfa: plain tensors in, new tensors out, nothing of autograd.

A call of a kind that was met before (same shapes, strides, dtypes and options) finds its problem checked and packed.
"""

import torch

from . import tensors
from .library import BUFFERS, library
from .problem import check, check_saved, pack_backward, pack_forward

_NO_BUFFERS = (0,) * 15
_OWN_WORKSPACE = (0, 0, 0)  # of libmfa's context

_known = {}  # kind of call: (packed problem, shape of out, its strides)
_KNOWN_MOST = 1024  # a growing sequence is a new kind each time: then all is forgotten, and begins anew


def forward(query, key, value, mask, lower, upper, scale, softcap, with_lse=True, contiguous=False):
    """(out, lse), or (out, None). The memory of out is ordered like the query's, or else contiguous."""
    kind = (
        *(query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride()),
        *(query.dtype, key.dtype, value.dtype, query.device, key.device, value.device),
        *(lower, upper, scale, softcap, contiguous),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device),
    )
    found = _known.get(kind)
    if found is None:
        found = _prepare(query, key, value, mask, lower, upper, scale, softcap, contiguous)
        if len(_known) >= _KNOWN_MOST:
            _known.clear()
        _known[kind] = found
    problem, shape, stride = found
    address = tensors.address
    out = torch.empty_strided(shape, stride, dtype=query.dtype, device=query.device)
    lse = tensors.empty_rows(query) if with_lse else None
    library().attention(
        problem,
        BUFFERS.pack(
            BUFFERS.size,
            address(query),
            0,
            address(key),
            0,
            address(value),
            0,
            0 if mask is None else address(mask),
            0,
            address(out),
            0,
            0 if lse is None else address(lse),
            0,
            *_NO_BUFFERS,
        ),
    )
    return out, lse


def _prepare(query, key, value, mask, lower, upper, scale, softcap, contiguous):
    check(query, key, value, mask)
    out = tensors.dense(query, value.shape[3]) if contiguous else tensors.like(query, value.shape[3])
    return pack_forward(query, key, value, mask, lower, upper, scale, softcap, out), out.shape, out.stride()


def backward(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted):
    """(dQ, dK, dV, dbias), each None if not wanted."""
    check(query, key, value, mask)
    check_saved(query, value, out, lse, d_out, d_lse)
    d_out, d_lse = tensors.incoming(d_out, out), tensors.resolved(d_lse)
    dq, dk, dv, dbias = map(tensors.gradient, (query, key, value, mask), wanted)
    pointer = tensors.pointer
    library().attention(
        pack_backward(
            *(query, key, value, mask, lower, upper, scale, softcap),
            *(out, lse, d_out, d_lse, dq, dk, dv, dbias),
        ),
        BUFFERS.pack(
            BUFFERS.size,
            *(pointer(query), 0),
            *(pointer(key), 0),
            *(pointer(value), 0),
            *(pointer(mask), 0),
            *(pointer(out), 0),
            *(pointer(lse), 0),
            *(pointer(d_out), 0),
            *(pointer(d_lse), 0),
            *(pointer(dq), 0),
            *(pointer(dk), 0),
            *(pointer(dv), 0),
            *(pointer(dbias), 0),
            *_OWN_WORKSPACE,
        ),
    )
    return dq, dk, dv, dbias
