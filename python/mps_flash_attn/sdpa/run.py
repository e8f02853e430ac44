"""Runs a call of scaled_dot_product_attention on libmfa: cached, eager, or through the operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import dispatch_cache, tensors
from ..autograd import EAGER, Attention, CachedCall, Call, Route, differentiated_by, is_differentiated
from ..dispatch_cache import CacheEntry
from ..dropout import draw
from ..library import Unsupported
from ..operators import attention_forward, run_backward_operator
from ..options import Options
from ..problem import NO_MORE, OF_SDPA, SEED
from ..run import forward, forward_for_backward
from ..stats import REPLACED, count, disabled_reason, flash_is_enabled, small_reason
from . import shapes, torch_mps
from .gradients import backward
from .original import math_attention, original

FUSED, MATH = SDPBackend.FLASH_ATTENTION.value, SDPBackend.MATH.value

# By the backend that PyTorch would have used: it decides the layout of the result, and whether there is a second
# derivative.
_ORIGINALS = {FUSED: original, MATH: math_attention}
_LAYOUTS = {FUSED: tensors.like, MATH: tensors.dense}
_ROUTES = {
    backend: Route(
        partial(forward_for_backward, allocate=_LAYOUTS[backend]), partial(backward, function, EAGER.backward)
    )
    for backend, function in _ORIGINALS.items()
}
_BACKWARDS_BY_OPERATOR = {
    backend: partial(backward, function, run_backward_operator) for backend, function in _ORIGINALS.items()
}


def torch_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dropout_p: float = 0.0,
) -> int:
    """The code of the backend that PyTorch would use."""
    if query.device.type == "mps":  # there all results are contiguous, and it has no _fused_sdp_choice
        return MATH
    if mask is not None and mask.requires_grad and query.dim() == 3:  # a gradient that it overlooks
        query, key, value = query[None], key[None], value[None]
    return torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


# --- Cached calls --------------------------------------------------------------------------------


class TorchCall(CacheEntry):
    """A call that PyTorch runs, for this reason: it is too small to replace, or PyTorch has a kernel for it."""

    def __init__(
        self,
        matches: Callable[..., bool],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        reason: str,
        work: int,
    ) -> None:
        super().__init__(matches)
        self.reason: str | None = reason
        self.work = work


class ReplacedCall(CachedCall):
    """A call that ran on libmfa."""

    reason = None

    def __init__(
        self,
        matches: Callable[..., bool],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: Options,
        backend: int,
        work: int,
    ) -> None:
        super().__init__(matches, query, key, value, mask, Call(_ROUTES[backend], options, False), _LAYOUTS[backend])
        self.backend, self.work = backend, work


def options_key(is_causal: bool, scale: float | None, enable_gqa: bool) -> tuple[object, ...]:
    """The part of the cache's key that is not tensors."""
    return "scaled_dot_product_attention", is_causal, scale, enable_gqa


def run_cached(
    cached: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The result of a call that has an entry; None if the entry does not hold any more, because settings or the
    alignment of memory changed."""
    if not flash_is_enabled() and disabled_reason():
        return None
    # On the CPU users may have set other thresholds since; those of MPS are in force until the cache is cleared.
    if query.device.type != torch_mps.DEVICE and small_reason(cached.work, query) != cached.reason:
        cached.evict()
        return None
    if cached.reason is not None:
        count(cached.reason)
        if mask is None and not is_causal and scale is None and not enable_gqa:
            return original(query, key, value)  # each further argument costs time
        return original(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if cached.backend != torch_backend(query, key, value, mask, is_causal, scale, enable_gqa):
        return None
    try:
        out = cached.attend(query, key, value, mask)
    except (Unsupported, ValueError):
        return None
    count(REPLACED)
    return out


# --- Other calls ---------------------------------------------------------------------------------


def run_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    support: shapes.Support,
) -> Tensor:
    """The result by libmfa. `support`: the shapes.Support of the call. Raises Unsupported, or ValueError for memory
    that is not aligned."""
    backend = torch_backend(query, key, value, mask, is_causal, scale, enable_gqa, dropout_p)
    if backend not in _ROUTES:
        raise Unsupported("PyTorch has no backend for it")
    if not support.fits:
        query, key, value, mask, shape = shapes.four_dimensions(query, key, value, mask, enable_gqa)
    options = Options(upper=0 if is_causal else None, scale=scale, dropout=dropout_p)
    inputs = query, key, value, mask, *_more_inputs(query, dropout_p)
    if is_differentiated(*inputs):
        out = Attention.apply(*inputs, Call(_ROUTES[backend], options, False))
    else:
        out, _ = forward(inputs, options, False, _LAYOUTS[backend])
    if not support.fits:
        return out.view(shape)
    if dropout_p:
        return out
    call_key = options_key(is_causal, scale, enable_gqa)
    dispatch_cache.insert(query, key, value, mask, call_key, ReplacedCall, options, backend, support.work)
    return out


def _more_inputs(query: Tensor, dropout_p: float) -> Any:
    """The Inputs that scaled_dot_product_attention has not: a seed of dropout, if there is any."""
    if not dropout_p:
        return NO_MORE
    place = SEED - OF_SDPA
    return (*NO_MORE[:place], draw(query, query.shape[0]), *NO_MORE[place + 1 :])


def run_by_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    support: shapes.Support,
) -> Tensor:
    """The same through torch.ops.mfa, which compilers, dispatch modes and transforms see."""
    backend = _torch_backend_by_operator(query, key, value, mask, is_causal, scale, enable_gqa, dropout_p)
    if backend not in _ROUTES:
        raise Unsupported("PyTorch has no backend for it")
    if not support.fits:
        query, key, value, mask, shape = shapes.four_dimensions(query, key, value, mask, enable_gqa)
    options = Options(upper=0 if is_causal else None, scale=scale, dropout=dropout_p)
    with differentiated_by(_BACKWARDS_BY_OPERATOR[backend]):
        out, _ = attention_forward(query, key, value, mask, *_more_inputs(query, dropout_p), *options)
    if backend == MATH:
        out = out.contiguous()
    return out if support.fits else out.view(shape)


def _torch_backend_by_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dropout_p: float,
) -> int | None:
    """torch_backend(), without an operator that modes would see."""
    if all(map(tensors.is_plain, (query, key, value))):
        with torch._C._DisableTorchDispatch():
            return torch_backend(query, key, value, mask, is_causal, scale, enable_gqa, dropout_p)
    if not dropout_p and flash_is_enabled() and shapes.is_fused(query, key, value, mask, enable_gqa):
        return FUSED
    return MATH if torch._C._get_math_sdp_enabled() or query.device.type == "mps" else None
