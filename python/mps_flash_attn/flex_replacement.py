"""replace_flex_attention(): runs torch.nn.attention.flex_attention.flex_attention on libmfa, where it can.

It is a function of Python, and refuses gradients on the CPU before it reaches an operator, so the name is replaced: in
its own module, and in every module that had imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from .after_fork import new_lock
from .flex import flex_attention
from .library import Unsupported, library
from .stats import REPLACED, count

_NAME = "flex_attention"
_DEVICES = ("cpu", "mps")

_lock = new_lock(globals(), "_lock")
_handles: set[FlexReplacement] = set()
_original: Callable[..., Any] | None = None
_replaced: Callable[..., Any] | None = None


class FlexReplacement:
    """What replace_flex_attention() returns. It lasts until remove(), or until the end of its `with` block."""

    def remove(self) -> None:
        """Ends this replacement. PyTorch's own function is restored with the last one. A second remove() does
        nothing."""
        with _lock:
            _handles.discard(self)
            if not _handles:
                _rename(_replaced, _original)

    def __enter__(self) -> FlexReplacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def replace_flex_attention() -> FlexReplacement:
    """Runs torch.nn.attention.flex_attention.flex_attention on libmfa, on the CPU and on MPS, with gradients, wherever
    mps_flash_attn.flex_attention supports the call, in the whole process. Others go to PyTorch's own function, and
    sdpa_stats() counts them by their reason, beside "replaced".

        handle = replace_flex_attention()           until handle.remove()
        with replace_flex_attention(): ...          in the block

    The name is replaced in torch.nn.attention.flex_attention and in every module that has imported it under that name,
    as transformers' integration has. What holds the function otherwise keeps PyTorch's: a variable, another name, and
    what torch.compile made of it, so replace it before it is compiled. In compiled code a replaced call breaks the
    graph. Replacements nest. ImportError if there is no libmfa."""
    global _original, _replaced
    library()
    from torch.nn.attention import flex_attention as module

    handle = FlexReplacement()
    with _lock:
        if _original is None:
            _original = module.flex_attention
            _replaced = _replacement_of(_original)
        _rename(_original, _replaced)
        _handles.add(handle)
    return handle


def _rename(old: Any, new: Any) -> None:
    """Puts `new` in the place of `old` in every module."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if old is not None and names.get(_NAME) is old:
            names[_NAME] = new


def _replacement_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of PyTorch's function. Code that has kept it calls PyTorch's again after the last
    remove()."""

    @torch.compiler.disable
    def attend(*arguments: Any, **options: Any) -> Any:
        try:
            found = flex_attention(*arguments, **options)
        except Unsupported as error:
            count(str(error))
            return original(*arguments, **options)
        count(REPLACED)
        return found

    @functools.wraps(original)
    def replaced(*arguments: Any, **options: Any) -> Any:
        query = arguments[0] if arguments else options.get("query")
        if not _handles or not isinstance(query, torch.Tensor) or query.device.type not in _DEVICES:
            return original(*arguments, **options)
        return attend(*arguments, **options)

    return replaced
