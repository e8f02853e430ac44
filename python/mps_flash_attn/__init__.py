"""Exact flash attention, forward and backward, in O(N) memory, for PyTorch.

from mps_flash_attn import flash_attention, replace_sdpa
"""

from __future__ import annotations

from .attention import Explanation, explain, flash_attention
from .dropout import dropout_mask
from .flash_attn import install_flash_attn, uninstall_flash_attn
from .frameworks import comfyui_attention, register_transformers
from .library import Unsupported, is_available
from .library import library as _library
from .migration import convert_mask
from .migration import replacement_hint as _replacement_hint
from .sdpa import replace_sdpa, replaced_sdpa, restore_sdpa
from .stats import sdpa_stats, sdpa_thresholds

__all__ = [
    "Explanation",
    "Unsupported",
    "comfyui_attention",
    "convert_mask",
    "dropout_mask",
    "explain",
    "flash_attention",
    "install_flash_attn",
    "is_available",
    "register_transformers",
    "replace_sdpa",
    "replaced_sdpa",
    "restore_sdpa",
    "sdpa_stats",
    "sdpa_thresholds",
    "uninstall_flash_attn",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # the version of include/mfa.h
        try:
            return _library().version
        except (ImportError, OSError) as error:
            raise AttributeError(f"module {__name__!r} has no version without its library: {error}") from error
    sentence = f"module {__name__!r} has no attribute {name!r}"
    hint = _replacement_hint(name)
    raise AttributeError(f"{sentence}: that is of another package, mps-flash-attn; {hint}" if hint else sentence)
