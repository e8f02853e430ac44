"""The autograd function of attention, the rules of the operators for autograd, and cached calls.

Eager calls do not go through the dispatcher, which costs more time than a small problem takes. They and the operators
share one autograd function, `Attention`, and differ in the Route that it gets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch_cache, run, tensors, transforms
from .dispatch_cache import CacheEntry
from .library import Unsupported
from .operators import attention_backward, attention_forward, registration, run_backward_operator
from .options import Options
from .problem import DIFFERENTIABLE, NO_MORE, Inputs, InputsTuple, OperandsTuple, refuse_gradients
from .subclasses import load_rules
from .transforms import below, beneath_autograd, count_of_modes, needs_operator

_INPUTS = len(Inputs._fields)
_NO_GRADIENTS = (None,) * (_INPUTS - DIFFERENTIABLE)  # of the other inputs


# --- The function --------------------------------------------------------------------------------


class Route(NamedTuple):
    """How a Call reaches libmfa."""

    forward: Callable[..., tuple[Any, ...]]  # (Inputs, options) -> (out, lse) or (out, lse, out_low)
    # (Operands, options, wanted) -> gradients of the DIFFERENTIABLE inputs, None where not wanted
    backward: Callable[..., Sequence[Tensor | None]]


class Call(NamedTuple):
    """The parameters of `Attention` that are not tensors."""

    route: Route
    options: Options
    with_lse: bool

    def forward(self, inputs: InputsTuple) -> tuple[Any, ...]:
        return self.route.forward(inputs, self.options)

    def backward(self, operands: OperandsTuple, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        if self.options.out_type is not None:  # PyTorch gives the gradient of out in the dtype of out
            inputs, out, lse, d_out, d_lse, out_low = operands
            operands = inputs, out, lse, d_out.to(inputs[0].dtype), d_lse, out_low
        return self.route.backward(operands, self.options, wanted)


class Attention(transforms.Function):
    """out, or (out, lse), differentiable once. It has few arguments and results, since each costs time. `call` is a
    Call or a CachedCall."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_call: Any) -> Any:
        *inputs, call = inputs_and_call
        out, lse, *low = call.forward(tuple(inputs))
        ctx.save_for_backward(*inputs, out, lse, *low)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return (out, lse) if call.with_lse else out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None = None) -> Any:
        saved = ctx.saved_tensors
        inputs, (out, lse, *low) = saved[:_INPUTS], saved[_INPUTS:]
        if d_out is None:
            d_out = tensors.incoming(None, out)
        operands = inputs, out, lse, d_out, d_lse, low[0] if low else None  # as in Operands
        return (*ctx.call.backward(operands, ctx.needs_input_grad[:DIFFERENTIABLE]), *_NO_GRADIENTS, None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_tangents()


class _Gradients(transforms.Function):
    """The gradients as a differentiable function, its arguments those of attention_backward. Without it autograd would
    take the gradients for constants, and a second derivative would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, operator: Any, second: Any, d_out: Tensor, *others: Any) -> Any:
        ctx.save_for_backward(d_out, *others[1 : 1 + _INPUTS])
        ctx.set_materialize_grads(False)
        ctx.second, ctx.options = second, others[1 + _INPUTS + 2 :]  # after d_lse, the inputs, out and lse
        return operator(d_out, *others)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> Any:
        found = [None] * (1 + DIFFERENTIABLE)  # of d_out and the inputs
        if any(gradient is not None for gradient in incoming):
            *options, wanted = ctx.options
            found = ctx.second(incoming, ctx.saved_tensors, Options(*options), wanted)
        d_out, *inputs = found
        return None, None, d_out, None, *inputs, *_NO_GRADIENTS, None, None, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_tangents()


def _refuse_second(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "flash_attention has no second derivative; for that use scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def _refuse_tangents() -> NoReturn:
    raise NotImplementedError(
        "flash_attention has no forward-mode differentiation (jvp, jacfwd, hessian); use reverse mode (grad, vjp, "
        "jacrev), or scaled_dot_product_attention with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def is_differentiated(*operands: Tensor | None) -> bool:
    """Whether autograd has to record the call. In forward mode it always has to: `Attention` then raises for a tangent,
    which would be lost otherwise."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in operands:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _eager_backward(operands: OperandsTuple, options: Options, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    _, _, _, d_out, d_lse, _ = operands
    incoming = (d_out,) if d_lse is None else (d_out, d_lse)
    # The operator is needed under a tracer, for a second derivative, for a tangent and for a batch of gradients.
    is_recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if torch.compiler.is_compiling() or is_recorded or needs_operator(*incoming):
        return run_backward_operator(operands, options, wanted)
    return run.backward(operands, options, wanted)


EAGER = Route(run.forward_for_backward, _eager_backward)


# --- Rules of the operators ----------------------------------------------------------------------


class _Rules(threading.local):
    """How the operators are differentiated in calls made by this thread."""

    def __init__(self) -> None:
        self.backward: Callable[..., Any] = run_backward_operator  # of attention_forward, see Route
        self.second: Callable[..., Any] = _refuse_second  # of attention_backward, see differentiated_by()


_rules = _Rules()
_NO_CHANGE = contextlib.nullcontext()


@contextlib.contextmanager
def differentiated_by(
    backward: Callable[..., Any] = run_backward_operator, second: Callable[..., Any] = _refuse_second
) -> Iterator[None]:
    """In the block attention_forward is differentiated by `backward`, as in a Route, and the gradients that
    attention_backward returns by `second`: (incoming, (d_out, *inputs), options, wanted) -> gradients of d_out and of
    the DIFFERENTIABLE inputs. `incoming` are the gradients of dQ, dK, dV, dbias and dsinks, None where there is
    none."""
    outer = _rules.backward, _rules.second
    _rules.backward, _rules.second = backward, second
    try:
        yield
    finally:
        _rules.backward, _rules.second = outer


def _last_level() -> contextlib.AbstractContextManager[None]:
    """A context that resets the rules in the last level that they are meant for: hooks and modes may make other calls
    of attention from there."""
    if transforms.are_active() or (_rules.backward is run_backward_operator and _rules.second is _refuse_second):
        return _NO_CHANGE
    return differentiated_by()


def _visible_forward(operator: Callable[..., Any], inputs: InputsTuple, options: Options) -> tuple[Tensor, ...]:
    """Route.forward through the dispatcher, by an operator that below() returned while gradients were still on. Under
    modes it returns zeros for out_low, to save as many tensors as EAGER does: a checkpoint may have run forward by one
    of the two routes and recompute it by the other."""
    out, lse = operator(*inputs, *options)
    if tensors.has_low(out) and tensors.is_plain(out) and not torch.compiler.is_compiling():
        return out, lse, torch.zeros_like(out)
    return out, lse


def _forward_with_autograd(*arguments: Any) -> Any:
    backward = _rules.backward
    with _last_level():
        inputs, options = arguments[:_INPUTS], Options(*arguments[_INPUTS:])
        load_rules(*inputs)
        if is_differentiated(*inputs):
            refuse_gradients(inputs, options)
            route = Route(partial(_visible_forward, below(attention_forward)), backward)
            return transforms.apply(Attention, *inputs, Call(route, options, True))
        return beneath_autograd(attention_forward, *arguments)


def _backward_with_autograd(*arguments: Any) -> Any:
    second = _rules.second
    with _last_level():
        if is_differentiated(*arguments[: 2 + _INPUTS + 2]):  # d_out, d_lse, the inputs, out, lse
            return transforms.apply(_Gradients, below(attention_backward), second, *arguments)
        return beneath_autograd(attention_backward, *arguments)


registration.impl("attention_forward", _forward_with_autograd, "Autograd")
registration.impl("attention_backward", _backward_with_autograd, "Autograd")


# --- Cached calls --------------------------------------------------------------------------------

_apply = Attention.apply  # a global name: each attribute lookup costs time in every call


class CachedCall(CacheEntry):
    """Runs attention on tensors like those of an earlier call. It is the `call` of Attention, too."""

    def __init__(
        self,
        matches: Callable[..., bool],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        call: Call,
        allocate: Callable[[Tensor, int], Tensor] = tensors.like,
    ) -> None:
        super().__init__(matches)
        self.call, self.with_lse = call, call.with_lse
        self.is_differentiated = is_differentiated(query, key, value, mask)
        self.prepared = run.prepare_forward((query, key, value, mask, *NO_MORE), call.options, allocate)
        self.cached_backward: tuple[Callable[..., bool], run.Backward] | None = None  # with the guard of its tensors
        self.backward_misses = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        """out, or (out, lse)."""
        if self.is_differentiated:
            return _apply(query, key, value, mask, *NO_MORE, self)
        out, lse = run.run_forward(self.prepared, (query, key, value, mask, *NO_MORE), self.with_lse)
        return (out, lse) if self.with_lse else out

    def forward(self, inputs: InputsTuple) -> tuple[Any, ...]:
        return run.run_forward(self.prepared, inputs, True, True)

    def backward(self, operands: OperandsTuple, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        (query, key, value, mask, *_), out, lse, d_out, d_lse, out_low = operands
        is_plain = d_lse is None and mask is None and forward_ad._current_level < 0
        if is_plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or count_of_modes()):
            present: tuple[Tensor, ...] = (query, key, value, out, lse, d_out)
            if out_low is not None:
                present += (out_low,)
            cached = self.cached_backward
            if cached is not None and cached[0](*present) and cached[1].wanted == wanted:
                self.backward_misses = 0
                try:
                    return run.run_backward(cached[1], operands)
                except Unsupported:  # a kernel is looked up when it is first needed, and may not be found
                    return self.call.backward(operands, wanted)
            self.backward_misses += 1
            if cached is None or self.backward_misses > dispatch_cache.MAX_MISSES:
                self._cache_backward(present, operands, wanted)
        return self.call.backward(operands, wanted)

    def _cache_backward(self, present: tuple[Tensor, ...], operands: OperandsTuple, wanted: Sequence[bool]) -> None:
        _, out, _, _, _, out_low = operands
        if out_low is not None and out_low.stride() != out.stride():
            return
        matches = None if needs_operator(*present) else dispatch_cache.guard(*present)
        if matches is not None:
            self.cached_backward = matches, run.prepare_backward(operands, self.call.options, wanted)
