"""The one cache of prepared calls: what was computed to dispatch a call is not computed again for the next one like it.

Models call attention with the same shapes, layer after layer and step after step. Three kinds of entries share one
dictionary and its limit:

- A call. lookup() finds it by its shapes and options. PyTorch's guards, with which compiled code checks whether it may
  run again, then compare in one call the types, dtypes, devices and strides of the tensors, which of them require
  gradients, and whether autocast and transforms are as they were.
- A pass (run.py): its packed problem and the layouts of its results. It serves the calls that have no entry of their
  own: those that come through the operators, and those for which no guard can be made.
- The shapes of a call of scaled_dot_product_attention (sdpa/shapes.py): whether they are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_count_of_modes = torch._C._len_torch_dispatch_stack  # a global name: each attribute lookup costs time in every call
_Entry = TypeVar("_Entry")
_CONSTANT = (type(None), bool, int, float, str, type)

# Keys of different kinds are never equal. The value None marks a call that came once.
_entries: dict[Hashable, Any] = {}
_MAX_ENTRIES = 4096  # a shape has up to four, in training; at the limit all are dropped, as steps of a growing sequence
MAX_MISSES = 1  # an entry that was missed more often in a row may be replaced

get = _entries.get
clear = _entries.clear


def put(key: Hashable, entry: _Entry) -> _Entry:
    """Stores an entry, and returns it."""
    if len(_entries) >= _MAX_ENTRIES and key not in _entries:
        _entries.clear()
    _entries[key] = entry
    return entry


class CacheEntry:
    """A call that can be repeated. `matches(*tensors)` says whether tensors are like those of the first call."""

    def __init__(self, matches: Callable[..., bool]) -> None:
        self.matches, self.misses = matches, 0  # misses: how many lookups in a row did not match

    def evict(self) -> None:
        """Lets the next insert() with this key replace the entry."""
        self.misses = MAX_MISSES + 1


def lookup(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options_key: tuple[object, ...]) -> Any:
    """The entry of an earlier call with arguments like these, or None. `options_key`: the arguments that are not
    tensors, after the name of the function unless that is flash_attention."""
    try:
        entry = get(_key(query, key, value, mask, options_key))
    except (AttributeError, RuntimeError, TypeError):
        return None  # not tensors, or nested ones, at which guards crash; or an option is a list
    if entry is None or forward_ad._current_level >= 0 or _count_of_modes():  # the guards do not cover all modes
        return None
    is_match = entry.matches(query, key, value) if mask is None else entry.matches(query, key, value, mask)
    entry.misses = 0 if is_match else entry.misses + 1
    return entry if is_match else None


def insert(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options_key: tuple[object, ...],
    entry_class: Callable[..., CacheEntry],
    *state: Any,
) -> None:
    """Makes an entry, entry_class(matches, query, key, value, mask, *state), when arguments like these come for the
    second time. None is made where no guard can be. It replaces another one only if that was missed repeatedly."""
    if not all(map(_is_constant, options_key)):
        return
    call_key = _key(query, key, value, mask, options_key)
    if call_key not in _entries:
        put(call_key, None)
        return
    entry = get(call_key)  # another thread may have dropped it since
    if entry is None or entry.misses > MAX_MISSES:
        matches = guard(query, key, value) if mask is None else guard(query, key, value, mask)
        if matches is not None:
            entry = entry_class(matches, query, key, value, mask, *state)
            put(call_key, entry)


def _key(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options_key: tuple[object, ...]
) -> tuple[object, ...]:
    mask_shape = None if mask is None else mask.shape
    grad = torch.is_grad_enabled(), query.requires_grad
    return query.shape, key.shape, value.shape, mask_shape, options_key, grad


def _is_constant(option: object) -> bool:
    return type(option) in _CONSTANT or (type(option) is tuple and all(type(number) is int for number in option))


def guard(*tensors: Tensor) -> Callable[..., bool] | None:
    """The function that checks whether other tensors are like these; None if there is none, as where a tensor is passed
    twice."""
    if not _guards_work or len(set(map(id, tensors))) < len(tensors):
        return None
    return _new_guard(*tensors)


def _new_guard(*tensors: Tensor) -> Callable[..., bool]:
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def _check_guards() -> bool:
    """Whether PyTorch has these guards, which are not public, and they distinguish all that this file relies on."""
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    first, second = torch.empty(2, 3, **like), torch.empty(2, 3, **like)
    others = (
        torch.empty(3, 3, **like),
        torch.empty(3, 2, **like).t(),
        torch.empty(2, 3, **like).half(),
        torch.empty(2, 3, **like, requires_grad=True),
        torch.empty(2, 3, dtype=torch.float32, device="meta"),
        torch._neg_view(torch.empty(2, 3, **like)),
        torch._efficientzerotensor((2, 3), **like),
        torch.nn.Parameter(second, requires_grad=False),
    )
    try:
        matches = _new_guard(first)
        return matches(second) and not any(map(matches, others))
    except (AttributeError, TypeError):
        return False


_guards_work = _check_guards()  # if not, no call has an entry
