"""replace_sdpa: runs every torch.nn.functional.scaled_dot_product_attention of this process on libmfa, where it can.

The operator aten::scaled_dot_product_attention itself is overridden, so that functions imported early, scripted models
and compiled ones are covered. It has an autograd key and a plain key for each device: the autograd key is used in
training and evaluation, the plain one under inference_mode. PyTorch's original computes what libmfa does not run. The
class of nested tensors never calls the operator: the function that it calls is replaced (jagged.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from .. import transforms
from ..after_fork import new_lock
from ..library import library
from ..overrides import Overrides
from . import checkpointing, dispatch, jagged, native_mha, torch_mps
from .checkpointing import handles
from .compiler_cache import tag_compiler_cache, untag_compiler_cache

_NAME = "scaled_dot_product_attention"
_KERNELS: dict[tuple[str, str], Callable[..., Any]] = {
    (_NAME, key): dispatch.attention for key in ("CPU", "AutogradCPU", "MPS", "AutogradMPS")
}
if transforms.are_supported:
    _KERNELS[_NAME, transforms.VMAP_KEY] = dispatch.vmapped

_lock = new_lock(globals(), "_lock")
_overrides: Overrides | None = None


class Replacement:
    """What replace_sdpa() returns. It lasts until remove(), until the end of its `with` block, or until
    restore_sdpa()."""

    def remove(self) -> None:
        """Ends this replacement. PyTorch's own operator is restored with the last one. A second remove() does
        nothing."""
        with _lock:
            handles.discard(self)
            _unregister_unneeded()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def replace_sdpa() -> Replacement:
    """Runs scaled_dot_product_attention on libmfa wherever that supports the call, in the whole process. A forked child
    inherits this; a spawned one has to call replace_sdpa() itself.

        replace_sdpa()                  for good, or until restore_sdpa()
        handle = replace_sdpa()         until handle.remove()
        with replaced_sdpa(): ...       in the block

    Calls that libmfa does not run go to PyTorch's own operator, as do those below sdpa_thresholds and, on MPS, those
    for which PyTorch has a kernel that does not hold the scores; sdpa_stats() counts them. Thresholds that
    `python -m mps_flash_attn check --tune` measured on this machine are read now. Nested tensors with the jagged layout
    run on libmfa, too. Replacements nest: PyTorch's own operator is restored when all have been removed. ImportError if
    there is no libmfa."""
    library()
    handle = Replacement()
    with _lock:
        if _overrides is None:
            _register()
        handles.add(handle)
    return handle


@contextlib.contextmanager
def replaced_sdpa() -> Iterator[Replacement]:
    """replace_sdpa() for a `with` block, or for each call of a function that this decorates. ImportError if there is no
    libmfa."""
    with replace_sdpa() as handle:
        yield handle


def restore_sdpa() -> None:
    """Removes every replacement, which restores PyTorch's own operator."""
    with _lock:
        handles.clear()
        _unregister_unneeded()


def _register() -> None:
    global _overrides
    torch_mps.load_thresholds()
    _overrides = Overrides(_KERNELS | native_mha.kernels())
    jagged.register()
    if "torch.distributed.tensor" in sys.modules:  # else its rules come with the first DTensor
        import_module("..distributed.dtensors", __package__)
    tag_compiler_cache()


def _unregister_unneeded() -> None:
    """Restores PyTorch's operator if no replacement is left. While a checkpoint may still recompute calls of ours, our
    kernels stay registered, and call PyTorch's operator for all other calls."""
    with _lock:
        if not handles and not checkpointing.is_pending():
            _unregister()


checkpointing.call_when_released(_unregister_unneeded)


def _unregister() -> None:
    global _overrides
    if _overrides is not None:
        overrides, _overrides = _overrides, None
        overrides.remove()
        jagged.unregister()
        untag_compiler_cache()
