"""Attention functions for frameworks that let users choose one: transformers and ComfyUI. Neither is imported before it
is needed. diffusers calls scaled_dot_product_attention, for which there is replace_sdpa()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import flash_attention
from .library import Unsupported
from .stats import REPLACED, count
from .transformers_check import check_config, check_models

# --- transformers --------------------------------------------------------------------------------


def register_transformers(name: str = "mfa") -> None:
    """Registers attn_implementation=`name` with transformers. It is flash_attention, with softcap and attention sinks,
    with the masks of transformers' "sdpa", and without repeating K and V. Calls that libmfa does not run go to that
    "sdpa", and are counted in sdpa_stats().

    A model whose code does not call the registered function raises a ValueError that names its class: when it is made,
    when it is switched by set_attn_implementation(), or else when it requests its first mask. ValueError if the name
    contains "flash", which transformers takes for a flash-attn; ImportError if transformers is missing or too old."""
    if "flash" in name:
        raise ValueError(
            f'name is "{name}"; it may not have "flash" in it: transformers takes that for a flash-attn, '
            "which it looks for and which has no masks"
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*arguments: Any, config: Any = None, **options: Any) -> Any:
        if config is not None:
            check_config(config, name)
        return sdpa_mask(*arguments, config=config, **options)

    check_models(name)
    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, mask)


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls with (B, H, L, E) tensors; returns (out as (B, L, H, Ev), None).
    The mask is None where is_causal is sufficient; a sliding window is in the mask. `s_aux` are attention sinks, (H,).
    ValueError where the weights are wanted (output_attentions), and for sinks where libmfa does not run the call:
    transformers' "sdpa" would leave them out."""
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions is True, but the weights are never held; it must be False, or attn_implementation "
            'must be "eager"'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    try:
        if options.get("cache") is not None:
            raise Unsupported("a paged cache")
        out = flash_attention(
            query,
            key,
            value,
            is_causal=bool(causal and attention_mask is None and query.shape[2] > 1),
            scale=scaling,
            attn_mask=_with_bias(attention_mask, position_bias),
            softcap=softcap or 0,
            enable_gqa=True,
            dropout_p=dropout,
            sinks=_sinks(s_aux, query),
        )
    except Unsupported as error:
        if s_aux is not None:
            raise ValueError(
                f"s_aux is given by {type(module).__name__}: attention sinks, which need libmfa, and it does not run "
                f'this call: {error}; choose attn_implementation="eager"'
            ) from None
        count(str(error))
    else:
        count(REPLACED)
        return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    keywords: dict[str, Any] = {
        "dropout": dropout,
        "scaling": scaling,
        "is_causal": is_causal,
        "position_bias": position_bias,
    }
    return sdpa_attention_forward(module, query, key, value, attention_mask, softcap=softcap, **keywords, **options)


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """In a dtype that flash_attention takes: under autocast, and in models whose parts differ, it may be another."""
    return sinks if sinks is None or sinks.dtype in (torch.float32, query.dtype) else sinks.to(query.dtype)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask for both. It hides keys by the lowest finite number, as transformers does, so that a row that may see no
    key attends to all keys equally."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype is torch.bool else mask + bias


# --- ComfyUI -------------------------------------------------------------------------------------


def comfyui_attention(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """For model_options["transformer_options"]["optimized_attention_override"] of a ComfyUI model. Calls that
    libmfa does not run go to `original`, the attention that ComfyUI would have used, and are counted in sdpa_stats().

        q, k, v              (B, L, heads * D), or (B, heads, L, D) with skip_reshape, in the dtypes of flash_attention
        mask                 bool or float, broadcastable to (B, heads, L, S), or (B, L, S)
        attn_precision       for `original` alone
        skip_output_reshape  returns (B, heads, L, D); otherwise the result is (B, L, heads * D)
        options              scale and enable_gqa, as in flash_attention; others are for `original` alone
    """
    try:
        query, key, value = q, k, v
        if not skip_reshape:
            head_dim = q.shape[-1] // heads
            query, key, value = (tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2) for tensor in (q, k, v))
        out = flash_attention(
            query,
            key,
            value,
            scale=options.get("scale"),
            attn_mask=mask if mask is None or mask.dim() != 3 else mask.unsqueeze(1),
            enable_gqa=bool(options.get("enable_gqa")),
        )
    except Unsupported as error:
        count(str(error))
        precision = {"attn_precision": attn_precision, "skip_reshape": skip_reshape}
        return original(q, k, v, heads, mask, skip_output_reshape=skip_output_reshape, **precision, **options)
    count(REPLACED)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
