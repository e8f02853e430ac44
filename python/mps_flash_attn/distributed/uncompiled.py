"""attend() for code that torch.compile compiles, which breaks its graph there: messages to other ranks stay outside.
Only such code and that with DTensors, which import the compiler themselves, import this file, since it does."""

from collections.abc import Callable
from typing import Any

import torch

from . import attention


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which is not traced by torch.compile."""
    try:
        return torch.compiler.disable(function, reason="context_parallel_attention exchanges messages with other ranks")
    except TypeError:  # PyTorch 2.6 takes no reason
        return torch.compiler.disable(function)


attend = uncompiled(attention.attend)
