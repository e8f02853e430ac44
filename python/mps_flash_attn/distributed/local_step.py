"""One pair of queries and keys on one device, forward and backward, the results in float32 (float64 for float64): by
libmfa on the CPU and on mps, by PyTorch's own operators on CUDA (cuda.py). And how results of a query are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import calls, run, tensors
from ..options import Options
from ..problem import Inputs, InputsTuple, Operands


class Kernels(NamedTuple):
    """What computes a pair. It gets neither sinks nor dropout."""

    forward: Callable[[Inputs, Options], tuple[Tensor, Tensor]]  # (out, lse)
    # (dQ, dK, dV, dbias), each None if not `wanted`: the part of these keys, out and lse being those of all keys
    backward: Callable[[Operands, Options, Sequence[bool]], tuple[Any, ...]]
    has_low: bool  # whether backward gains from an `out` that is not rounded to the operands' dtype
    has_lse_gradient: bool


def choose(inputs: InputsTuple, options: Options) -> Kernels:
    """What computes pairs of such inputs, of any lengths. Raises where nothing does, as flash_attention does. The mask
    has one column, or as many as there are keys."""
    if inputs[0].device.type == "cuda":
        from . import cuda

        return cuda.choose(inputs, options)
    calls.check(inputs, _wide(inputs[0], options), by_operator=False)
    return _LIBMFA


def _forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    out, lse = run.forward(inputs, _wide(inputs.query, options))
    return out, lse


def _backward(operands: Operands, options: Options, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return run.backward(operands, _wide(operands.inputs.query, options), (*wanted, False))[:4]


_LIBMFA = Kernels(_forward, _backward, has_low=True, has_lse_gradient=True)


def _wide(query: Tensor, options: Options) -> Options:
    """The Options with results in float32, where they would be rounded to less."""
    return options._replace(out_type="f32") if tensors.has_low(query) else options


# --- Merging -------------------------------------------------------------------------------------


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds the keys of a part to what `out` and `lse` are of others, in place. lse is -inf where there are no keys."""
    total = torch.logaddexp(lse, part_lse)
    finite = total.masked_fill(total == -torch.inf, 0)
    out.mul_((lse - finite).exp_()[..., None]).addcmul_(part, (part_lse - finite).exp_()[..., None])
    lse.copy_(total)


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """The same of sinks (B, H), each the logit of one key without a value."""
    total = torch.logaddexp(lse, sinks[..., None].to(lse.dtype))
    total.masked_fill_(total == torch.inf, torch.nan)  # as on one process
    out.mul_((lse - total.masked_fill(total == -torch.inf, 0)).exp_()[..., None])
    lse.copy_(total)


def sinks_gradient(sinks: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """dsinks, summed over these queries. `out` and `lse`: with the sinks."""
    weights = (sinks[..., None].to(lse.dtype) - lse.masked_fill(lse == -torch.inf, 0)).exp_()
    incoming = -(d_out.to(lse.dtype) * out.to(lse.dtype)).sum(3)
    return (weights * (incoming if d_lse is None else incoming + d_lse)).sum(2).to(sinks.dtype)
