"""Keys and values are written to caches, in place, and become codes there: append_kv, quantize_kv, dequantize_kv."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import codes, quantize, tensors
from .codes import KvType
from .operators import quantize_kv as quantize_operator


def quantize_kv(numbers: Tensor, kv_type: KvType, group: int = 0) -> tuple[Tensor, Tensor]:
    """(codes, scale) of keys or values (..., D) in float32, float16, bfloat16 or float64, which stand for code * scale:
    what flash_attention_kvcache() and flash_attention_varlen() take.

    kv_type  "int8"  torch.int8, from -127 to 127
             "e4m3"  torch.float8_e4m3fn
             "e5m2"  torch.float8_e5m2
             "int4"  torch.uint8 (..., D / 2), two numbers from -8 to 7 a byte, D being a multiple of 32
             "nf4"   likewise, of the 16 numbers of QLoRA, which quantise a normal distribution
    group    how many columns share a scale, a number that divides D, of 4 bits a multiple of 32; 0: all of a row
    scale    (..., D / group) in float32: the number of the largest size in its group becomes the largest code, or
             int4's -8. A group of zeros has the scale 0.

    Columns c and c + 16 of a block of 32 are the low and the high half of its byte c. A number that is NaN or infinite
    is a ValueError on the CPU; on MPS it makes its group NaN or infinite, since nobody waits for the GPU. There is no
    backward pass: NotImplementedError if a gradient is required."""
    refuse_gradients("quantize_kv", numbers=numbers)
    return quantize_operator(numbers, kv_type, group)


def dequantize_kv(
    codes_of: Tensor, scale: Tensor | None, kv_type: KvType, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers (..., D) in `dtype` that codes with these scales, as quantize_kv() returns both, stand for. A size of
    `scale` may be 1, and None is 1: it may broadcast as k_scale of flash_attention_kvcache()."""
    kind = codes.check_type("kv_type", kv_type)
    codes.check_dtype("kv_type", kind, "codes_of", codes_of)
    if dtype not in tensors.DTYPES:
        accepted = "float32, float16, bfloat16 or float64"
        raise TypeError(f"dtype is {str(dtype).removeprefix('torch.')}; it must be {accepted}")
    if kind in codes.PACKED and (codes_of.dim() == 0 or codes_of.shape[-1] % (codes.BLOCK // 2)):
        raise ValueError(
            f"codes_of has the shape {tuple(codes_of.shape)}; of {kind} the last size must be a multiple of "
            f"{codes.BLOCK // 2} bytes"
        )
    if scale is not None and scale.dim():
        codes.check_groups("scale", scale.shape[-1], codes.columns(codes_of, kind), kind)
    return codes.dequantize(codes_of, scale, kind, dtype)


def append_kv(
    key: Tensor,
    value: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    seqused_k: Tensor,
    *,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
) -> Tensor:
    """Writes new keys and values after those that each sequence has in a cache, in place, and returns how many it has
    then, seqused_k + N. All arguments but two are those that flash_attention_kvcache() reads the cache by.

    key, value  the cache, (B, Hkv, S, E) and (B, Hkv, S, Ev), or pages (pages, Hkv, page, E) with a block_table
    new_key     (B, Hkv, N, E), in the dtype of key, or, where that is codes, in any that quantize_kv() takes
    new_value   (B, Hkv, N, Ev), likewise
    seqused_k   (B,) in int32: the keys of each sequence so far, padding included

    Where key is codes, so are the rows that are written. If k_scale has a scale for each row and head, (B, Hkv, S,
    groups), those of the new rows are computed as by quantize_kv(), and written, too. A scale that rows share, as that
    of a head or of the whole cache, stays as it is, as does 1 for None: numbers beyond the largest code times this get
    that.

    ValueError and TypeError for what is wrong, on the CPU also for a place outside of the cache, for numbers that are
    NaN or infinite and become codes, and for shared scales that are 0, NaN or infinite, before anything is written. On
    MPS, and in compiled code, numbers are not read for that, and PyTorch's indexing decides what becomes of such a
    place. It has no backward pass: NotImplementedError if a gradient is required."""
    given = {"key": key, "value": value, "new_key": new_key, "new_value": new_value, "seqused_k": seqused_k}
    refuse_gradients("append_kv", **given, k_scale=k_scale, v_scale=v_scale)
    caches, names = [], Names("seqused_k", "leftpad_k")
    for name, cache, rows, scale, kv_type in (
        ("key", key, new_key, k_scale, k_type),
        ("value", value, new_value, v_scale, v_type),
    ):
        for of, tensor in ((name, cache), (f"new_{name}", rows)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{of} has {tensor.dim()} dimensions; it must have 4: (batch, heads, length, head_dim)"
                )
        kind = codes.kind_of(f"{name[0]}_type", kv_type, name, cache)
        caches.append(Cache.of(name, cache, kind, codes.expanded(f"{name[0]}_scale", scale, name, cache)))
        shape = (new_key.shape[0], key.shape[1], new_key.shape[2], codes.columns(cache, kind))
        if rows.shape != shape:
            raise ValueError(f"new_{name} has the shape {tuple(rows.shape)}; it must be {shape}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key has the shape {tuple(key.shape)} and value {tuple(value.shape)}; they must agree in all sizes but "
            "the last"
        )
    batch, _, count, _ = new_key.shape
    check_places(names, new_key, seqused_k, cache_batch_idx, None, block_table)
    if cache_batch_idx is None and block_table is None and len(key) != batch:
        raise ValueError(
            f"key has {len(key)} entries and new_key {batch}; without cache_batch_idx or block_table there must be one "
            "for each"
        )
    check_numbers(names, key, count, seqused_k, cache_batch_idx, None, block_table)
    places = Places.of(key, count, seqused_k, cache_batch_idx, block_table)
    new = ("new_key", new_key), ("new_value", new_value)
    for write in [cache.writer(name, rows, places) for cache, (name, rows) in zip(caches, new)]:
        write()
    return seqused_k + count


class Names(NamedTuple):
    """What a function calls its arguments that say which keys of a cache count."""

    lengths: str
    leftpad: str


class Places(NamedTuple):
    """Where the new rows of each sequence go in a cache, both (batch, new rows), or broadcast to that."""

    entries: Tensor
    rows: Tensor

    @classmethod
    def of(
        cls, cache: Tensor, count: int, lengths: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
    ) -> Places:
        """Those of `count` rows after the first lengths[b] of sequence b."""
        rows = lengths[:, None] + torch.arange(count, device=lengths.device)
        if block_table is not None:
            page = cache.shape[2]
            return cls(block_table.gather(1, rows // page).long(), rows % page)
        if cache_batch_idx is not None:
            return cls(cache_batch_idx.long()[:, None], rows)
        return cls(torch.arange(len(rows), device=rows.device)[:, None], rows)


class Cache(NamedTuple):
    """Keys or values that rows are written to, (entries, heads, rows, columns)."""

    name: str  # of the argument
    tensor: Tensor
    kind: str | None  # of codes
    scale: Tensor | None  # (entries, heads, rows, groups)
    is_written: bool  # whether each row of each head has a scale of its own

    @classmethod
    def of(cls, name: str, tensor: Tensor, kind: str | None, scale: Tensor | None) -> Cache:
        """The cache with the scales that codes.expanded() returns. Raises for what does not fit together."""
        codes.check(name, tensor, kind, scale)
        _check_writable(name, tensor)
        if scale is None:
            return cls(name, tensor, kind, None, False)
        shared = [size > 1 and stride == 0 for size, stride in zip(scale.shape, scale.stride())]
        if any(shared) and not shared[2] and scale.shape[2] > 1:
            raise ValueError(
                f"{name[0]}_scale has a scale for each row that entries, heads or groups share; new rows need one for "
                "each row and head, which is written, or one for all rows, which is not"
            )
        if not any(shared):
            _check_writable(f"{name[0]}_scale", scale)
        return cls(name, tensor, kind, scale, not any(shared))

    def writer(self, name: str, rows: Tensor, places: Places) -> Callable[[], None]:
        """A function that writes these rows, the argument `name`, (batch, heads, new rows, columns), to these places.
        What can be wrong with them is raised here."""
        if rows.device != self.tensor.device:
            raise ValueError(
                f"{name} is on {rows.device} and {self.name} on {self.tensor.device}; they must be on one device"
            )
        found = rows.transpose(1, 2)
        if self.kind is None:
            if rows.dtype != self.tensor.dtype:
                raise TypeError(
                    f"{name} is {tensors.dtype_name(rows)} and {self.name} {tensors.dtype_name(self.tensor)}; they "
                    "must have one dtype"
                )
            return lambda: _put(self.tensor, places, found)
        if self.is_written and self.scale is not None:
            scale, width = self.scale, rows.shape[3]
            coded, scales = quantize_operator(found, self.kind, width // scale.shape[3] if scale.shape[3] > 1 else 0)

            def write() -> None:
                _put(self.tensor, places, coded)
                _put(scale, places, scales)

            return write
        scales = None if self.scale is None else self.scale.transpose(1, 2)[places.entries, places.rows]
        quantize.check(rows, self.kind, 0)
        if _is_read(rows):
            if not rows.isfinite().all():
                raise ValueError(f"{name} has numbers that are NaN or infinite; as {self.kind} they must be finite")
            if scales is not None and not (scales.isfinite() & (scales != 0)).all():
                raise ValueError(
                    f"{self.name[0]}_scale is 0, NaN or infinite where new rows are; a scale that rows share must be "
                    "given before"
                )
        encoded = quantize.encode(found, scales, self.kind)
        return lambda: _put(self.tensor, places, encoded)


def _check_writable(name: str, tensor: Tensor) -> None:
    """Raises for a tensor in which rows would overwrite each other, or which PyTorch does not let be written."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if size > 1 and stride == 0:
            raise ValueError(
                f"{name} is expanded: its {size} entries of dimension {dimension} are one place in memory; it must "
                "have memory for each, as by clone()"
            )
    if torch.compiler.is_compiling():  # Dynamo does not compile what follows
        return
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made under torch.inference_mode() and can be written there alone; append to it there, or make "
            "it outside"
        )


def _put(cache: Tensor, places: Places, rows: Tensor) -> None:
    """Writes rows (batch, new rows, heads, columns)."""
    if cache.dtype.itemsize == 1:  # PyTorch does not index 8-bit floats
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache.transpose(1, 2)[places.entries, places.rows] = rows  # adjacent, else vmap puts its dimension between them


def _is_read(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are checked: a GPU is not waited for."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def refuse_gradients(function: str, **operands: Tensor | None) -> None:
    """Raises if autograd would have to record a call of this function, and for what is no tensor."""
    present = {name: one for name, one in operands.items() if one is not None}
    for name, one in present.items():
        if not isinstance(one, torch.Tensor):
            raise TypeError(f"{name} is a {type(one).__name__}; it must be a torch.Tensor")
    if torch.is_grad_enabled() and any(one.requires_grad for one in present.values()):
        raise NotImplementedError(
            f"{function} has no backward pass, and a tensor requires a gradient; call it under torch.no_grad() or "
            "torch.inference_mode()"
        )


def check_places(
    names: Names,
    rows: Tensor,
    lengths: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Raises for tensors that do not say where keys are, of the sequences of `rows`, whose first size is the batch."""
    batch = rows.shape[0]
    for name, tensor in (
        (names.lengths, lengths),
        ("cache_batch_idx", cache_batch_idx),
        (names.leftpad, leftpad),
        ("block_table", block_table),
    ):
        if tensor is None:
            continue
        is_table = tensor is block_table
        is_right = tensor.dim() == 1 + is_table and tensor.shape[0] == batch and tensor.dtype is torch.int32
        if not is_right or tensor.device != rows.device:
            found = f"{tensors.dtype_name(tensor)} of the shape {tuple(tensor.shape)} on {tensor.device}"
            also = "a number, or " if name == "cache_seqlens" else ""
            shape = f"({batch}, {'pages' if is_table else ''})"
            raise ValueError(f"{name} is {found}; it must be {also}int32 of the shape {shape} on {rows.device}")
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx and block_table are given; the rows of block_table say where keys are")


def check_numbers(
    names: Names,
    cache: Tensor,
    new: int,
    lengths: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Raises for numbers in tensors, on the CPU, that are outside of a cache (entries, heads, rows, columns) to which
    `new` rows are appended."""
    if not _is_read(cache):
        return
    entries, page = cache.shape[0], cache.shape[2]
    capacity = page if block_table is None else page * block_table.shape[1]
    found = None if lengths is None else lengths.tolist()
    for b, length in enumerate(found or ()):
        if length < 0 or length + new > capacity:
            raise ValueError(
                f"{names.lengths}[{b}] is {length}, and {new} keys are appended; the sum must be within the {capacity} "
                "keys of the cache"
            )
    if cache_batch_idx is not None:
        for b, entry in enumerate(cache_batch_idx.tolist()):
            if not 0 <= entry < entries:
                raise ValueError(f"cache_batch_idx[{b}] is {entry}; the cache has the entries 0 to {entries - 1}")
    if leftpad is not None:
        for b, padding in enumerate(leftpad.tolist()):
            most = (capacity if found is None else found[b]) + new
            if not 0 <= padding <= most:
                raise ValueError(f"{names.leftpad}[{b}] is {padding}; it must be 0 to {most}, the keys of its sequence")
    if block_table is None or page == 0 or not block_table.numel():
        return
    low, high = (int(n) for n in block_table.aminmax())
    if low < 0 or high >= entries:  # perhaps where no page is needed
        for b, pages in enumerate(block_table.tolist()):
            most = capacity if found is None else found[b] + new
            for n, number in enumerate(pages[: -(-most // page)]):
                if not 0 <= number < entries:
                    raise ValueError(f"block_table[{b}][{n}] is {number}; there are {entries} pages, from 0 on")
