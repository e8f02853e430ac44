"""The autograd function of context_parallel_attention."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import tensors
from ..problem import Inputs, Operands
from . import ring


class ContextParallel(torch.autograd.Function):
    """(out, lse) of this rank's rows, differentiable once, of query, key, value, attn_mask, sinks and a ring.Call."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_call: Any) -> tuple[Tensor, Tensor]:
        *given, call = inputs_and_call
        inputs = Inputs(*given)
        wide, lse = ring.forward(inputs, call)
        out = wide.to(inputs.query.dtype)
        ctx.save_for_backward(*given, wide if call.kernels.has_low else out, lse)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        return (*_Gradients.apply(d_out, d_lse, *ctx.saved_tensors, ctx.call), None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_tangents()


class _Gradients(torch.autograd.Function):
    """The gradients, as a function of which autograd knows that it has no derivative."""

    @staticmethod
    def forward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *saved_and_call: Any) -> Any:
        *given, out, lse, call = saved_and_call
        inputs = Inputs(*given)
        if d_lse is not None and not call.kernels.has_lse_gradient:
            raise NotImplementedError(
                f"lse has no gradient on {lse.device.type}; on the CPU and on mps it has, or take lse.detach()"
            )
        d_out = tensors.incoming(d_out, inputs.query.new_empty(1).expand(out.shape))
        return ring.backward(Operands(inputs, out, lse, d_out, tensors.resolved(d_lse)), call)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "context_parallel_attention has no second derivative; on one process "
            "scaled_dot_product_attention with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) has one"
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_tangents()


def _refuse_tangents() -> NoReturn:
    raise NotImplementedError(
        "context_parallel_attention has no forward-mode differentiation (jvp, jacfwd, hessian); use reverse mode"
    )
