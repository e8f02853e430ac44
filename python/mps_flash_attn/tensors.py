"""The only file that knows the memory of a PyTorch tensor: which tensors libmfa may read, and in which layout it
writes."""

import torch

from .library import BF16, DEVICES, F16, F32, F64, Unsupported
from .subclasses import PLAIN, as_plain

DTYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}

_HALVES = (torch.float16, torch.bfloat16)
_has_storage = torch._C._has_storage  # by names of our own: each step on the way to one costs in every call

_ABSENT = (1, 1, 1, 1)


def is_plain(tensor):
    """Whether this is a tensor with dense memory of its own, read as it lies. Not so are subclasses, which may only
    stand for one, those that vmap makes, sparse and nested ones, zero tensors, which have no memory, and views with a
    negation still to be carried out."""
    if type(tensor) not in PLAIN or not _has_storage(tensor) or tensor.is_nested:
        return False
    return not tensor.is_neg() and not tensor._is_zerotensor()


def is_zero(tensor):
    """Whether this is a zero tensor, as PyTorch's own rules for gradients make them: it stands for zeros."""
    return type(tensor) in PLAIN and tensor._is_zerotensor()


def is_aligned(tensor):
    """Whether its memory is aligned to its elements: libmfa takes no other, PyTorch does."""
    return address(tensor) % tensor.itemsize == 0


def describe_unsupported(tensor):
    """In what way a tensor is not plain."""
    if type(tensor) not in PLAIN:
        return "a tensor subclass"
    return "a negation still to be carried out" if tensor.is_neg() else "a tensor without dense memory"


def check(name, tensor):
    """Refuses what neither memory nor an operator could be found for; returns the tensor, as a plain one where that
    can be done (subclasses.py)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} has the layout {layout}; it must be strided")
    return as_plain(**{name: tensor})[0]


def device(tensor):
    """The code of the device that holds the tensor."""
    code = DEVICES.get(tensor.device.type)
    if code is None:
        raise Unsupported(f"the tensors are on {tensor.device}; devices we run on: {', '.join(DEVICES)}")
    return code


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def is_autocast(tensor):
    """Whether PyTorch's autocast is on, for a device that we run on."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = tensor.device.type
    return kind in DEVICES and torch.is_autocast_enabled(kind)


def autocast(query, *others):
    """What PyTorch's autocast does to the tensors of scaled_dot_product_attention."""
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor):
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible else tensor

    return map(cast, (query, *others))


def like(query, columns):
    """An output for each row of `query`: `columns` next to each other, the other dimensions in the order of the query's
    memory, as PyTorch's own operator does it. So (B, N, H, D) memory seen as (B, H, N, D) comes back as such."""
    batch, heads, rows, head_dim = query.shape
    if columns == head_dim and query.stride(3) == 1:
        return torch.empty_like(query)
    order = sorted(range(3), key=query.stride, reverse=True)
    return torch.empty_permuted((batch, heads, rows, columns), (*order, 3), dtype=query.dtype, device=query.device)


def dense(query, columns):
    """The same in plain (batch, head, row, column) order."""
    return query.new_empty((*query.shape[:3], columns))


def heads_within_rows(query, columns):
    """The same in (batch, row, head, column) order."""
    batch, heads, rows, _ = query.shape
    return query.new_empty((batch, rows, heads, columns)).transpose(1, 2)


def rows_dtype(query):
    """The dtype of log-sum-exp: f32 (f64 for f64)."""
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def has_low(query):
    """Whether out is rounded to fewer digits than it is computed with, so that there is an out_low."""
    return query.dtype in _HALVES


def empty_rows(query):
    """Memory for one number per row of `query`: log-sum-exp."""
    return torch.empty(query.shape[:3], dtype=rows_dtype(query), device=query.device)


def gradient(tensor, wanted):
    """Memory for the gradient of `tensor`, if wanted."""
    return torch.empty_like(tensor) if wanted else None


def _quickest_empty():
    """(shape, strides, dtype) -> a new tensor on the CPU: the function of compiled code, which PyTorch promises nobody,
    takes half the time of the public one."""

    def empty(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty)
    try:
        made = quick((2, 3), (1, 2), torch.float64)
    except (RuntimeError, TypeError):
        return empty
    right = made.shape == (2, 3) and made.stride() == (1, 2) and made.dtype is torch.float64
    return quick if right and made.device.type == "cpu" else empty


empty_on_cpu = _quickest_empty()


def empty_layout(tensor):
    """What `empty` makes another one of: shape, strides and dtype; None for None."""
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def empty(query, layout):
    """A new tensor where `query` is; None for None."""
    return None if layout is None else query.new_empty_strided(layout[0], layout[1], dtype=layout[2])


def incoming(gradient, out):
    """The gradient that reaches `out`, as it can be read; zeros where nothing did."""
    return out.new_zeros(1).expand(out.shape) if gradient is None else resolved(gradient)


def resolved(gradient):
    """The tensor, with a pending negation carried out; None stays None."""
    return gradient.resolve_neg() if gradient is not None and gradient.is_neg() else gradient


# Of the first element, on the CPU. data_ptr() copies a tensor that shares its memory until either is written
# (torch._lazy_clone), and a PyTorch that has no other function does so.
address = getattr(torch.Tensor, "const_data_ptr", torch.Tensor.data_ptr)

_storage_address = getattr(torch._C, "_data_address", None)  # of the whole storage, likewise
storage = torch.Tensor.untyped_storage
offset = torch.Tensor.storage_offset


def extent(tensor):
    """The bytes from the first element of a tensor to the end of its last one; 0 for None. Below any number for one
    without elements, of which no memory is read."""
    if tensor is None:
        return 0
    if not tensor.numel():
        return -(2**63)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize


def refuse_short_storage(**operands):
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


def place_on_metal(tensor):
    """Where the first element is: (base, offset in bytes), as in mfa_buffer; zeros for None. An MTLBuffer holds the
    storage."""
    return (0, 0) if tensor is None else (metal_buffer(tensor), offset(tensor) * tensor.itemsize)


def metal_buffer(tensor):
    """The MTLBuffer, which PyTorch gives as the data pointer of the whole storage."""
    return _storage_address(tensor) if _storage_address else storage(tensor).data_ptr()


def layout(tensor):
    """The (batch, head, row, column) strides; for None, any that are sound: nobody goes by them."""
    return _ABSENT if tensor is None else tensor.stride()


def rows_layout(tensor):
    """The same for a tensor without columns: log-sum-exp and its gradient."""
    return _ABSENT if tensor is None else (*tensor.stride(), 0)
