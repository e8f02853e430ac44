"""Keys and values as codes of 8 or 4 bits: which tensors are codes, of what type, and the shapes of their scales.

The functions that take codes have them in the place of key, with k_scale and k_type beside it, and no object that holds
all of these: a cache is the caller's memory, codes and scales, which he allocates, writes and shares page by page, and
operators, compilers and transforms know tensors. The dtype of the codes is their type, where PyTorch has such a dtype;
k_type is needed for bytes of uint8 only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import tensors
from .library import FAST, KV_TYPES

KvType = Literal["int8", "e4m3", "e5m2", "int4", "nf4"]
Fast = Literal["int8"]
Kinds = tuple[str | None, str | None]  # the types of key and value; None: numbers of the query's dtype

DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # others are bytes of uint8
FLOATS = "e4m3", "e5m2"
PACKED = "int4", "nf4"  # two a byte
BLOCK = 32  # columns of a block of packed codes: columns c and c + 16 are the low and the high half of its byte c
NO_KINDS = None, None

_KIND_OF_DTYPE = {dtype: kind for kind, dtype in DTYPES.items()}
# NF4: QLoRA (Dettmers et al., 2023), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def check_type(name: str, kv_type: Any) -> str:
    """The argument of this name, if it is a type of codes."""
    if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
        raise ValueError(f"{name} is {kv_type!r}; it must be {_list(KV_TYPES)}")
    return kv_type


def resolve(inputs: tuple[Any, ...], k_type: str | None, v_type: str | None) -> tuple[tuple[Any, ...], Kinds]:
    """(the tensors among the arguments of a call, in the order of problem.Inputs, with scales of the shapes that
    check() accepts, the types of key and value)."""
    query, key, value, *others, k_scale, v_scale = inputs
    kinds = kind_of("k_type", k_type, "key", key), kind_of("v_type", v_type, "value", value)
    scales = expanded("k_scale", k_scale, "key", key), expanded("v_scale", v_scale, "value", value)
    return (query, key, value, *others, *scales), kinds


def columns(tensor: Tensor, kind: str | None) -> int:
    """How many numbers a row of codes stands for."""
    return tensor.shape[-1] * 2 if kind in PACKED else tensor.shape[-1]


def shape(tensor: Tensor, kind: str | None) -> tuple[int, ...]:
    """The shape of the numbers that a tensor stands for."""
    return (*tensor.shape[:-1], columns(tensor, kind))


def check(name: str, tensor: Tensor, kind: str | None, scale: Tensor | None) -> None:
    """Raises for codes of another dtype than their type has, and for scales that do not fit them. `name`: key or
    value."""
    of_type, of_scale = f"{name[0]}_type", f"{name[0]}_scale"
    if kind is not None:
        check_dtype(of_type, check_type(of_type, kind), name, tensor)
    if scale is None:
        return
    if kind is None:
        raise ValueError(f"{of_scale} is given and {name} is {tensors.dtype_name(tensor)}; only codes have scales")
    check_scale(of_scale, scale, tensor, name)
    rows, width, groups = tuple(tensor.shape[:-1]), columns(tensor, kind), scale.shape[-1]
    if scale.shape[:-1] != rows:
        raise ValueError(f"{of_scale} has the shape {tuple(scale.shape)}; it must be {_with_groups(rows)}")
    check_groups(of_scale, groups, width, kind)


def check_fast(fast: str | None, kinds: Kinds, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raises for a `fast` that is none, and for one that needs other codes."""
    if fast is None:
        return
    if not isinstance(fast, str) or fast not in FAST:
        raise ValueError(f"fast is {fast!r}; it must be None or {_list(FAST)}")
    for name, kind, scale in (("key", kinds[0], k_scale), ("value", kinds[1], v_scale)):
        groups = 1 if scale is None else scale.shape[-1]
        if kind != "int8" or groups != 1:
            found = "numbers" if kind is None else f"{kind} with {groups} scales for a row"
            raise ValueError(f"fast is {fast!r} and {name} {found}; both must be int8 with one scale for a row")


def check_scale(name: str, scale: Tensor, codes: Tensor, of: str) -> None:
    """Raises for scales of another dtype or device than those of `codes`, the argument `of`, may have."""
    if scale.dtype is not torch.float32:
        raise TypeError(f"{name} is {tensors.dtype_name(scale)}; it must be float32")
    if scale.device != codes.device:
        raise ValueError(f"{name} is on {scale.device} and {of} on {codes.device}; they must be on one device")


