"""What a score_mod or a mask_mod of flex_attention computes.

A score_mod is accepted if tracing it (score_trace.py) shows that it is

    gain * score                     or cap * tanh(gain * score / cap)
    + terms that do not depend on the score

where any function of indices and captured tensors may be a term, -inf of torch.where(condition, ..., -inf) included. So
the form is proved, not guessed. What the terms are worth is not taken from the trace: it is what the function itself
returns for a score of 0 (offset()), with the gradients that PyTorch gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transforms
from .library import Unsupported
from .score_trace import ACCEPTED, APPROXIMATIONS, INDICES, IndexByTensors, Score, Tracer, Value


class Form(NamedTuple):
    """What a score_mod computes."""

    gain: float
    softcap: float
    indices: frozenset[str]  # on which the terms depend
    terms: tuple[tuple[int, Value], ...] | None  # each with its sign; None: they are not known one by one


# --- The two functions that flex_attention has ---------------------------------------------------


def form_of(score_mod: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Form:
    """The form of a score_mod for scores of this dtype. Unsupported, with the operation, where it has another."""
    differentiates = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    tracer = Tracer("score_mod", differentiates)
    found = tracer.trace(score_mod, dtype)
    score = found.score
    if score is None:
        raise Unsupported(f"score_mod returns what does not depend on the score; {ACCEPTED}")
    if not (0 < score.gain < math.inf and 0 <= score.cap < math.inf):
        sign = f"the factor {score.gain:g}" + (f" and the cap {score.cap:g}" if score.cap else "")
        raise Unsupported(f"score_mod gives the score {sign}; both must be positive and finite")
    if differentiates:
        tracer.check_gradients()
    if tracer.approximates:
        _verify(score_mod, score, dtype, device, differentiates)
    terms = score.terms
    if terms and transforms.are_active():  # captured tensors may be those of a level that was not traced
        terms = None
    return Form(score.gain, score.cap, score.indices, terms)


def band_of(mask_mod: Callable[..., Any]) -> tuple[int | None, int | None, bool]:
    """(lower, upper, is_exact): a mask_mod is true only where lower <= kv - q <= upper, and, if the band is exact,
    wherever that holds. (None, None, False) where nothing is known."""
    try:
        found = Tracer("mask_mod", False).trace(mask_mod, None)
    except Exception:  # whatever is wrong with it shows where the mask is made
        return None, None, False
    return found.band or (None, None, False)


# --- What the terms are worth ---------------------------------------------------------------------


def offset(
    score_mod: Callable[..., Tensor], indices: frozenset[str], sizes: Sequence[int], dtype: torch.dtype, device: Any
) -> Tensor:
    """The terms that a score_mod adds, for all indices that they depend on: of four dimensions, 1 for each index on
    which they do not. `sizes`: of b, h, q and kv. Differentiable in what the score_mod has captured."""
    used = [name for name in INDICES if name in indices]
    every = {name: torch.arange(size, device=device) for name, size in zip(INDICES, sizes) if name in used}
    found = evaluate(score_mod, torch.zeros((), dtype=dtype, device=device), every, used)
    return found.reshape([size if name in used else 1 for name, size in zip(INDICES, sizes)])


def evaluate(score_mod: Callable[..., Tensor], score: Tensor, given: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """score_mod(score, b, h, q, kv), where each index is what is given for it, or 0; for every number of those that are
    named, which have one dimension each."""
    none = torch.zeros((), dtype=torch.int64, device=score.device)
    function = score_mod
    for name in reversed(names):
        function = torch.vmap(function, (None, *(0 if one == name else None for one in INDICES)))
    with IndexByTensors():
        return function(score, *(given.get(name, none) for name in INDICES))


def _verify(
    score_mod: Callable[..., Any], score: Score, dtype: torch.dtype, device: torch.device, differentiates: bool
) -> None:
    """Raises if an approximation of tanh, of which only the name is known, is not near it, or its derivative is not.
    This reads a few values, for which a GPU is waited for."""
    with torch.inference_mode(False), torch.set_grad_enabled(differentiates):
        x = torch.linspace(-3, 3, 13, dtype=dtype, device=device) * (score.cap / score.gain)
        samples = x.requires_grad_(differentiates)
        index = [torch.zeros((), dtype=torch.int64, device=device)] * len(INDICES)
        with IndexByTensors():
            both = [torch.vmap(score_mod, (0, None, None, None, None))(one, *index) for one in (samples, 0 * samples)]
        expected = torch.tanh(score.gain * samples / score.cap)
        difference = (both[0] - both[1]).detach() / score.cap - expected.detach()
        is_near = bool((difference.abs() < 2e-3).all())
        if differentiates and is_near:
            (slope,) = torch.autograd.grad(both[0].sum(), samples, allow_unused=True)
            is_near = slope is not None and bool(((slope / score.gain - 1 + expected.square()).abs() < 1e-2).all())
    if not is_near:
        raise Unsupported(f"score_mod applies {APPROXIMATIONS[0]} to the score, which is not near tanh; {ACCEPTED}")
