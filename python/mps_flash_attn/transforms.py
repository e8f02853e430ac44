"""Rules of the operators for autocast, vmap and the other transforms of torch.func (grad, vjp, jacrev, ...).

This is the only file that uses functorch, in which each transform is a level, with tensors that wrap those of the level
below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import tensors
from .operators import attention_backward, attention_forward, dropout_mask, quantize_kv, registration
from .problem import LENGTHS, OF_SDPA, SEED, Inputs

try:  # not public in PyTorch
    from torch._C._functorch import _add_batch_dim, get_unwrapped, is_functorch_wrapped_tensor
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch._functorch.utils import unwrap_dead_wrappers as unwrap_dead_wrappers
    from torch._functorch.vmap import unwrap_batched
    from torch.autograd.function import _SingleLevelFunction
except ImportError:
    enable_single_level_autograd_function = None  # type: ignore[assignment] # a function otherwise
    unwrap_dead_wrappers = tuple  # type: ignore[assignment] # likewise
    _SingleLevelFunction = torch.autograd.Function  # type: ignore[misc] # another class otherwise

VMAP_KEY = "FuncTorchVmapMode"  # the first dispatch key that an operator meets in a vmap
_VMAP_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
_VMAP_KEYS |= torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)

_INPUTS = len(Inputs._fields)

count_of_modes = torch._C._len_torch_dispatch_stack
are_active = torch._C._are_functorch_transforms_active
are_supported = enable_single_level_autograd_function is not None
vmaps_view_as_dtype = torch._C._dispatch_has_kernel_for_dispatch_key("aten::view.dtype", "FuncTorchBatched")  # 2.13 on


def needs_operator(*operands: Tensor) -> bool:
    """Whether the dispatcher has to see this call: for vmap, for modes, or for the tensors' own class."""
    if are_active() or count_of_modes():
        return True
    for tensor in operands:
        if not tensors.is_plain(tensor):
            return True
    return False


def outside() -> AbstractContextManager[Any]:
    """A block in which tensors that are made there belong to no level of torch.func."""
    return torch._C._DisableFuncTorch() if are_active() else nullcontext()


# --- Levels of torch.func ------------------------------------------------------------------------


class Function(_SingleLevelFunction):
    """A torch.autograd.Function for an operator's rule for autograd, which runs at one level; the apply() of PyTorch's
    own class would start at the topmost level again. It does not unwrap tensors of a transform that is over: the
    dispatcher has done so."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: Any) -> Any: ...

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def apply(function: type[Function], *arguments: Any) -> Any:
    """function.apply, for a Function whose forward calls what below() returned."""
    if not are_active():
        return function.apply(*arguments)
    if not are_supported:
        raise NotImplementedError(
            f"PyTorch {torch.__version__} cannot differentiate flash_attention under torch.func; use torch.autograd"
        )
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def below(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without its rule for autograd, as a function for the forward of a torch.autograd.Function. Gradients
    are off inside that forward; the function sets them for the levels below to what they are now."""
    if not are_active():
        return partial(beneath_autograd, operator)
    grad, tangents = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def run(*arguments: Any) -> Any:
        with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
            return beneath_autograd(operator, *arguments)

    return run


def beneath_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the operator without its rule for autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that holds the memory, below all levels."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


class Vmap:
    """The vmap whose rule of an operator is running."""

    def __init__(self) -> None:
        interpreter: Any = retrieve_current_functorch_interpreter()
        self._level, self.size = interpreter.level(), interpreter.batch_size()
        self.randomness: str = interpreter.randomness()  # "error", "different" or "same"

    def split(self, operands: tuple[Tensor | None, ...]) -> tuple[Any, tuple[int | None, ...]]:
        """(the tensors of the level below, the mapped dimension of each, None where there is none)."""
        return unwrap_batched(operands, self._level)

    def below(self) -> AbstractContextManager[Any]:
        """A context in which operators run at the level below."""
        return torch._C._ExcludeDispatchKeyGuard(_VMAP_KEYS)

    def join(self, result: Tensor) -> Tensor:
        """Wraps a result of the level below, whose first dimension is mapped, for this level."""
        return _add_batch_dim(result, 0, self._level)


# --- Autocast ------------------------------------------------------------------------------------


