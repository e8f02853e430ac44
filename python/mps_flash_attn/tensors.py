"""The only file that accesses the memory of PyTorch's tensors: which tensors libmfa may read, and the layouts of its
results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .library import BF16, DEVICES, F16, F32, F64, Unsupported
from .subclasses import PLAIN, as_plain

EmptyLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # the shape, strides and dtype of a new tensor

DTYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}

_HALVES = (torch.float16, torch.bfloat16)
_has_storage = torch._C._has_storage  # a global name: each attribute lookup costs time in every call

_ABSENT = (1, 1, 1, 1)


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor with dense memory that holds its values. It is not for subclasses, tensors of a vmap,
    sparse and nested tensors, zero tensors, which have no memory, and views with a pending negation."""
    if type(tensor) not in PLAIN or not _has_storage(tensor) or tensor.is_nested:
        return False
    return not tensor.is_neg() and not tensor._is_zerotensor()


def is_jagged(tensor: Any) -> bool:
    """Whether this is a nested tensor with the jagged layout."""
    return isinstance(tensor, torch.Tensor) and tensor.is_nested and tensor.layout is torch.jagged


def is_zero(tensor: Any) -> bool:
    """Whether this is a zero tensor, which PyTorch's own rules for gradients make: it has no memory."""
    return type(tensor) in PLAIN and tensor._is_zerotensor()


def is_aligned(tensor: Tensor) -> bool:
    """Whether its memory is aligned to its elements, which libmfa requires and PyTorch does not."""
    return address(tensor) % tensor.itemsize == 0


def describe_unsupported(tensor: Tensor) -> str:
    """Why a tensor is not plain."""
    if type(tensor) not in PLAIN:
        return "a tensor subclass"
    return "a negation still to be carried out" if tensor.is_neg() else "a tensor without dense memory"


def check(name: str, tensor: object) -> Tensor:
    """Raises for what can neither be read nor be passed to the operators. Returns the tensor, as a plain one where
    possible (subclasses.py)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} has the layout {layout}; it must be strided")
    return as_plain((name,), (tensor,))[0]


def device(tensor: Tensor) -> int:
    """The code of the device that holds the tensor."""
    code = DEVICES.get(tensor.device.type)
    if code is None:
        raise Unsupported(f"the tensors are on {tensor.device}; devices we run on: {', '.join(DEVICES)}")
    return code


def dtype_name(tensor: Tensor) -> str:
    """Such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def is_autocast(tensor: Tensor) -> bool:
    """Whether PyTorch's autocast is on for the device of the tensor, and that is one that libmfa supports."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = tensor.device.type
    return kind in DEVICES and torch.is_autocast_enabled(kind)


def autocast(query: Tensor, *others: Tensor | None) -> Iterator[Any]:
    """The tensors cast as PyTorch's autocast casts those of scaled_dot_product_attention."""
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in DTYPES or tensor.dtype is torch.float64:  # codes stay as they are
            return tensor
        return tensor.to(dtype)

    return map(cast, (query, *others))


def of_out_type(out: Tensor, out_type: str | None) -> Tensor:
    """Memory for an output of this out_type in the layout of `out`, which has the dtype of query."""
    return out if out_type is None else torch.empty_like(out, dtype=out_dtype(out, out_type))


def like(query: Tensor, columns: int) -> Tensor:
    """Memory for an output: `columns` are contiguous, and the other dimensions have the order of the query's memory, as
    in PyTorch's own operator. So (B, N, H, D) memory viewed as (B, H, N, D) gives an output of the same order."""
    batch, heads, rows, head_dim = query.shape
    if columns == head_dim and query.stride(3) == 1:
        return torch.empty_like(query)
    order = sorted(range(3), key=query.stride, reverse=True)
    return torch.empty_permuted((batch, heads, rows, columns), (*order, 3), dtype=query.dtype, device=query.device)


def dense(query: Tensor, columns: int) -> Tensor:
    """The same in plain (batch, head, row, column) order."""
    return query.new_empty((*query.shape[:3], columns))


def rows_dtype(query: Tensor) -> torch.dtype:
    """The dtype of log-sum-exp: f32 (f64 for f64)."""
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def out_dtype(query: Tensor, out_type: str | None) -> torch.dtype:
    """The dtype of out and of the gradients of query, key and value, for Options.out_type."""
    return query.dtype if out_type is None else torch.float32


def has_low(out: Tensor) -> bool:
    """Whether out is rounded to a narrower dtype than it is computed in, so that there is an out_low."""
    return out.dtype in _HALVES


def empty_rows(query: Tensor) -> Tensor:
    """Memory for one number per row of `query`: log-sum-exp."""
    return torch.empty(query.shape[:3], dtype=rows_dtype(query), device=query.device)


