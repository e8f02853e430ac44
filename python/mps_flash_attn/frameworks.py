"""Attention functions for frameworks that let users choose one: ComfyUI; the package transformers/ has that of
transformers, diffusers_backend.py that of diffusers. None is imported before it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import flash_attention
from .handles import Registration, check_name
from .library import Unsupported, library
from .stats import REPLACED, count

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
        options              is_causal, scale and enable_gqa, as in flash_attention; others are for `original` alone
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
            is_causal=bool(options.get("is_causal")),
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


def register_comfyui(name: str = "mfa") -> Registration:
    """Registers libmfa with ComfyUI as an attention function of this name, for nodes that let users choose one:
    comfy.ldm.modules.attention.get_attention_function("mfa"). It is comfyui_attention; calls that libmfa does not run
    go to ComfyUI's "pytorch" attention, and are counted in sdpa_stats().

    The result's remove() takes the name out, unless it was registered anew since. ValueError if the name is that of
    another function; ImportError if there is no libmfa, no ComfyUI, or one that has no such list."""
    library()
    check_name(name)
    from comfy.ldm.modules import attention

    if not hasattr(attention, "register_attention_function"):
        raise ImportError(
            "this ComfyUI has no register_attention_function; use comfyui_attention as its optimized_attention_override"
        )
    functions = attention.REGISTERED_ATTENTION_FUNCTIONS
    if name in functions:
        if not _is_comfyui_attention(functions[name]):
            raise ValueError(f'name is "{name}"; it must not be that of another attention function')
        del functions[name]  # ComfyUI ignores a second registration
    ours = attention.wrap_attn(partial(comfyui_attention, attention.attention_pytorch))
    attention.register_attention_function(name, ours)
    return Registration(lambda: functions.pop(name) if functions.get(name) is ours else None)


def _is_comfyui_attention(function: Any) -> bool:
    return getattr(inspect.unwrap(function), "func", None) is comfyui_attention