def check_groups(name: str, groups: int, width: int, kind: str) -> None:
    """Raises unless so many scales divide a row of `width` numbers into groups that kernels have."""
    if groups == 1 or (groups and width % groups == 0 and (kind not in PACKED or width // groups % BLOCK == 0)):
        return
    groups_of = f"groups of {kind} are multiples of {BLOCK} columns" if kind in PACKED else "groups are equally large"
    raise ValueError(
        f"{name} has {groups} scales for a row of {width} columns; it must have 1, or a number that divides {width}: "
        f"{groups_of}"
    )


def numbers(
    key: Tensor, value: Tensor, kinds: Kinds, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[int, ...]:
    """The members of mfa_problem from k_type to v_scale_layout."""
    groups: list[int] = []
    layouts: list[int] = []
    for tensor, kind, scale in ((key, kinds[0], k_scale), (value, kinds[1], v_scale)):
        has_groups = scale is not None and scale.shape[3] > 1
        groups.append(columns(tensor, kind) // scale.shape[3] if has_groups and scale is not None else 0)
        layouts += (0, 0, 0, 0) if scale is None else scale.stride()
    types = (0 if kind is None else KV_TYPES[kind] for kind in kinds)
    return *types, *groups, *layouts


def dequantize(codes: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """The numbers that codes (..., D), packed (..., D / 2), stand for, with scales that broadcast to (..., groups)."""
    wide = torch.promote_types(dtype, torch.float32)
    if kind in PACKED:
        bytes_of = codes.unflatten(-1, (-1, BLOCK // 2))
        code = torch.cat([bytes_of & 15, bytes_of >> 4], -1).flatten(-2)
        table = torch.tensor(NF4 if kind == "nf4" else range(-8, 8), dtype=torch.float32, device=codes.device)
        found = table[code.long()].to(wide)
    else:
        found = codes.view(DTYPES[kind]).to(torch.float32).to(wide)
    if scale is not None:
        grouped = found.unflatten(-1, (scale.shape[-1] if scale.dim() else 1, -1))
        found = (grouped * scale.to(wide).unsqueeze(-1)).flatten(-2)
    return found.to(dtype)


def kind_of(name: str, given: str | None, of: str, tensor: Tensor) -> str | None:
    """The type of codes that an argument is, None for numbers. `name`: k_type or v_type, `given`: what it is."""
    if given is not None:
        return check_dtype(name, check_type(name, given), of, tensor)
    if tensor.dtype is torch.uint8:
        bytes_of = _list((*FLOATS, *PACKED))
        raise TypeError(f"{of} is uint8 and {name} None; {name} must say what its bytes are: {bytes_of}")
    return _KIND_OF_DTYPE.get(tensor.dtype)


def check_dtype(name: str, kind: str, of: str, tensor: Tensor) -> str:
    """The type, if codes of this type have the dtype of the tensor."""
    dtypes = [DTYPES[kind]] if kind in DTYPES else []
    dtypes += [torch.uint8] if kind != "int8" else []
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{of} is {tensors.dtype_name(tensor)} and {name} {kind!r}; it must be {accepted}")
    return kind


def expanded(name: str, scale: Tensor | None, of: str, tensor: Tensor) -> Tensor | None:
    """Scales that broadcast to the rows of a tensor, as (*rows, groups); None for None."""
    if scale is None:
        return None
    if scale.requires_grad:
        raise TypeError(f"{name} requires a gradient; it gets none, so it must be a tensor that does not")
    rows = tuple(tensor.shape[:-1])
    if scale.dim() == 0:
        return scale.expand(*rows, 1)
    sizes = tuple(scale.shape[:-1])
    if scale.dim() != tensor.dim() or any(size not in (1, full) for size, full in zip(sizes, rows)):
        hint = ""
        if scale.shape == tensor.shape[:2] and of in ("key", "value"):
            hint = f"; of a scale for each head it is {name}[:, :, None, None]"
        raise ValueError(
            f"{name} has the shape {tuple(scale.shape)}; it must be {_with_groups(rows)}, as {of}, where sizes may "
            f"be 1, or have no dimensions{hint}"
        )
    return scale if sizes == rows else scale.expand(*rows, -1)


def _with_groups(rows: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, rows))}, groups)"


def _list(kinds: Any) -> str:
    *first, last = map(repr, kinds)
    return f"{', '.join(first)} or {last}" if first else last
