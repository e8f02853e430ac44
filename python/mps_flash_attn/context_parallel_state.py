"""What PyTorch's own context_parallel (torch.distributed.tensor.experimental) is doing in this process.

It replaces torch.nn.functional.scaled_dot_product_attention by name, and divides sequences over the ranks as its
options say. Both are private in PyTorch. Nothing is imported here: where its module was not imported, it does nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

_MODULES = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",  # PyTorch before 2.10
)
_INSTEAD = (
    "call torch.nn.functional.scaled_dot_product_attention by that name, which context_parallel replaces (a function "
    "that was imported from there before is not replaced), or pass DTensors, Replicate() for those that are no shards"
)


def is_active() -> bool:
    """Whether this is inside a `with context_parallel(...)`, where tensors are shards of a sequence."""
    module = _module()
    return module is not None and F.scaled_dot_product_attention in module._replaced_functions


def is_balanced() -> bool:
    """Whether the shards of a sequence are those of its head-tail load balancer, which are those of Layout.zigzag;
    otherwise they are contiguous. Outside of context_parallel they are contiguous."""
    module = _module()
    if module is None or not _handles_attention(module):
        return False
    return bool(module._cp_options.enable_load_balance)


def refuse_local(name: str, instead: str = _INSTEAD) -> None:
    """Raises where context_parallel is active, for a function that it does not replace: of plain tensors the result
    would be that of this rank's shards only. `instead`: what to do."""
    if is_active():
        raise RuntimeError(
            f"{name} was called with plain tensors inside PyTorch's context_parallel, where tensors are shards of a "
            f"sequence: its result would be that of this rank's shards alone; {instead}"
        )


def _module() -> Any:
    for name in _MODULES:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "_replaced_functions"):
            return module
    return None


def _handles_attention(module: Any) -> bool:
    """Whether context_parallel, or the plan _ContextParallel for modules, is in force."""
    handlers = module.DTensor._op_dispatcher._custom_op_handlers
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers
