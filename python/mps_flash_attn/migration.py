"""One function that helps code written for mps-flash-attn 0.2 to 0.6.3 on PyPI, which has the import name of this
package (docs/migration.md); hints.py has the rest."""

from __future__ import annotations

import torch
from torch import Tensor


def convert_mask(attn_mask: Tensor | None) -> Tensor | None:
    """The mask for flash_attention, from one for the function of this name in mps-flash-attn on PyPI: None and float
    masks, added to the scores here, as they are. ValueError for a bool mask of any shape: there True hides a key, in
    PyTorch and here True lets it take part."""
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype is torch.bool:
        raise ValueError(
            "attn_mask is bool, which convert_mask of mps-flash-attn took for a mask whose True hides; give "
            "flash_attention ~attn_mask if it is one, or attn_mask itself if True takes part, as in PyTorch"
        )
    return attn_mask
