"""The only file that knows the memory of a PyTorch tensor: which tensors libmfa may read, and in which layout it
writes."""

import torch

from .library import BF16, DEVICE_CPU, F16, F32, F64, Unsupported

DEVICES = {"cpu": DEVICE_CPU}
DTYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.float64: F64}

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ABSENT = (1, 1, 1, 1)


def is_plain(tensor):
    """Whether this is a tensor that owns ordinary memory, and not a subclass that only stands for one."""
    return type(tensor) in _PLAIN


def check(name, tensor):
    """Refuses all but dense memory; returns the tensor, with a pending negation carried out."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if not is_plain(tensor) and type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        kind = type(tensor).__name__
        raise TypeError(f"{name} is a {kind}, which has no memory of its own; it must be a plain tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} has the layout {layout}; it must be strided")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def device(tensor):
    """The code of the device that holds the tensor."""
    code = DEVICES.get(tensor.device.type)
    if code is None:
        raise Unsupported(f"the tensors are on {tensor.device}; devices we run on: {', '.join(DEVICES)}")
    return code


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


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


def empty_rows(query):
    """Memory for one number per row of `query`: log-sum-exp, in f32 (f64 for f64)."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return torch.empty(query.shape[:3], dtype=dtype, device=query.device)


def gradient(tensor, wanted):
    """Memory for the gradient of `tensor`, if wanted."""
    return torch.empty_like(tensor) if wanted else None


def incoming(gradient, out):
    """The gradient that reaches `out`, as it can be read; zeros where nothing did."""
    if gradient is None:
        return out.new_zeros(1).expand(out.shape)
    return gradient.resolve_neg() if gradient.is_neg() else gradient


def incoming_rows(gradient):
    """The same for log-sum-exp, in the memory order that empty_rows() has."""
    return None if gradient is None else gradient.resolve_neg().contiguous()


def pointer(tensor):
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def layout(tensor):
    """The (batch, head, row, column) strides; for None, any that are sound: nobody goes by them."""
    return _ABSENT if tensor is None else tensor.stride()