def gradients(inputs: Sequence[Any], wanted: Sequence[bool], out_type: str | None) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of query, key, value, mask and sinks, None where not wanted."""
    dtype = None if out_type is None else out_dtype(inputs[0], out_type)  # None: that of the tensor
    dtypes = dtype, dtype, dtype, None, None
    return tuple(
        torch.empty_like(tensor, dtype=own) if is_wanted else None
        for tensor, is_wanted, own in zip(inputs, wanted, dtypes)
    )


def _fastest_empty() -> Callable[..., Tensor]:
    """(shape, strides, dtype) -> a new tensor on the CPU. The function that compiled code uses is not public, and takes
    half the time of the public one."""

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    fast = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty)
    try:
        result = fast((2, 3), (1, 2), torch.float64)
    except (RuntimeError, TypeError):
        return empty
    works = result.shape == (2, 3) and result.stride() == (1, 2) and result.dtype is torch.float64
    return fast if works and result.device.type == "cpu" else empty


empty_on_cpu = _fastest_empty()


@overload
def empty_layout(tensor: Tensor) -> EmptyLayout: ...
@overload
def empty_layout(tensor: None) -> None: ...
def empty_layout(tensor: Tensor | None) -> EmptyLayout | None:
    """(shape, strides, dtype), from which empty() makes a tensor of the same layout; None for None."""
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


@overload
def empty(query: Tensor, layout: EmptyLayout) -> Tensor: ...
@overload
def empty(query: Tensor, layout: None) -> None: ...
def empty(query: Tensor, layout: EmptyLayout | None) -> Tensor | None:
    """A new tensor of this layout on the device of `query`; None for None."""
    return None if layout is None else query.new_empty_strided(layout[0], layout[1], dtype=layout[2])


def incoming(gradient: Tensor | None, out: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The incoming gradient of `out`, without a pending negation; zeros for None, of this dtype or that of out."""
    return out.new_zeros(1, dtype=dtype).expand(out.shape) if gradient is None else resolved(gradient)


@overload
def resolved(gradient: Tensor) -> Tensor: ...
@overload
def resolved(gradient: None) -> None: ...
def resolved(gradient: Tensor | None) -> Tensor | None:
    """The tensor with any pending negation applied; None for None."""
    return gradient.resolve_neg() if gradient is not None and gradient.is_neg() else gradient


# The address of the first element, on the CPU. data_ptr() copies a tensor that shares its memory copy-on-write
# (torch._lazy_clone); it is used only where PyTorch has no const_data_ptr().
address = getattr(torch.Tensor, "const_data_ptr", torch.Tensor.data_ptr)

_storage_address = getattr(torch._C, "_data_address", None)  # of the whole storage, likewise
storage = torch.Tensor.untyped_storage
offset = torch.Tensor.storage_offset


def extent(tensor: Tensor | None) -> int:
    """The bytes from the first element of a tensor to the end of its last one; 0 for None; a negative number for a
    tensor without elements, of which no memory is read."""
    if tensor is None:
        return 0
    if not tensor.numel():
        return -(2**63)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize


def refuse_short_storage(**operands: Tensor | None) -> None:
    """Raises for the first of the tensors that has elements beyond its storage, in PyTorch's words."""
    for name, tensor in operands.items():
        if tensor is None:
            continue
        first, found = offset(tensor) * tensor.itemsize, storage(tensor).nbytes()
        if found - first < extent(tensor):
            raise RuntimeError(
                f"{name}: sizes {list(tensor.shape)}, strides {list(tensor.stride())}, storage offset "
                f"{offset(tensor)}, and itemsize {tensor.itemsize} requiring a storage size of "
                f"{first + extent(tensor)} are out of bounds for storage of size {found}, which was resized or freed "
                "after the tensor was made"
            )


def place_on_metal(tensor: Tensor | None) -> tuple[int, Any]:
    """(base, offset in bytes) of the first element, as in mfa_buffer; zeros for None. The base is the MTLBuffer of the
    storage."""
    return (0, 0) if tensor is None else (metal_buffer(tensor), offset(tensor) * tensor.itemsize)


def metal_buffer(tensor: Tensor) -> int:
    """The MTLBuffer, which PyTorch returns as the data pointer of the whole storage."""
    return _storage_address(tensor) if _storage_address else storage(tensor).data_ptr()


def layout(tensor: Tensor | None) -> tuple[int, ...]:
    """The (batch, head, row, column) strides; for None, valid ones that are not used."""
    return _ABSENT if tensor is None else tensor.stride()


def rows_layout(tensor: Tensor | None) -> tuple[int, ...]:
    """The same for a tensor without columns: log-sum-exp and its gradient."""
    return _ABSENT if tensor is None else (*tensor.stride(), 0)
