"""Exact flash attention, forward and backward, in O(N) memory, for PyTorch, NumPy and JAX.

from mps_flash_attn import flash_attention, replace_sdpa

What belongs to PyTorch is imported when it is first looked up, so that mps_flash_attn.numpy and mps_flash_attn.jax do
not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .library import Unsupported

if TYPE_CHECKING:
    from .attention import flash_attention
    from .caches import append_kv, dequantize_kv, quantize_kv
    from .diffusers_backend import register_diffusers
    from .dropout import dropout_mask
    from .explanation import Explanation, explain
    from .flash_attn import install_flash_attn, uninstall_flash_attn
    from .flash_impl import register_flash_attention_impl
    from .flex import flex_attention
    from .flex_replacement import replace_flex_attention
    from .frameworks import comfyui_attention, register_comfyui
    from .migration import convert_mask
    from .sdpa import replace_sdpa, replaced_sdpa, restore_sdpa
    from .stats import sdpa_stats, sdpa_thresholds
    from .torch_host import is_available
    from .transformers import register_transformers
    from .varlen import flash_attention_kvcache, flash_attention_varlen

    __version__: str

__all__ = [
    "Explanation",
    "Unsupported",
    "append_kv",
    "comfyui_attention",
    "convert_mask",
    "dequantize_kv",
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_kvcache",
    "flash_attention_varlen",
    "flex_attention",
    "install_flash_attn",
    "is_available",
    "quantize_kv",
    "register_comfyui",
    "register_diffusers",
    "register_flash_attention_impl",
    "register_transformers",
    "replace_flex_attention",
    "replace_sdpa",
    "replaced_sdpa",
    "restore_sdpa",
    "sdpa_stats",
    "sdpa_thresholds",
    "uninstall_flash_attn",
]

_MODULES = {  # with the public names that each has
    "attention": ("flash_attention",),
    "caches": ("append_kv", "dequantize_kv", "quantize_kv"),
    "diffusers_backend": ("register_diffusers",),
    "dropout": ("dropout_mask",),
    "explanation": ("Explanation", "explain"),
    "flash_attn": ("install_flash_attn", "uninstall_flash_attn"),
    "flash_impl": ("register_flash_attention_impl",),
    "flex": ("flex_attention",),
    "flex_replacement": ("replace_flex_attention",),
    "frameworks": ("comfyui_attention", "register_comfyui"),
    "migration": ("convert_mask",),
    "sdpa": ("replace_sdpa", "replaced_sdpa", "restore_sdpa"),
    "stats": ("sdpa_stats", "sdpa_thresholds"),
    "torch_host": ("is_available",),
    "transformers": ("register_transformers",),
    "varlen": ("flash_attention_kvcache", "flash_attention_varlen"),
}


def _import_public() -> None:
    """Makes all public names globals, as if their modules had been imported above. That also registers the operators
    torch.ops.mfa."""
    for name, names in _MODULES.items():
        module = import_module(f".{name}", __name__)
        globals().update((one, getattr(module, one)) for one in names)


def __getattr__(name: str) -> Any:
    if name == "__version__":  # the version of include/mfa.h
        from .library import library

        try:
            return library().version
        except (ImportError, OSError) as error:
            raise AttributeError(f"module {__name__!r} has no version without its library: {error}") from error
    if name in __all__:
        _import_public()
        return globals()[name]
    if name.isidentifier() and not name.startswith("__") and find_spec(f".{name}", __name__) is not None:
        return import_module(f".{name}", __name__)
    from .hints import replacement_hint

    sentence, hint = f"module {__name__!r} has no attribute {name!r}", replacement_hint(name)
    raise AttributeError(f"{sentence}: that is of another package, mps-flash-attn; {hint}" if hint else sentence)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


if sys.modules.get("torch"):  # a program that has it gets the operators with the package
    _import_public()
