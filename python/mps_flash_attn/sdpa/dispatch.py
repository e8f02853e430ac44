"""The kernels that replace PyTorch's under scaled_dot_product_attention. They decide whether libmfa or PyTorch runs a
call."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from .. import context_parallel_state, dispatch_cache, tensors, transforms
from ..autograd import is_differentiated
from ..library import DEVICES, Unsupported
from ..stats import REPLACED, SMALL, TORCH_KERNEL, count, disabled_reason, small_reason
from ..subclasses import are_distributed
from ..transforms import count_of_modes, merge_into_batch, merge_mask_into_batch
from . import run, shapes, torch_mps
from .checkpointing import handles, is_replaced, top_hooks
from .compiler_cache import tag_compiler_cache
from .original import OPERATOR, original, original_for
from .run import TorchCall, options_key, run_cached

_TRACERS = (FakeTensor, FunctionalTensor)  # the classes of tensors with which torch.compile runs a model
_EAGER, _INTERCEPTED, TRACED = "eager", "seen by modes or transforms", "traced"  # kinds of calls
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 or later


# --- The kernels ---------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel of the CPU and of MPS, with and without autograd."""
    hooks = top_hooks(True)
    if (hooks is not None or not handles) and not is_replaced_for(hooks, query, key, value, attn_mask):
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not dropout_p:
        cached = dispatch_cache.lookup(query, key, value, attn_mask, options_key(is_causal, scale, enable_gqa))
        if cached is not None:
            out = run_cached(cached, query, key, value, attn_mask, is_causal, scale, enable_gqa)
            if out is not None:
                return out
    if are_distributed(query, key, value, attn_mask):
        from ..distributed import dtensors

        return dtensors.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    context_parallel_state.refuse_local("scaled_dot_product_attention")
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The same for a call that has no entry in the cache of calls, of tensors that are no DTensors."""
    args = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    unwrapped, kind = kind_of(args)
    if kind is TRACED and any(map(tensors.is_zero, args)):  # PyTorch's fused kernel would read memory they do not have
        operands: tuple[Any, ...] = (query, key, value, attn_mask)
        query, key, value, attn_mask = (one.clone() if tensors.is_zero(one) else one for one in operands)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    reason, support = check_support(args, unwrapped, kind, dropout_p, is_causal, scale, enable_gqa)
    if reason is None and query.device.type == torch_mps.DEVICE and not dropout_p:  # PyTorch has no kernel with it
        reason = torch_mps.fallback_reason(query, key, value, attn_mask, is_causal, enable_gqa, support.work)
    if reason is None:
        if kind is TRACED:
            tag_compiler_cache()
        try:
            run_call = run.run_eager if kind is _EAGER else run.run_by_operator
            out = run_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, support)
        except Unsupported as error:
            reason = str(error)
        except ValueError:
            if kind is TRACED or all(map(tensors.is_aligned, unwrapped)):
                raise
            reason = "memory that is not aligned to its elements"
        else:
            count("traced into a compiled graph" if kind is TRACED else REPLACED)
            return out
    count(reason)
    if reason in (SMALL, TORCH_KERNEL) and kind is _EAGER and not dropout_p:
        call_key = options_key(is_causal, scale, enable_gqa)
        dispatch_cache.insert(query, key, value, attn_mask, call_key, TorchCall, reason, support.work)
    run_original = original_for(reason)
    return run_original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_replaced_for(hooks: Any, *operands: Tensor | None) -> bool:
    """Whether SDPA is replaced for a call under hooks for saved tensors, or after the last replacement was removed."""
    if is_replaced(hooks, lambda: is_differentiated(*operands)):
        return True
    if handles:
        count("computed again, as PyTorch's operator computed it in forward")
    return False


def vmapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The rule for vmap. It calls the operator at the level below, with the mapped dimension in the batch, or in front
    of it. Calls that libmfa does not run are mapped by PyTorch."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    hooks = top_hooks(True)
    if (hooks is not None or not handles) and not is_replaced_for(hooks, query, key, value, attn_mask):
        return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    args = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    reason, support = check_support(args, *kind_of(args), dropout_p, is_causal, scale, enable_gqa)
    vmap = transforms.Vmap()
    operands, dimensions = vmap.split((query, key, value, attn_mask))
    is_mapped = any(dimension is not None for dimension in dimensions)
    if reason is None and dropout_p and not (is_mapped and vmap.randomness == "different"):
        reason = "dropout under vmap"  # PyTorch raises, or drops the same weights of all samples
    if reason is not None:
        count(reason)
        return original_for(reason)(query, key, value, attn_mask, dropout_p, is_causal, **options)
    with vmap.below():
        if not is_mapped:
            return OPERATOR(*operands, 0.0, is_causal, **options)
        if not support.fits:
            operands = shapes.mapped(*operands, dimensions, vmap.size)  # type: ignore[call-arg] # operands are four
            return vmap.join(OPERATOR(*operands, dropout_p, is_causal, **options))
        batch = query.shape[0]
        *operands, mask = operands
        operands = [merge_into_batch(tensor, place, vmap.size) for tensor, place in zip(operands, dimensions)]
        mask = merge_mask_into_batch(mask, dimensions[3], vmap.size, batch)
        out = OPERATOR(*operands, mask, dropout_p, is_causal, **options)
        return vmap.join(out.unflatten(0, (vmap.size, batch)))


# --- Whose call it is ----------------------------------------------------------------------------


def kind_of(args: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], str]:
    """(the tensors that hold the memory, the kind of the call)."""
    unwrapped = args
    if transforms.are_active() and transforms.are_supported:
        unwrapped = tuple(map(transforms.unwrapped, args))
    if not all(map(tensors.is_plain, unwrapped)):
        return unwrapped, TRACED
    return unwrapped, _EAGER if unwrapped is args and not count_of_modes() else _INTERCEPTED


def check_support(
    args: tuple[Tensor, ...],
    unwrapped: tuple[Tensor, ...],
    kind: str,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[str | None, Any]:
    """(why PyTorch runs the call, None if libmfa does; the shapes.Support of the call, None if it was not computed)."""
    reason = fallback_reason(unwrapped, kind, dropout_p, scale)
    if reason is not None:
        return reason, None
    check = shapes.check_support if kind is TRACED else shapes.check_support_cached
    mask_shape = args[3].shape if len(args) == 4 else None
    query, key, value = args[:3]
    support = check(query.shape, key.shape, value.shape, mask_shape, is_causal, enable_gqa)
    if support.reason is not None:
        return support.reason, support
    work = support.work
    if unwrapped is not args:  # under a vmap the shapes are those of one sample
        work *= reduce(torch.sym_max, (one.numel() // each.numel() for one, each in zip(unwrapped, args)))
    return small_reason(work, unwrapped[0]), support


def fallback_reason(args: tuple[Tensor, ...], kind: str, dropout_p: float, scale: float | None) -> str | None:
    """Why PyTorch runs the call, whatever its shapes; None if libmfa does. Wrong arguments go to PyTorch too, which
    raises its own errors for them."""
    if transforms.are_active() and not transforms.are_supported:
        return "a functorch transform"
    if kind is TRACED:
        for tensor in args:
            if type(tensor) not in _TRACERS and not tensors.is_plain(tensor):
                return tensors.describe_unsupported(tensor)
    if kind is not _EAGER and _is_exporting():
        return "torch.export"  # an exported program may run without this package
    reason = disabled_reason()
    if reason is not None:
        return reason
    if not 0 <= dropout_p <= 1:
        return "dropout_p"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    query, key, value = args[:3]
    if query.device.type not in DEVICES:
        return f"no backend for {query.device.type}"
    if not query.device == key.device == value.device == args[-1].device:
        return "devices"
    if query.dtype not in tensors.DTYPES or not query.dtype == key.dtype == value.dtype:
        return "dtypes"
    mask_dtype = args[-1].dtype  # that of value if there is no mask
    if mask_dtype is not torch.bool and mask_dtype is not query.dtype:
        if mask_dtype is not torch.float32 or query.dtype is torch.float64:
            return "attn_mask dtype"
    if scale is not None and not 0 < scale < math.inf:
        return "scale is not a positive number"  # PyTorch's kernels disagree on what that means with is_causal
    return None
