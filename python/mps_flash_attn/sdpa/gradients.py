"""The backward pass of the replaced scaled_dot_product_attention. libmfa computes the gradients; PyTorch's own operator
computes their derivatives, and the gradients where libmfa cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import transforms
from ..autograd import differentiated_by
from ..library import Unsupported
from ..operators import dropout_mask
from ..options import Options
from ..problem import DIFFERENTIABLE, SEED, OperandsTuple
from ..stats import count
from .original import dropped_attention


def backward(
    original: Callable[..., Any],
    run_backward: Callable[..., Sequence[Tensor | None]],
    operands: OperandsTuple,
    options: Options,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Route.backward, after `original` and `run_backward` are bound: by run_backward, or by PyTorch's `original` if
    there are tangents, or if there is no kernel, which is found out when the kernel is first needed."""
    reason = "forward-mode differentiation"
    if forward_ad._current_level < 0:
        try:
            if not torch.is_grad_enabled():
                return run_backward(operands, options, wanted)
            with differentiated_by(second=partial(_second, original)):
                return run_backward(operands, options, wanted)
        except Unsupported as error:
            reason = str(error)
    count(reason)
    inputs, _, _, d_out, _, _ = operands
    return _gradients(_forward(original, options, inputs[SEED]), (d_out, *inputs[:DIFFERENTIABLE]), wanted)


def _second(
    original: Callable[..., Any],
    incoming: Sequence[Tensor | None],
    operands: tuple[Tensor | None, ...],
    options: Options,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """As differentiated_by() describes it. `operands`: d_out and the inputs."""
    count("a second derivative")
    attend = _forward(original, options, operands[1 + SEED])
    operands = operands[: 1 + DIFFERENTIABLE]
    places = [place for place, tensor in enumerate(operands) if tensor is not None and tensor.requires_grad]
    present = [place for place, gradient in enumerate(incoming) if gradient is not None]

    def first(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _gradients(attend, operands, wanted)
        return tuple(gradients[place] for place in present)

    return _vjp(first, operands, places, tuple(incoming[place] for place in present))


def _forward(original: Callable[..., Any], options: Options, seed: Tensor | None) -> Callable[..., Any]:
    """The forward pass by PyTorch's operator, a function of the DIFFERENTIABLE inputs, of which it uses the first
    OF_SDPA; the others are None."""
    (seed,) = transforms.unwrap_dead_wrappers((seed,))

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: None) -> Any:
        keywords = {"scale": options.scale, "enable_gqa": query.shape[1] != key.shape[1]}
        is_causal = options.upper is not None
        if seed is None:
            return original(query, key, value, mask, 0.0, is_causal, **keywords)
        kept = dropout_mask(seed, *query.shape[1:3], key.shape[2], options.dropout)
        return dropped_attention(query, key, value, mask, options.dropout, is_causal, kept, **keywords)

    return attend


def _gradients(attend: Callable[..., Any], operands: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of attend(*DIFFERENTIABLE inputs); None where not wanted. `operands`: d_out and these inputs."""
    d_out, *inputs = operands
    places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
    return _vjp(attend, tuple(inputs), places, d_out)


def _vjp(
    function: Callable[..., Any], operands: tuple[Tensor | None, ...], places: Sequence[int], incoming: Any
) -> list[Tensor | None]:
    """The gradients of the operands in these places, None for the others, from `incoming`, those of the results. Within
    transforms of torch.func it uses torch.func.vjp, which handles their levels but not saved_tensors_hooks."""
    operands = transforms.unwrap_dead_wrappers(operands)
    inputs: list[Any] = [operands[place] for place in places]

    def function_of_inputs(*inputs: Tensor) -> Any:
        return function(*_with(operands, places, inputs))

    if transforms.are_active():
        pull_back = torch.func.vjp(function_of_inputs, *inputs)[1]
        found = pull_back(incoming)
    else:
        again = torch.is_grad_enabled()
        with torch.enable_grad():  # views, so that a tensor that was passed twice gets two gradients
            inputs = [one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in inputs]
            results = function_of_inputs(*inputs)
            found = torch.autograd.grad(results, inputs, incoming, create_graph=again, allow_unused=True)
    return _with((None,) * len(operands), places, found)


def _with(operands: Iterable[Any], places: Sequence[int], others: Iterable[Any]) -> list[Any]:
    """The operands as a list, with `others` in these places."""
    result = list(operands)
    for place, other in zip(places, others):
        result[place] = other
    return result
