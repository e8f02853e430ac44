"""replace_sdpa: runs every torch.nn.functional.scaled_dot_product_attention of this process on libmfa, where it can.

The operator aten::scaled_dot_product_attention itself is overridden, so that functions imported early, scripted models
and compiled ones are covered. It has an autograd key and a plain key for each device: the autograd key is used in
training and evaluation, the plain one under inference_mode. PyTorch's original computes what libmfa does not run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..after_fork import new_lock
from ..library import library
from . import checkpointing, dispatch, native_mha, torch_mps
from .checkpointing import handles
from .compiler_cache import tag_compiler_cache, untag_compiler_cache
from .original import OPERATOR

_KEYS = ("CPU", "AutogradCPU", "MPS", "AutogradMPS")
_KERNELS: dict[str, Callable[..., Tensor]] = dict.fromkeys(_KEYS, dispatch.attention)
if transforms.are_supported:
    _KERNELS[transforms.VMAP_KEY] = dispatch.vmapped

_lock = new_lock(globals(), "_lock")
_registration: torch.library.Library | None = None
# Kernels that were unregistered, which other threads may be about to call.
_retired_kernels: deque[Any] = deque(maxlen=1024)


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
    `python -m mps_flash_attn check --tune` measured on this machine are read now. Replacements nest: PyTorch's own
    operator is restored when all have been removed. ImportError if there is no libmfa."""
    library()
    handle = Replacement()
    with _lock:
        if _registration is None:
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
    global _registration
    torch_mps.load_thresholds()
    registration = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch warns that vmap has a kernel already
            for key, kernel in _KERNELS.items():
                registration.impl("scaled_dot_product_attention", kernel, key)
        native_mha.register(registration)
    except BaseException:
        registration._destroy()
        raise
    _registration = registration
    _clear_operator_cache()
    tag_compiler_cache()


def _unregister_unneeded() -> None:
    """Restores PyTorch's operator if no replacement is left. While a checkpoint may still recompute calls of ours, our
    kernels stay registered, and call PyTorch's operator for all other calls."""
    with _lock:
        if not handles and not checkpointing.is_pending():
            _unregister()


checkpointing.call_when_released(_unregister_unneeded)


def _unregister() -> None:
    """A thread that PyTorch has dispatched to one of our kernels may still wait for the interpreter lock, and nothing
    else keeps that kernel alive. So _retired_kernels does, where PyTorch has get_kernel."""
    global _registration
    if _registration is not None:
        if hasattr(torch.library, "get_kernel"):
            _retired_kernels.append([*map(partial(torch.library.get_kernel, OPERATOR), _KERNELS), native_mha.kernel()])
        registration, _registration = _registration, None
        registration._destroy()
        _clear_operator_cache()
        untag_compiler_cache()


def _clear_operator_cache() -> None:
    """PyTorch's operator caches its kernels for traced tensors. With a stale cache, code that is compiled later would
    get the kernels of before."""
    getattr(OPERATOR, "_dispatch_cache", {}).clear()
