"""flash_attn.layers.rotary: positions by rotation, of PyTorch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x, (B, L, H, D) or packed (total, H, D), with its first 2 * R columns rotated by the angles of their positions.

    cos, sin        (positions, R)
    interleaved     rotates columns 2 n and 2 n + 1 (GPT-J), else n and n + R (GPT-NeoX)
    inplace         writes x, and returns it
    seqlen_offsets  the position of the first row of each sequence: a number, or (B,)
    cu_seqlens      (B + 1,) of packed sequences; what rows before the first and after the last become does not matter
    max_seqlen      has no effect

    It is computed in float32, float64 for that, and differentiable. A position that the table lacks is a ValueError on
    the CPU, and gives NaN on a GPU, which is not waited for."""
    if cu_seqlens is None:
        rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        first = seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    else:
        rows = torch.arange(x.shape[0], device=x.device)
        is_used = (rows >= cu_seqlens[0]) & (rows < cu_seqlens[-1])
        number = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True).clamp(max=len(cu_seqlens) - 2)
        rows = torch.where(is_used, rows - cu_seqlens[number], 0)
        first = seqlen_offsets[number] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    rotated = rotate(x, cos, sin, rows + first, interleaved)
    if not inplace:
        return rotated
    return x.copy_(rotated)


def check_table(cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raises for tables of angles that no tensor with this many columns can have."""
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos has the shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be (positions, n), n being at "
            f"most half of the head_dim, {head_dim}"
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x, (..., heads, columns), rotated by the angles of `positions` (...)."""
    check_table(cos, sin, x.shape[-1])
    count, half = cos.shape
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
        low, high = (int(n) for n in positions.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"positions are {low} to {high}; cos and sin have those from 0 to {count - 1}")
    is_known = ((positions >= 0) & (positions < count))[..., None]
    places, dtype = positions.clamp(0, max(count - 1, 0)), torch.promote_types(x.dtype, torch.float32)
    c, s = (torch.where(is_known, one[places].to(dtype), torch.nan).unsqueeze(-2) for one in (cos, sin))
    columns, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    pairs = columns.unflatten(-1, (half, 2) if interleaved else (2, half))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack([first * c - second * s, first * s + second * c], -1 if interleaved else -2)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], -1)
