"""Exact flash attention, forward and backward, in O(N) memory, for PyTorch.

from mps_flash_attn import flash_attention, replace_sdpa
"""

from .attention import Explanation, explain, flash_attention
from .frameworks import comfyui_attention, register_transformers
from .library import Unsupported, is_available
from .sdpa import replace_sdpa, replaced_sdpa, restore_sdpa
from .stats import sdpa_stats, sdpa_thresholds

__all__ = [
    "Explanation",
    "Unsupported",
    "comfyui_attention",
    "explain",
    "flash_attention",
    "is_available",
    "register_transformers",
    "replace_sdpa",
    "replaced_sdpa",
    "restore_sdpa",
    "sdpa_stats",
    "sdpa_thresholds",
]
