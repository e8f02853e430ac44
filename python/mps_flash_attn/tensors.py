"""The only file that knows the memory of a PyTorch tensor: which tensors libmfa may read, and in which layout it
writes."""

import torch

from .library import BF16, DEVICES, F16, F32, F64, Unsupported
from .subclasses import PLAIN, as_plain

DTYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}

_has_storage = torch._C._has_storage  # by names of our own: each step on the way to one costs in every call

_ABSENT = (1, 1, 1, 1)


def is_plain(tensor):
    """Whether this is a tensor with dense memory of its own, read as it lies. Not so are subclasses, which may only
    stand for one, those that vmap makes, sparse and nested ones, and views with a negation still to be carried out."""
    return type(tensor) in PLAIN and _has_storage(tensor) and not tensor.is_nested and not tensor.is_neg()


def is_aligned(tensor):
    """Whether its memory is aligned to its elements: libmfa takes no other, PyTorch does."""
    return address(tensor) % tensor.itemsize == 0


def peculiarity(tensor):
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


def empty_rows(query):
    """Memory for one number per row of `query`: log-sum-exp."""
    return torch.empty(query.shape[:3], dtype=rows_dtype(query), device=query.device)


def gradient(tensor, wanted):
    """Memory for the gradient of `tensor`, if wanted."""
    return torch.empty_like(tensor) if wanted else None


def incoming(gradient, out):
    """The gradient that reaches `out`, as it can be read; zeros where nothing did."""
    return out.new_zeros(1).expand(out.shape) if gradient is None else resolved(gradient)


def resolved(gradient):
    """The tensor, with a pending negation carried out; None stays None."""
    return gradient.resolve_neg() if gradient is not None and gradient.is_neg() else gradient


address = torch.Tensor.data_ptr  # of the first element, on the CPU


def place_on_metal(tensor):
    """Where the first element is: (base, offset in bytes), as in mfa_buffer; zeros for None. An MTLBuffer holds the
    storage."""
    return (0, 0) if tensor is None else (metal_buffer(tensor), tensor.storage_offset() * tensor.itemsize)


def metal_buffer(tensor):
    """The MTLBuffer, which PyTorch gives as the data pointer of the whole storage."""
    return tensor.untyped_storage().data_ptr()


def layout(tensor):
    """The (batch, head, row, column) strides; for None, any that are sound: nobody goes by them."""
    return _ABSENT if tensor is None else tensor.stride()


def rows_layout(tensor):
    """The same for a tensor without columns: log-sum-exp and its gradient."""
    return _ABSENT if tensor is None else (*tensor.stride(), 0)
