"""Exact flash attention, forward and backward, in O(N) memory, for PyTorch.

from mps_flash_attn import flash_attention, replace_sdpa
"""

from .attention import Explanation, explain, flash_attention
from .library import Unsupported, is_available
from .sdpa import replace_sdpa, restore_sdpa, sdpa_stats, sdpa_thresholds

__all__ = [
    "Explanation",
    "Unsupported",
    "explain",
    "flash_attention",
    "is_available",
    "replace_sdpa",
    "restore_sdpa",
    "sdpa_stats",
    "sdpa_thresholds",
]