def _register_autocast(key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_run(*arguments: Any) -> Any:
        cast = tensors.autocast(*arguments[:OF_SDPA])
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return attention_forward(*cast, *arguments[OF_SDPA:])

    registration.impl("attention_forward", cast_and_run, key)


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastMPS"):
    if hasattr(torch._C.DispatchKey, _key):
        _register_autocast(_key)


# --- vmap: the mapped dimension becomes a part of the batch --------------------------------------


def merge_into_batch(tensor: Any, dimension: int | None, size: int) -> Any:
    """The tensor with its mapped dimension merged into the batch: (size * batch, ...). None stays None."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dimension is None else tensor.movedim(dimension, 0)
    return tensor.flatten(0, 1)


def merge_mask_into_batch(mask: Tensor | None, dimension: int | None, size: int, batch: int) -> Tensor | None:
    """The same for a mask, which may lack leading dimensions, and may have a batch of 1."""
    if mask is None:
        return None
    mask = mask.expand(size, *mask.shape) if dimension is None else mask.movedim(dimension, 0)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _merge_inputs(inputs: Sequence[Any], dimensions: Sequence[int | None], size: int) -> tuple[tuple[Any, ...], int]:
    """(the Inputs with their mapped dimensions merged, the batch of one sample)."""
    query, key, value, mask, *others = inputs
    query, key, value = (merge_into_batch(t, d, size) for t, d in zip((query, key, value), dimensions))
    batch = query.shape[0] // size
    mask = merge_mask_into_batch(mask, dimensions[3], size, batch)
    merged = (merge_into_batch(t, d, size) for t, d in zip(others, dimensions[4:]))
    return (query, key, value, mask, *merged), batch


def _each_sample(operator: Callable[..., Any], info: Any, dimensions: Sequence[int | None], arguments: Any) -> Any:
    """The results of one call for each sample, stacked."""
    results = [
        operator(
            *(one.select(place, n) if isinstance(place, int) else one for one, place in zip(arguments, dimensions))
        )
        for n in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*results)))


def _goes_one_by_one(inputs: Sequence[Any]) -> bool:
    """Whether samples cannot become a part of the batch: dropout depends on the place in it, packed sequences, a cache
    and pages have none, and scales that broadcast would be made as large as a batch of them."""
    return inputs[SEED] is not None or any(one is not None for one in inputs[LENGTHS:])


def _vmap_forward(info: Any, dimensions: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    size = info.batch_size
    if _goes_one_by_one(arguments[:_INPUTS]):
        return _each_sample(attention_forward, info, dimensions, arguments), (0, 0)
    inputs, batch = _merge_inputs(arguments[:_INPUTS], dimensions, size)
    results = attention_forward(*inputs, *arguments[_INPUTS:])
    return tuple(result.unflatten(0, (size, batch)) for result in results), (0, 0)


def _vmap_backward(
    info: Any, dimensions: Sequence[int | None], d_out: Tensor, d_lse: Tensor | None, *arguments: Any
) -> tuple[Any, Any]:
    size, (out, lse, *options) = info.batch_size, arguments[_INPUTS:]
    wanted = options[-1]
    places = tuple(0 if is_wanted else None for is_wanted in wanted)
    if _goes_one_by_one(arguments[:_INPUTS]):
        found = _each_sample(attention_backward, info, dimensions, (d_out, d_lse, *arguments))
        return tuple(one if is_wanted else one.flatten() for one, is_wanted in zip(found, wanted)), places
    mask_shape: Any = _shape_of_sample(arguments[3], dimensions[2 + 3])
    inputs, batch = _merge_inputs(arguments[:_INPUTS], dimensions[2:], size)
    d_out, d_lse = (merge_into_batch(t, d, size) for t, d in zip((d_out, d_lse), dimensions))
    out, lse = (merge_into_batch(t, d, size) for t, d in zip((out, lse), dimensions[2 + _INPUTS :]))
    operands = d_out, d_lse, *inputs, out, lse
    *gradients, dbias, dsinks = (
        gradient.unflatten(0, (size, batch)) if is_wanted else gradient
        for gradient, is_wanted in zip(attention_backward(*operands, *options), wanted)
    )
    if wanted[3]:
        while dbias.dim() > 1 + len(mask_shape):
            dbias = dbias.sum(1)
        dbias = dbias.sum_to_size(size, *mask_shape)
    return (*gradients, dbias, dsinks), places


def _vmap_dropout_mask(info: Any, dimensions: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    seed, *others = arguments
    samples = [dropout_mask(one, *others) for one in seed.unbind(dimensions[0])]
    return torch.stack(samples), 0


def _vmap_quantize_kv(info: Any, dimensions: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    numbers, *others = arguments
    return quantize_kv(numbers.movedim(dimensions[0], 0), *others), (0, 0)


def _shape_of_sample(tensor: Tensor | None, dimension: int | None) -> tuple[int, ...] | None:
    """The shape of one sample of a vmap; None for None."""
    if tensor is None or dimension is None:
        return None if tensor is None else tuple(tensor.shape)
    return tuple(size for place, size in enumerate(tensor.shape) if place != dimension)


torch.library.register_vmap("mfa::attention_forward", _vmap_forward, lib=registration)
torch.library.register_vmap("mfa::attention_backward", _vmap_backward, lib=registration)
torch.library.register_vmap("mfa::dropout_mask", _vmap_dropout_mask, lib=registration)
torch.library.register_vmap("mfa::quantize_kv", _vmap_quantize_kv, lib=registration)
