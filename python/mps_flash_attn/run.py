"""Runs one forward or backward pass on libmfa: plain tensors in, new tensors out, nothing of autograd.

A call of a kind that was met before (same shapes, strides, dtypes and options) finds its problem checked and packed.
"""

from . import tensors
from .library import BASES, BUFFERS, DEVICE_CPU, STREAM_TORCH, library
from .problem import check, check_saved, pack_backward, pack_forward

_OWN_WORKSPACE = (0, 0, 0)  # of libmfa's context
_NO_GRADIENTS = (None,) * 6
_NO_BASES = (0,) * 6

_known = {}  # kind of call: what _prepare_forward or _prepare_backward gave
_KNOWN_MOST = 1024  # a growing sequence is a new kind each time: then all is forgotten, and begins anew


def forward(query, key, value, mask, lower, upper, scale, softcap, with_lse=True, allocate=tensors.like):
    """(out, lse), or (out, None). The memory of out is as `allocate` gives it."""
    layouts = query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride()
    types = query.dtype, key.dtype, value.dtype, query.device, key.device, value.device
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.device)
    kind = layouts, types, of_mask, lower, upper, scale, softcap, allocate
    found = _known.get(kind)
    if found is None:
        found = _keep(kind, _prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate))
    problem, device, shape, stride = found
    out = query.new_empty_strided(shape, stride)
    lse = tensors.empty_rows(query) if with_lse else None
    if device != DEVICE_CPU:
        _run(problem, device, query, key, value, mask, out, lse, *_NO_GRADIENTS)
        return out, lse
    address = tensors.address
    library().attention(
        problem,
        BASES.pack(  # the shortest way
            BUFFERS.size,
            address(query),
            address(key),
            address(value),
            0 if mask is None else address(mask),
            address(out),
            0 if lse is None else address(lse),
            *_NO_BASES,
        ),
    )
    return out, lse


def _keep(kind, prepared):
    if len(_known) >= _KNOWN_MOST:
        _known.clear()
    _known[kind] = prepared
    return prepared


def _prepare_forward(query, key, value, mask, lower, upper, scale, softcap, allocate):
    """(packed problem, code of the device, shape of out, its strides)."""
    check(query, key, value, mask)
    out = allocate(query, value.shape[3])
    problem = pack_forward(query, key, value, mask, lower, upper, scale, softcap, out)
    return problem, tensors.device(query), out.shape, out.stride()


def backward(d_out, d_lse, query, key, value, mask, out, lse, lower, upper, scale, softcap, wanted):
    """(dQ, dK, dV, dbias), each None if not wanted."""
    d_out, d_lse = tensors.incoming(d_out, out), tensors.resolved(d_lse)
    always = query, key, value, out, lse, d_out
    kind = [(t.shape, t.stride(), t.dtype, t.device) for t in always]
    kind += [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (mask, d_lse)]
    kind = (*kind, lower, upper, scale, softcap, *wanted)
    dq, dk, dv, dbias = map(tensors.gradient, (query, key, value, mask), wanted)
    operands = query, key, value, mask, out, lse, d_out, d_lse, dq, dk, dv, dbias
    found = _known.get(kind)
    if found is None:
        found = _keep(kind, _prepare_backward(lower, upper, scale, softcap, *operands))
    _run(*found, *operands)
    return dq, dk, dv, dbias


def _prepare_backward(lower, upper, scale, softcap, query, key, value, mask, out, lse, d_out, d_lse, *gradients):
    """(packed problem, code of the device)."""
    check(query, key, value, mask)
    check_saved(query, value, out, lse, d_out, d_lse)
    options = lower, upper, scale, softcap
    problem = pack_backward(query, key, value, mask, *options, out, lse, d_out, d_lse, *gradients)
    return problem, tensors.device(query)


def _run(problem, device, *operands):
    """The operands in the order of mfa_buffers, None where there is none."""
    if device == DEVICE_CPU:
        address = tensors.address
        bases = [0 if operand is None else address(operand) for operand in operands]
        library().attention(problem, BASES.pack(BUFFERS.size, *bases))
    else:
        places = [number for operand in operands for number in tensors.place_on_metal(operand)]
        library().attention(problem, BUFFERS.pack(BUFFERS.size, *places, *_OWN_WORKSPACE), STREAM_TORCH)
