"""Tensor subclasses: for which of them the memory holds the values, and which masks stand for a band.

The rule is PyTorch's own. For a class that overrides __torch_dispatch__, the dispatcher calls that with our operators.
One that overrides __torch_function__ is called before that, as by every function of PyTorch; where it lets the function
run, its memory holds its values, as it does for PyTorch's operators. Every other class only adds attributes and methods
to ordinary memory.

Masks are the exception. A class of biases implements scaled_dot_product_attention in its __torch_function__, and its
memory may hold anything. So a mask whose class overrides that is refused, except torch.nn.attention.bias.CausalBias,
which stands for a band.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

PLAIN = (torch.Tensor, torch.nn.Parameter)
_DEFAULT_RULE = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined] # of a class method


def as_plain(names: Iterable[str], operands: Iterable[Tensor | None]) -> Any:
    """The tensors as a list, converted to plain tensors where possible. Raises for one whose values are not in its
    memory. The names are for errors, except that attn_mask has a rule of its own; None stays None."""
    return [one if one is None or type(one) in PLAIN else _as_plain(name, one) for name, one in zip(names, operands)]


def _as_plain(name: str, tensor: Tensor) -> Tensor:
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        load_rules(tensor)
        return tensor
    if _is_causal_bias(tensor) or (name == "attn_mask" and _overrides_torch_function(kind)):
        raise TypeError(
            f"{name} is a {kind.__name__}, whose values may be elsewhere than in its memory; it must be a plain tensor"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def have_torch_function(*operands: Tensor) -> bool:
    """Whether the class of one of them has a __torch_function__ that must be called."""
    return any(type(one) not in PLAIN for one in operands) and has_torch_function(operands)


def are_distributed(*operands: Any) -> bool:
    """Whether one of these is a DTensor of torch.distributed.tensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # not imported: there are none
    if kind is None:
        return False
    return any(isinstance(one, kind) for one in operands)


def load_rules(*operands: Any) -> None:
    """Registers the rules of our operators for DTensors, if one of these is a DTensor."""
    if are_distributed(*operands):
        import_module(".distributed.dtensors", __package__)


def split(mask: Tensor | None) -> tuple[Tensor | None, Any]:
    """(mask, None), or (None, bias) if the mask is a CausalBias of torch.nn.attention.bias."""
    return (None, mask) if _is_causal_bias(mask) else (mask, None)


def upper_bound(bias: Any, q_len: int, kv_len: int) -> int:
    """The upper bound of j - i that a CausalBias stands for."""
    module = sys.modules["torch.nn.attention.bias"]
    variant = getattr(bias, "variant", None)
    variants = module.CausalVariant.UPPER_LEFT, module.CausalVariant.LOWER_RIGHT
    if type(bias) is not module.CausalBias or variant not in variants:
        raise TypeError(
            f"attn_mask is a {type(bias).__name__} that does not say which bias it is, as one that an operation "
            "returned; it must be as causal_upper_left or causal_lower_right made it"
        )
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, kv_len):
        raise ValueError(
            f"attn_mask is a CausalBias for {bias.seq_len_q} queries and {bias.seq_len_kv} keys; it must be for the "
            f"lengths of query and key, {q_len} and {kv_len}"
        )
    return kv_len - q_len if variant == module.CausalVariant.LOWER_RIGHT else 0


def _is_causal_bias(tensor: Tensor | None) -> bool:
    module = sys.modules.get("torch.nn.attention.bias")  # importing it takes seconds; without it no such bias exists
    return module is not None and isinstance(tensor, module.CausalBias)


def _overrides_torch_function(kind: type[Tensor]) -> bool:
    rule = kind.__torch_function__
    return rule is not torch._C._disabled_torch_function_impl and getattr(rule, "__func__", rule) is not _DEFAULT_RULE
