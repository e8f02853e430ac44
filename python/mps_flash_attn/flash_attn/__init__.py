"""flash_attn's functions on every machine: the names, orders, defaults and results of flash-attn 2.8.

    from mps_flash_attn.flash_attn import flash_attn_func

or, for code that imports flash_attn itself, install_flash_attn() before it does. Tensors are (B, L, H, D), or
(total, H, D) where sequences are packed; the causal mask and windows are aligned to the last query and key, and
gradients are those of flash_attention(), which runs the calls: so float32 and float64 are taken too, any D up to 512,
and softcap together with dropout.

What differs: the logarithm of the sum of a query that sees no key is -inf, where flash-attn 2 has +inf, and it is
differentiable. Pages may have any size, and have a leftpad, too.
"""

from __future__ import annotations

from .bert_padding import index_first_axis, pad_input, unpad_input
from .install import install_flash_attn, uninstall_flash_attn
from .interface import (
    __version__,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache
from .rotary import apply_rotary_emb

__all__ = [
    "__version__",
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "install_flash_attn",
    "pad_input",
    "uninstall_flash_attn",
    "unpad_input",
]
