"""The autograd function of context_parallel_attention."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import tensors
from ..problem import DIFFERENTIABLE, Inputs
from . import all_to_all, ring

METHODS: dict[str, Any] = {"ring": ring, "all_to_all": all_to_all}  # modules with a forward and a backward


class ContextParallel(torch.autograd.Function):
    """(out, lse) of this rank's rows, differentiable once, of query, key, value, attn_mask, sinks and a Call."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_call: Any) -> tuple[Tensor, Tensor]:
        *given, call = inputs_and_call
        out, lse, saved = METHODS[call.method].forward(Inputs(*given), call)
        ctx.save_for_backward(*given, *saved)
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
        given, saved, call = saved_and_call[:DIFFERENTIABLE], saved_and_call[DIFFERENTIABLE:-1], saved_and_call[-1]
        inputs = Inputs(*given)
        if d_lse is not None and not call.kernels.has_lse_gradient:
            raise NotImplementedError(
                f"lse has no gradient on {d_lse.device.type}; on the CPU and on mps it has, or take lse.detach()"
            )
        shape = *inputs.query.shape[:3], inputs.value.shape[3]
        d_out = tensors.incoming(d_out, inputs.query.new_empty(1).expand(shape))
        return METHODS[call.method].backward(inputs, saved, d_out, tensors.resolved(d_lse), call)

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
