"""Whether scaled_dot_product_attention is replaced for a call, also under activation checkpointing.

torch.utils.checkpoint(..., use_reentrant=False) keeps no tensors of the forward pass, recomputes it in backward, and
expects the same tensors to be saved again. Our attention saves other tensors than PyTorch's. So a recomputed call runs
as it ran in forward, even if replace_sdpa() came, or was undone, in between.

This relies on details of PyTorch's checkpoint: while one runs, its hooks for saved tensors are on top, and hold its
frame, which counts those tensors. That count identifies a call, both in forward and when it is recomputed. A PyTorch
before 2.8 does not expose its hooks: there replace_sdpa() has to stay in force until backward is done.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

# (ignores tracing) -> the innermost (pack, unpack), or None
top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)

handles: set[object] = set()  # the replacements in force; replace.py adds and removes them
# Weak reference to a checkpoint's frame: the positions of the calls that were replaced in it.
_replaced_calls: dict[weakref.ref[Any], set[int]] = {}
_release_callbacks: list[Callable[[], object]] = []


def is_in_force() -> bool:
    """Whether scaled_dot_product_attention is replaced, in this process."""
    return bool(handles)


def call_when_released(function: Callable[[], object]) -> None:
    """Calls `function` whenever a checkpoint with replaced calls is gone."""
    _release_callbacks.append(function)


def is_replaced(hooks: Any, is_differentiated: Callable[[], bool]) -> bool:
    """Whether a call runs as if SDPA were replaced. `hooks`: the result of top_hooks(); `is_differentiated()`: whether
    tensors will be saved."""
    found = None if hooks is None else _position(hooks[0])
    if found is None:
        return bool(handles)
    frame, position, is_recomputed = found
    reference = weakref.ref(frame)
    if is_recomputed:
        return position in _replaced_calls.get(reference, ())
    if handles and is_differentiated():
        if reference not in _replaced_calls:
            reference = weakref.ref(frame, _release)
            _replaced_calls[reference] = set()
        _replaced_calls[reference].add(position)
    return bool(handles)


def is_pending() -> bool:
    """Whether a checkpoint may still recompute calls that were replaced in forward."""
    return bool(_replaced_calls)


def _release(reference: weakref.ref[Any]) -> None:
    _replaced_calls.pop(reference, None)
    for function in _release_callbacks:
        function()


def _position(pack: Any) -> tuple[Any, int, bool] | None:
    """(frame, how many tensors it has saved so far, whether it recomputes), if `pack` is the hook of a checkpoint."""
    if getattr(pack, "__module__", None) != torch.utils.checkpoint.__name__:
        return None
    pack = inspect.unwrap(pack)
    cells = {name: cell.cell_contents for name, cell in zip(pack.__code__.co_freevars, pack.__closure__ or ())}
    if "frame" in cells:
        return cells["frame"], len(cells["frame"].weak_holders), False
    if "target_frame_ref" in cells and "gid" in cells:
        frame = cells["target_frame_ref"]()
        return frame, frame.recomp_counter[cells["gid"]], True
    return None
