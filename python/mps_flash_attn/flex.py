"""flex_attention: PyTorch's function of this name, with its gradients on every device, by flash_attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from . import block_mask as block_masks
from . import score_mod as score_mods
from .attention import flash_attention
from .block_mask import BlockMask
from .library import Unsupported
from .score_mod import Form
from .score_trace import INDICES, distance_of

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class AuxRequest(Protocol):
    """torch.nn.attention.flex_attention.AuxRequest, which PyTorch has from 2.9 on."""

    lse: bool
    max_scores: bool


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: None = None,
) -> Tensor: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest,
) -> tuple[Tensor, Any]: ...


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """torch.nn.attention.flex_attention.flex_attention by flash_attention, forward and backward, on the CPU and on MPS,
    without holding the scores: query (B, H, L, E), key (B or 1, Hkv, S, E), value (B or 1, Hkv, S, Ev), in one dtype of
    flash_attention. The result is (B, H, L, Ev).

    score_mod       score_mod(score, b, h, q_idx, kv_idx), a function of scalar tensors, with any captured tensors. It
                    is traced in each call, and accepted if it is, in this order,
                        score * number                          a positive factor, or none
                        cap * tanh(score / cap)                 a softcap, or none
                        + term - term ...                       of indices and captured tensors alone
                    torch.where(condition, score, -inf) is a term, too. Captured tensors get their gradients, if they
                    require them. Unsupported, with the operation, for every other function.
    block_mask      a BlockMask of create_block_mask() for these lengths. A mask_mod that is a band (causal, sliding
                    windows, and both) is never evaluated; of another one a bool mask is made, as by flash_attention.
    scale           None is 1/sqrt(E)
    enable_gqa      allows fewer heads in key and value
    return_lse      returns (out, lse), where lse is (B, H, L), as flash_attention's; it is differentiable
    kernel_options  has no effect: it tunes PyTorch's kernels
    return_aux      an AuxRequest: returns (out, AuxOutput) with the lse, if that requests it. max_scores are not
                    computed: Unsupported.

    Terms cost memory as follows, for each batch entry and head that they depend on:
        bias[b, h, q_idx, kv_idx]     none: the tensor is read where it lies, whichever of the indices it has, in any
                                      order
        slope[b, h] * (kv_idx - q_idx)   none, where slope requires no gradient, and the block_mask is causal or the
                                      distance an absolute value: ALiBi, aligned to the last query and key
        any other, and sums of these two kinds   L x S numbers, or as many as there are indices that it depends on, and
                                      as many for their gradient

    Wrong arguments raise ValueError or TypeError; errors are those of flash_attention otherwise."""
    attend = torch.compiler.disable(_attend) if torch.compiler.is_compiling() else _attend  # it traces score_mod itself
    return attend(query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, return_aux)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask | None,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    kernel_options: Mapping[str, Any] | None,
    return_aux: Any,
) -> Any:
    """flex_attention, where nothing is compiled."""
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux are given; return_aux alone says what is returned")
    if getattr(return_aux, "max_scores", False):
        raise Unsupported("return_aux requests max_scores, which are not computed; lse is")
    if block_mask is not None and not block_masks.is_block_mask(block_mask):
        raise TypeError(f"block_mask is a {type(block_mask).__name__}; it must be a BlockMask of flex_attention")
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise TypeError(f"kernel_options is a {type(kernel_options).__name__}; it must be a dict, which has no effect")
    if query.dim() == key.dim() == value.dim() == 4 and key.shape[0] == value.shape[0] == 1:
        key, value = (one.expand(query.shape[0], -1, -1, -1) for one in (key, value))
    options: dict[str, Any] = {"scale": scale}
    if score_mod is not None:
        options = _options(score_mod, query, key, block_mask, scale)
    wants_lse = return_lse or getattr(return_aux, "lse", False)
    found = flash_attention(
        query, key, value, enable_gqa=enable_gqa, return_lse=wants_lse, block_mask=block_mask, **options
    )
    if return_aux is None:
        return found
    out, lse = found if wants_lse else (found, None)
    return out, sys.modules[type(return_aux).__module__].AuxOutput(lse=lse)


def _options(
    score_mod: ScoreMod, query: Tensor, key: Tensor, block_mask: BlockMask | None, scale: float | None
) -> dict[str, Any]:
    """The arguments of flash_attention that a score_mod stands for."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query has {query.dim()} dimensions and key {key.dim()}; they must have 4: (B, H, N, E)")
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    form = score_mods.form_of(score_mod, dtype, query.device)
    sizes = (*query.shape[:3], key.shape[2])
    options: dict[str, Any] = {"softcap": form.softcap, "scale": scale}
    if form.gain != 1:
        options["scale"] = form.gain * (query.shape[3] ** -0.5 if scale is None else scale)
    if form.terms == ():
        return options
    slopes = _slopes(score_mod, form, sizes, dtype, query, block_mask)
    if slopes is not None:
        return options | {"alibi_slopes": slopes}
    mask = _sum_of_entries(form, sizes, dtype)
    if mask is None:
        mask = score_mods.offset(score_mod, form.indices, sizes, dtype, query.device)
    if mask.dtype not in (query.dtype, torch.float32):
        mask = mask.to(dtype)
    return options | {"attn_mask": mask}


def _sum_of_entries(form: Form, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The terms as one tensor that broadcasts to the scores, where each is an entry of a tensor; else None."""
    found = None
    for sign, term in form.terms or ():
        if term.entry is None:
            return None
        tensor, places = term.entry
        names = [place for place in places if isinstance(place, str)]
        wanted = [name for name in INDICES if name in names]
        if None in places or len(wanted) < len(names):
            return None
        for dimension, place in reversed(list(enumerate(places))):
            if isinstance(place, int):
                tensor = tensor.select(dimension, place)
        tensor = tensor.permute([names.index(name) for name in wanted])
        for dimension, (name, size) in enumerate(zip(INDICES, sizes)):
            if name not in wanted:
                tensor = tensor.unsqueeze(dimension)
            elif tensor.shape[dimension] < size:
                return None  # indexing it raises
            else:
                tensor = tensor.narrow(dimension, 0, size)
        if sign > 0 and found is None:
            found = tensor
        else:
            tensor = tensor.to(dtype)
            found = (tensor if sign > 0 else -tensor) if found is None else found + sign * tensor
    return found


def _slopes(
    score_mod: ScoreMod,
    form: Form,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    query: Tensor,
    block_mask: BlockMask | None,
) -> Tensor | None:
    """The slopes of ALiBi, (B, H) in float32, where that is the only term; else None."""
    if form.terms is None or len(form.terms) != 1:
        return None
    ((_, term),) = form.terms
    distance = distance_of(term)
    if distance is None or distance.shift != sizes[3] - sizes[2]:
        return None
    if not distance.is_absolute:  # no key comes after the place of its query
        upper = None if block_mask is None else block_masks.band_of(block_mask, (sizes[2], sizes[3]))[1]
        if upper is None or upper > distance.shift:
            return None
    # What is added to a score at the distance 1 is -slope.
    used = [name for name in ("b", "h") if name in term.indices]
    at = {"q": torch.tensor(1 - distance.shift, device=query.device)}
    at |= {name: torch.arange(size, device=query.device) for name, size in zip(("b", "h"), sizes) if name in used}
    zero = torch.zeros((), dtype=dtype, device=query.device)
    found = score_mods.evaluate(score_mod, zero, at, used)
    if found.requires_grad:
        return None
    shape = [size if name in used else 1 for name, size in zip(("b", "h"), sizes)]
    return found.neg().float().reshape(shape).expand(sizes[0], sizes[1])
