"""Numbers to the codes of keys and values: by libmfa on the CPU, by PyTorch's operations, with the same results, where
numbers are on another device or a scale is given."""

from __future__ import annotations

import torch
from torch import Tensor

from . import codes, tensors
from .library import KV_TYPES, library

# The largest code of each type, which the number of the largest size in a group gets.
_LARGEST = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0, "int4": -8.0, "nf4": 1.0}
_NF4 = torch.tensor(codes.NF4, dtype=torch.float32, device="cpu")
_NF4_ENDS = ((_NF4[1:] + _NF4[:-1]) / 2).tolist()  # of the numbers that each code is nearest to


def check(numbers: Tensor, kv_type: str, group: int) -> int:
    """How many scales a row of these numbers gets. Raises for numbers, types and groups that have no codes."""
    codes.check_type("kv_type", kv_type)
    if numbers.dtype not in tensors.DTYPES:
        accepted = "float32, float16, bfloat16 or float64"
        raise TypeError(f"numbers is {tensors.dtype_name(numbers)}; it must be {accepted}")
    if numbers.dim() == 0:
        raise ValueError("numbers has no dimensions; the last one must be the columns of a row")
    width, unit = numbers.shape[-1], codes.BLOCK if kv_type in codes.PACKED else 1
    if width % unit:
        raise ValueError(f"numbers has {width} columns; of {kv_type} they must be a multiple of {unit}")
    if group < 0 or group % unit or width % (group or 1):
        unit_of = f"a multiple of {unit} that divides" if unit > 1 else "a number that divides"
        raise ValueError(f"group is {group}; it must be 0, for one scale a row, or {unit_of} the {width} columns")
    return width // group if group else 1


def empty(numbers: Tensor, kv_type: str, groups: int) -> tuple[Tensor, Tensor]:
    """Memory for the codes and the scales of these numbers."""
    rows, width = numbers.shape[:-1], numbers.shape[-1]
    packed = kv_type in codes.PACKED
    of_codes = numbers.new_empty(
        (*rows, width // 2 if packed else width), dtype=torch.uint8 if packed else codes.DTYPES[kv_type]
    )
    return of_codes, numbers.new_zeros((*rows, groups), dtype=torch.float32)


def by_library(numbers: Tensor, kv_type: str, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of numbers on the CPU."""
    groups, numbers = check(numbers, kv_type, group), numbers.contiguous()
    found = empty(numbers, kv_type, groups)
    width = numbers.shape[-1]
    if numbers.numel():
        places = ((tensors.address(one), one.shape[-1]) for one in (numbers, *found))
        sizes = numbers.numel() // width, width, group
        library().quantize(KV_TYPES[kv_type], tensors.DTYPES[numbers.dtype], *sizes, *places)
    return found


def by_torch(numbers: Tensor, kv_type: str, group: int) -> tuple[Tensor, Tensor]:
    """The same on any device. What is not finite is not refused: its group becomes NaN."""
    groups = check(numbers, kv_type, group)
    if not numbers.numel():
        return empty(numbers, kv_type, groups)
    grouped = numbers.float().unflatten(-1, (groups, -1))
    size = grouped.abs().amax(-1, keepdim=True)
    if kv_type == "int4":  # its sign, that of the first number of this size
        place = torch.arange(grouped.shape[-1], device=numbers.device)
        first = torch.where(grouped.abs() == size, place, grouped.shape[-1] - 1).amin(-1, keepdim=True)
        size = grouped.gather(-1, first)
    scale = size.squeeze(-1) / _LARGEST[kv_type] + 0.0  # and no -0
    return encode(numbers, scale, kv_type), scale


def encode(numbers: Tensor, scale: Tensor | None, kv_type: str) -> Tensor:
    """The codes of numbers with these scales (..., groups), None for 1. Numbers beyond the largest code get that."""
    found, largest = numbers.float(), _LARGEST[kv_type]
    if scale is not None:
        grouped = found.unflatten(-1, (scale.shape[-1], -1))
        divisor = torch.where(scale == 0, torch.inf, scale).unsqueeze(-1)  # a group of zeros has this scale
        found = (grouped / divisor).flatten(-2)
    if kv_type in codes.FLOATS:
        return (found.clamp(-largest, largest) + 0.0).to(codes.DTYPES[kv_type])  # the zero of -0
    if kv_type == "int8":
        return found.round().clamp(-largest, largest).to(torch.int8)
    if kv_type == "int4":
        code = (found.round() + 8).clamp(0, 15).to(torch.uint8)
    else:
        code = torch.zeros_like(found, dtype=torch.uint8)
        for end in _NF4_ENDS:
            code += found > end
    low, high = code.unflatten(-1, (-1, 2, codes.BLOCK // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)
