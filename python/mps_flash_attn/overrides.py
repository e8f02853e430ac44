"""Kernels of ours under operators of PyTorch's own, aten::, while something is installed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Kernels that were unregistered, which other threads may be about to call.
_retired_kernels: deque[Any] = deque(maxlen=1024)


class Overrides:
    """Kernels that are registered until remove(). `kernels`: {(operator, dispatch key): function}."""

    def __init__(self, kernels: Mapping[tuple[str, str], Callable[..., Any]]) -> None:
        self._places = tuple(kernels)
        self._registration = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch warns where there is a kernel already
                for (name, key), kernel in kernels.items():
                    self._registration.impl(name, kernel, key)
        except BaseException:
            self._registration._destroy()
            raise
        self._clear_caches()

    def remove(self) -> None:
        """Restores what was there before. A thread that PyTorch has dispatched to one of our kernels may still wait for
        the interpreter lock, and nothing else keeps that kernel alive. So _retired_kernels does, where PyTorch has
        get_kernel."""
        if hasattr(torch.library, "get_kernel"):
            _retired_kernels.append([torch.library.get_kernel(f"aten::{name}", key) for name, key in self._places])
        self._registration._destroy()
        self._clear_caches()

    def _clear_caches(self) -> None:
        """PyTorch's operators cache their kernels for traced tensors. With a stale cache, code that is compiled later
        would get the kernels of before."""
        for name in {name for name, _ in self._places}:
            getattr(getattr(torch.ops.aten, name).default, "_dispatch_cache", {}).clear()
